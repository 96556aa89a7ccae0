"""What blocks of N-D models reach beyond a position, and what it costs along the sharded dim.

Along dims that are whole a reach costs nothing. Along the sharded one each rank fetches, once, the
positions of other ranks that its outputs read; backward their gradients return in the dtype of
sums. Outputs of a reach that changes the grid lie as `GridShard.resized` puts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from xdist.cost.conv_nd import (
    Along,
    conv_dims,
    patch_sizes,
    patch_windows,
    share_windows,
    unpatch_bytes,
)
from xdist.cost.per_dim import per_dim
from xdist.cost.place_spot import Option, Passes, Run, Sizes, Spot, at_least, fetched
from xdist.errors import ShapeError

Each = int | tuple[int, ...]
"""One number for all dims, or one for each."""


@dataclass(frozen=True)
class Halo:
    """`before` and `after` positions beside each one.

    channels: of what is fetched; None: of the block's input.
    """

    before: Each
    after: Each
    channels: int | None = None

    def __post_init__(self) -> None:
        at_least("before", self.before, 0)
        at_least("after", self.after, 0)
        _channels(self.channels)

    def __str__(self) -> str:
        return f"reaches {self.before} before and {self.after} after"

    def grid(self, sizes: Sizes) -> Sizes:
        """The same grid."""
        per_dim("before", self.before, len(sizes), least=None)
        per_dim("after", self.after, len(sizes), least=None)
        return sizes

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """The edges of the neighbours."""
        n = spot.sizes[spot.dim]
        before = per_dim("before", self.before, len(spot.sizes), least=None)[spot.dim]
        after = per_dim("after", self.after, len(spot.sizes), least=None)[spot.dim]
        windows = [
            (max(0, a - before), min(n, b + after)) if a < b else (a, b) for a, b in spot.runs
        ]
        return _option(spot, windows, self.channels, None)


@dataclass(frozen=True)
class Convolution:
    """`xdist.conv_nd`: its arguments of these names.

    channels, itemsize: of what it reads; None: of the block's input.
    """

    kernel: Each
    stride: Each = 1
    dilation: Each = 1
    padding: str | Each = "same"
    channels: int | None = None
    itemsize: int | None = None

    def __post_init__(self) -> None:
        at_least("kernel", self.kernel, 1)
        _channels(self.channels)

    def __str__(self) -> str:
        return f"convolution of {self.kernel}" + (f" by {self.stride}" if self.stride != 1 else "")

    def _along(self, sizes: Sizes) -> tuple[Along, ...]:
        return conv_dims(
            sizes,
            per_dim("kernel", self.kernel, len(sizes), least=None),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )

    def grid(self, sizes: Sizes) -> Sizes:
        """Outputs along each dim."""
        return tuple(one.outputs for one in self._along(sizes))

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """What the outputs of each rank read."""
        windows = share_windows(self._along(spot.sizes)[spot.dim], spot.degree)
        return _option(spot, windows, self.channels, self.itemsize)


@dataclass(frozen=True)
class Patches:
    """`patch` positions become one (`xdist.nn.patches`): patch embedding and merging. The last
    patch may be partly filled."""

    patch: Each

    def __post_init__(self) -> None:
        at_least("patch", self.patch, 1)

    def __str__(self) -> str:
        return f"patches of {self.patch}"

    def grid(self, sizes: Sizes) -> Sizes:
        """Patches along each dim."""
        return patch_sizes(sizes, per_dim("patch", self.patch, len(sizes), least=None))

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """The positions of each rank's patches that others hold."""
        patch = per_dim("patch", self.patch, len(spot.sizes), least=None)[spot.dim]
        windows = patch_windows(spot.sizes[spot.dim], patch, spot.degree)
        return _option(spot, windows, None, None)


@dataclass(frozen=True)
class Unpatches:
    """Each position becomes `patch` ones (`xdist.nn.unpatches`), cut to the grid `sizes`: what
    `Patches` took together. The block's channels are those of a whole patch."""

    patch: Each
    sizes: Sizes

    def __post_init__(self) -> None:
        at_least("patch", self.patch, 1)
        at_least("sizes", self.sizes, 1)

    def __str__(self) -> str:
        return f"patches of {self.patch} apart"

    def grid(self, sizes: Sizes) -> Sizes:
        """`sizes` of the finer grid."""
        found = patch_sizes(self.sizes, per_dim("patch", self.patch, len(self.sizes), least=None))
        if found != sizes:
            raise ShapeError(
                f"patches of {self.patch} over the grid {self.sizes} are {found}",
                f"the block's grid is {sizes}",
                "give Unpatches the sizes that Patches was given",
            )
        return self.sizes

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """The positions of each rank's share that lie in patches of others."""
        patch = per_dim("patch", self.patch, len(self.sizes), least=None)
        elements = spot.batch * spot.channels // prod(patch)
        moved = []
        for rank in range(spot.degree):
            ways = [
                unpatch_bytes(
                    self.sizes, spot.dim, spot.degree, patch[spot.dim], rank, elements,
                    spot.itemsize, backward=backward,
                )
                for backward in (False, True)
            ]  # fmt: skip
            moved.append(Passes(*ways))
        return (Option("", tuple(moved)),)


def _option(
    spot: Spot, windows: Sequence[Run], channels: int | None, itemsize: int | None
) -> tuple[Option, ...]:
    """The one way of a reach: a window of each rank."""
    used = replace(spot, itemsize=itemsize) if itemsize else spot
    return (Option("", fetched(used, windows, channels or spot.channels)),)


def _channels(channels: int | None) -> None:
    if channels is not None:
        at_least("channels", channels, 1)
