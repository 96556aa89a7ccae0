"""What attention over small sets of a grid costs along the sharded dim: cost/neighborhood.py's
formulas. Channels are those of queries or of keys and values, where they are not the block's."""

from __future__ import annotations

from dataclasses import dataclass

from xdist.cost.neighborhood import grid_attention_bytes, key_windows
from xdist.cost.per_dim import per_dim
from xdist.cost.place_spot import Option, Passes, Sizes, Spot, at_least, fetched
from xdist.errors import ShapeError
from xdist_kernels.neighborhood.rules import Blocks, Near, Rule

Each = int | tuple[int, ...]
"""One number for all dims, or one for each."""


@dataclass(frozen=True)
class Neighborhood:
    """`xdist.neighborhood_attention`. key_channels: of keys and values together; None: twice those
    of the block's input."""

    window: Each
    dilation: Each = 1
    key_channels: int | None = None

    def __post_init__(self) -> None:
        at_least("window", self.window, 1)
        at_least("dilation", self.dilation, 1)
        windows = self.window if isinstance(self.window, tuple) else (self.window,)
        if any(window % 2 == 0 for window in windows):
            raise ShapeError("a neighborhood's window is odd", f"got {self.window}")
        at_least("key_channels", self.key_channels or 1, 1)

    def __str__(self) -> str:
        dilated = f" x {self.dilation}" if self.dilation != 1 else ""
        return f"neighborhood of {self.window}{dilated}"

    def _along(self, sizes: Sizes, dim: int) -> tuple[int, int]:
        window = per_dim("window", self.window, len(sizes), least=None)[dim]
        return window, per_dim("dilation", self.dilation, len(sizes), least=None)[dim]

    def grid(self, sizes: Sizes) -> Sizes:
        """The same grid."""
        for dim, size in enumerate(sizes):
            window, dilation = self._along(sizes, dim)
            if window * dilation > size:
                raise ShapeError(
                    f"the neighborhood is wider than dim {dim}",
                    f"window {window} x dilation {dilation} > {size} of {sizes}",
                    "take a smaller window or dilation along that dim",
                )
        return sizes

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """Keys and values of each rank's queries."""
        rule = Near(spot.sizes[spot.dim], *self._along(spot.sizes, spot.dim))
        return _fetched(spot, rule, self.key_channels)


@dataclass(frozen=True)
class Windows:
    """`xdist.window_attention`: blocks of `window`, shifted or not. key_channels: as above."""

    window: Each
    shift: Each = 0
    key_channels: int | None = None

    def __post_init__(self) -> None:
        at_least("window", self.window, 1)
        at_least("shift", self.shift, 0)
        at_least("key_channels", self.key_channels or 1, 1)

    def __str__(self) -> str:
        return f"windows of {self.window}" + (f" from {self.shift}" if self.shift else "")

    def _rules(self, sizes: Sizes) -> list[Blocks]:
        windows = per_dim("window", self.window, len(sizes), least=None)
        shifts = per_dim("shift", self.shift, len(sizes), least=None)
        for window, shift in zip(windows, shifts, strict=True):
            if shift >= window:
                raise ShapeError("a shift is smaller than its window", f"{shifts} and {windows}")
        return [Blocks(*each) for each in zip(sizes, windows, shifts, strict=True)]

    def grid(self, sizes: Sizes) -> Sizes:
        """The same grid."""
        self._rules(sizes)
        return sizes

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """Keys and values of the blocks that each rank's share cuts."""
        return _fetched(spot, self._rules(spot.sizes)[spot.dim], self.key_channels)


@dataclass(frozen=True)
class Strided:
    """`xdist.nn.GridAttention`: sets of at most `grid` positions spread over each dim. Its input is
    dealt anew along the sharded dim, and its output back."""

    positions: Each

    def __post_init__(self) -> None:
        at_least("positions", self.positions, 1)

    def __str__(self) -> str:
        return f"sets of {self.positions} over the grid"

    def grid(self, sizes: Sizes) -> Sizes:
        """The same grid."""
        per_dim("positions", self.positions, len(sizes), least=None)
        return sizes

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """Whole sets to each rank."""
        count = per_dim("positions", self.positions, len(spot.sizes), least=None)[spot.dim]
        elements = spot.across * spot.channels
        there = [
            grid_attention_bytes(
                spot.sizes[spot.dim], spot.degree, rank, grid=count, keys=elements,
                outputs=elements, itemsize=spot.itemsize,
            )
            for rank in range(spot.degree)
        ]  # fmt: skip
        return (Option("", tuple(Passes(moved, moved.back()) for moved in there)),)


def _fetched(spot: Spot, rule: Rule, channels: int | None) -> tuple[Option, ...]:
    """The run between the outer keys of each rank's queries."""
    used = 2 * spot.channels if channels is None else channels
    return (Option("", fetched(spot, key_windows(rule, spot.layout), used)),)
