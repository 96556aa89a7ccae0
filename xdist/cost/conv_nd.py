"""Sizes, windows and bytes of convolutions and patches of a grid. Pure integers.

Along one dim, with n positions, K taps, stride s and dilation d, a convolution reaches over
r = d (K - 1) + 1 positions, and output o reads [o s - front, o s - front + r):

    "same"    out = ceil(n / s), zeros = max((out - 1) s + r - n, 0), front = zeros // 2
    p         out = (n + 2 p - r) // s + 1, front = p; "valid" is 0

A rank holds a share of the outputs, `even_sizes(out, P)`, and needs the run of inputs that they
read: its window. What of it other ranks hold is moved. With stride 1 and "same" that are r // 2
positions on either side, however many a rank holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import NamedTuple

from xdist.cost.moves import Moved, sum_itemsize, window_bytes
from xdist.cost.per_dim import PerDim, per_dim
from xdist.errors import ShapeError
from xdist.layout import Layout, even_sizes

Window = tuple[int, int]
Padding = str | int | Sequence[int]


class Along(NamedTuple):
    """A convolution along one dim: positions, outputs, the reach of an output in positions, stride
    and zeros in front."""

    positions: int
    outputs: int
    reach: int
    stride: int
    front: int

    def read(self, start: int, stop: int) -> Window:
        """The run that outputs `[start, stop)` read, zeros around the grid included."""
        if start >= stop:
            return 0, 0
        low = start * self.stride - self.front
        return low, (stop - 1) * self.stride - self.front + self.reach

    def window(self, start: int, stop: int) -> Window:
        """The part of `read` inside the grid; `(0, 0)` where that is empty."""
        low, high = self.read(start, stop)
        low, high = max(low, 0), min(high, self.positions)
        return (low, high) if low < high else (0, 0)


def conv_dims(
    sizes: Sequence[int],
    kernel: Sequence[int],
    *,
    stride: PerDim = 1,
    padding: Padding = "same",
    dilation: PerDim = 1,
) -> tuple[Along, ...]:
    """The convolution along each dim of a grid of `sizes`.

    Raises:
        ShapeError: settings that are none, or a dim too small for one output.
    """
    dims = len(sizes)
    if len(kernel) != dims:
        raise ShapeError("the kernel needs a size for each dim", f"{kernel} for a grid {sizes}")
    kernel = per_dim("kernel", kernel, dims)
    strides, dilations = per_dim("stride", stride, dims), per_dim("dilation", dilation, dims)
    if isinstance(padding, str) and padding not in ("same", "valid"):
        raise ShapeError("padding is 'same', 'valid' or a number of zeros", f"got {padding!r}")
    fronts = None
    if padding != "same":
        zeros = 0 if isinstance(padding, str) else padding
        fronts = per_dim("padding", zeros, dims, least=0)
    found = []
    for dim, (n, taps, s, d) in enumerate(zip(sizes, kernel, strides, dilations, strict=True)):
        reach = d * (taps - 1) + 1
        if fronts is None:
            outputs = -(-n // s)
            front = max((outputs - 1) * s + reach - n, 0) // 2
        else:
            front = fronts[dim]
            outputs = (n + 2 * front - reach) // s + 1
        if outputs < 1:
            raise ShapeError(
                f"dim {dim} of the grid is too small for the convolution",
                f"it has {n} positions and {front} zeros on either side; {taps} taps with dilation "
                f"{d} reach over {reach}",
                "take padding='same', more padding, or a smaller kernel or dilation",
            )
        found.append(Along(n, outputs, reach, s, front))
    return tuple(found)


def conv_sizes(
    sizes: Sequence[int],
    kernel: Sequence[int],
    *,
    stride: PerDim = 1,
    padding: Padding = "same",
    dilation: PerDim = 1,
) -> tuple[int, ...]:
    """The grid of the outputs of `xdist.conv_nd` on a grid of `sizes`, of one rank or of many.

    Raises:
        ShapeError: settings that are none, or a dim too small for one output.
    """
    found = conv_dims(sizes, kernel, stride=stride, padding=padding, dilation=dilation)
    return tuple(along.outputs for along in found)


@dataclass(frozen=True)
class ConvNdProblem:
    """One call: what `conv_dims` says of the grid, which dim is sharded over how many ranks,
    and batch, channels and bytes an element of x."""

    along: tuple[Along, ...]
    dim: int
    ranks: int
    batch: int
    channels: int
    element_bytes: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """The grid of x."""
        return tuple(one.positions for one in self.along)

    @property
    def windows(self) -> tuple[Window, ...]:
        """What each rank's outputs read along the sharded dim, inside the grid."""
        return share_windows(self.along[self.dim], self.ranks)


def share_windows(along: Along, ranks: int) -> tuple[Window, ...]:
    """What each rank's share of the outputs reads, inside the grid."""
    found, start = [], 0
    for share in even_sizes(along.outputs, ranks):
        found.append(along.window(start, start + share))
        start += share
    return tuple(found)


def conv_nd_bytes(problem: ConvNdProblem, rank: int, *, backward: bool) -> Moved:
    """Bytes of the edges of this rank's window, in the dtype of x; backward their gradients in
    float32, or float64 for float64.

    Received forward: e B C x (positions of its window that others hold) x (the other dims).
    """
    p = problem
    elements, itemsize = p.batch * p.channels, p.element_bytes
    return _window_moved(p.sizes, p.dim, p.windows, rank, elements, itemsize, backward=backward)


def patch_sizes(sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """The grid of the patches of a grid: each dim divided, rounded up."""
    return tuple(-(-n // p) for n, p in zip(sizes, patch, strict=True))


def patch_windows(positions: int, patch: int, ranks: int) -> tuple[Window, ...]:
    """The positions of each rank's share of patches along a dim."""
    outputs = -(-positions // patch)
    return share_windows(Along(positions, outputs, patch, patch, 0), ranks)


def patch_bytes(
    sizes: Sequence[int],
    dim: int,
    ranks: int,
    patch: int,
    rank: int,
    elements: int,
    itemsize: int,
    *,
    backward: bool = False,
) -> Moved:
    """Bytes of `xdist.nn.patches` of a grid of `sizes`: positions of this rank's patches that
    others hold. elements: batch x channels of one position."""
    windows = patch_windows(sizes[dim], patch, ranks)
    return _window_moved(sizes, dim, windows, rank, elements, itemsize, backward=backward)


def unpatch_bytes(
    sizes: Sequence[int],
    dim: int,
    ranks: int,
    patch: int,
    rank: int,
    elements: int,
    itemsize: int,
    *,
    backward: bool = False,
) -> Moved:
    """Bytes of `xdist.nn.unpatches` to a grid of `sizes`: positions of this rank's share that
    lie in patches of others."""
    held = [[window] for window in patch_windows(sizes[dim], patch, ranks)]
    layout = Layout.from_segments(sizes[dim], held)
    other = elements * prod(sizes) // sizes[dim]
    moved = window_bytes(layout, even_windows(sizes[dim], ranks), rank, other, itemsize)
    return moved.back(itemsize, sum_itemsize(itemsize)) if backward else moved


def even_windows(positions: int, ranks: int) -> tuple[Window, ...]:
    """Each rank's share of a dim."""
    stops = [0]
    for share in even_sizes(positions, ranks):
        stops.append(stops[-1] + share)
    return tuple(pairwise(stops))


def _window_moved(
    sizes: Sequence[int],
    dim: int,
    windows: Sequence[Window],
    rank: int,
    elements: int,
    itemsize: int,
    *,
    backward: bool,
) -> Moved:
    layout = Layout.contiguous(sizes[dim], len(windows))
    other = elements * prod(sizes) // sizes[dim]
    moved = window_bytes(layout, windows, rank, other, itemsize)
    return moved.back(itemsize, sum_itemsize(itemsize)) if backward else moved
