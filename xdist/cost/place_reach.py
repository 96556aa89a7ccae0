"""What blocks of N-D models reach beyond a position, and what it costs along the sharded dim.

Along dims that are whole a reach costs nothing. Along the sharded one each rank fetches, once, the
positions of other ranks that its outputs read; backward their gradients return in the dtype of
sums. Outputs of a reach that changes the grid lie as `GridShard.resized` puts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xdist.cost.place_spot import (
    Option,
    Run,
    Sizes,
    Spot,
    at_least,
    each_dim,
    fetched,
    runs_of,
)
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
        each_dim(self.before, sizes, "before")
        each_dim(self.after, sizes, "after")
        return sizes

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """The edges of the neighbours."""
        n = spot.sizes[spot.dim]
        before = each_dim(self.before, spot.sizes, "before")[spot.dim]
        after = each_dim(self.after, spot.sizes, "after")[spot.dim]
        return _window_option(
            spot, spot.runs, self.channels, lambda a, b: (max(0, a - before), min(n, b + after))
        )


@dataclass(frozen=True)
class Convolution:
    """`xdist.conv_nd`: outputs at every `stride`-th position, over `kernel` taps `dilation` apart.

    padding "same" gives ceil(n / stride) positions, the odd one of the padding behind; "valid" as
    many as fit.
    """

    kernel: Each
    stride: Each = 1
    dilation: Each = 1
    padding: str = "same"

    def __post_init__(self) -> None:
        for name in ("kernel", "stride", "dilation"):
            at_least(name, getattr(self, name), 1)
        if self.padding not in ("same", "valid"):
            raise ShapeError(f"padding {self.padding!r} is not known", "", "use 'same' or 'valid'")

    def _along(self, sizes: Sizes, dim: int) -> tuple[int, int, int, int]:
        """Outputs, stride, positions that one output spans, padding in front."""
        n = sizes[dim]
        stride = each_dim(self.stride, sizes, "stride")[dim]
        taps = each_dim(self.kernel, sizes, "kernel")[dim]
        span = each_dim(self.dilation, sizes, "dilation")[dim] * (taps - 1) + 1
        if self.padding == "valid":
            return (n - span) // stride + 1, stride, span, 0
        out = -(-n // stride)
        return out, stride, span, max((out - 1) * stride + span - n, 0) // 2

    def __str__(self) -> str:
        return f"convolution of {self.kernel}" + (f" by {self.stride}" if self.stride != 1 else "")

    def grid(self, sizes: Sizes) -> Sizes:
        """Outputs along each dim."""
        found = tuple(self._along(sizes, dim)[0] for dim in range(len(sizes)))
        return _not_empty(found, sizes, f"a convolution of {self.kernel} without padding")

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """What the outputs of each rank read."""
        n = spot.sizes[spot.dim]
        out, stride, span, pad = self._along(spot.sizes, spot.dim)
        return _window_option(
            spot,
            runs_of(out, spot.degree),
            None,
            lambda a, b: (max(0, a * stride - pad), min(n, (b - 1) * stride - pad + span)),
        )


@dataclass(frozen=True)
class Neighborhood:
    """`xdist.neighborhood_attention`: `window` keys of each query, pushed inside at the borders,
    `dilation` apart.

    channels: of keys and values; None: twice the block's input.
    """

    window: Each
    dilation: Each = 1
    channels: int | None = None

    def __post_init__(self) -> None:
        at_least("window", self.window, 1)
        at_least("dilation", self.dilation, 1)
        windows = self.window if isinstance(self.window, tuple) else (self.window,)
        if any(window % 2 == 0 for window in windows):
            raise ShapeError("a neighborhood's window is odd", f"got {self.window}")
        _channels(self.channels)

    def _along(self, sizes: Sizes, dim: int) -> tuple[int, int]:
        window = each_dim(self.window, sizes, "window")[dim]
        return window, each_dim(self.dilation, sizes, "dilation")[dim]

    def __str__(self) -> str:
        return f"neighborhood of {self.window}" + (
            f" x {self.dilation}" if self.dilation != 1 else ""
        )

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
        n = spot.sizes[spot.dim]
        window, dilation = self._along(spot.sizes, spot.dim)

        def keys(query: int) -> Run:
            """First key and one past the last, of the query's own residue class."""
            own, place = query % dilation, query // dilation
            last = -(-(n - own) // dilation) - window
            first = min(max(place - window // 2, 0), last)
            return own + first * dilation, own + (first + window - 1) * dilation + 1

        def seen(a: int, b: int) -> Run:
            # In each residue class keys move with the query: the outer ones decide.
            low = min(keys(query)[0] for query in range(a, min(a + dilation, b)))
            return low, max(keys(query)[1] for query in range(max(a, b - dilation), b))

        channels = 2 * spot.channels if self.channels is None else self.channels
        return _window_option(spot, spot.runs, channels, seen)


@dataclass(frozen=True)
class Patches:
    """`patch` positions become one: patch embedding and merging. The last may be partly filled."""

    patch: Each

    def __post_init__(self) -> None:
        at_least("patch", self.patch, 1)

    def __str__(self) -> str:
        return f"patches of {self.patch}"

    def grid(self, sizes: Sizes) -> Sizes:
        """Patches along each dim."""
        return tuple(
            -(-n // p) for n, p in zip(sizes, each_dim(self.patch, sizes, "patch"), strict=True)
        )

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """The positions of each rank's patches that others hold."""
        n, patch = spot.sizes[spot.dim], each_dim(self.patch, spot.sizes, "patch")[spot.dim]
        runs = runs_of(-(-n // patch), spot.degree)
        return _window_option(spot, runs, None, lambda a, b: (a * patch, min(n, b * patch)))


@dataclass(frozen=True)
class Unpatches:
    """Each position becomes `patch` ones, cut to the grid `sizes`: what `Patches` took together."""

    patch: Each
    sizes: Sizes

    def __post_init__(self) -> None:
        at_least("patch", self.patch, 1)
        at_least("sizes", self.sizes, 1)

    def __str__(self) -> str:
        return f"patches of {self.patch} apart"

    def grid(self, sizes: Sizes) -> Sizes:
        """`sizes` of the finer grid."""
        if Patches(self.patch).grid(self.sizes) != sizes:
            raise ShapeError(
                f"patches of {self.patch} over the grid {self.sizes} are "
                f"{Patches(self.patch).grid(self.sizes)}",
                f"the block's grid is {sizes}",
                "give Unpatches the sizes that Patches was given",
            )
        return self.sizes

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """The patches of each rank's positions that others hold."""
        patch = each_dim(self.patch, spot.sizes, "patch")[spot.dim]
        runs = runs_of(self.sizes[spot.dim], spot.degree)
        return _window_option(spot, runs, None, lambda a, b: (a // patch, -(-b // patch)))


def _window_option(
    spot: Spot, outputs: tuple[Run, ...], channels: int | None, reads: Callable[[int, int], Run]
) -> tuple[Option, ...]:
    """The one way of a reach: each rank fetches what its outputs `[a, b)` read; empty, nothing."""
    windows = [reads(a, b) if a < b else (0, 0) for a, b in outputs]
    # Padding alone is read from nobody.
    windows = [(low, high) if low < high else (0, 0) for low, high in windows]
    used = spot.channels if channels is None else channels
    return (Option("", fetched(spot, windows, used)),)


def _not_empty(found: Sizes, sizes: Sizes, what: str) -> Sizes:
    if min(found) < 1:
        raise ShapeError(f"{what} leaves nothing", f"{sizes} becomes {found}", "use padding='same'")
    return found


def _channels(channels: int | None) -> None:
    if channels is not None:
        at_least("channels", channels, 1)
