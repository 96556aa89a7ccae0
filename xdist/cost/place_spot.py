"""Where a block of an N-D model stands: its grid, the sharded dim, and what it moves there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from operator import index
from typing import NamedTuple, Protocol

from xdist.cost.conv_nd import even_windows
from xdist.cost.moves import Moved, sum_itemsize, switch_bytes, window_bytes
from xdist.errors import ShapeError
from xdist.layout import Layout, even_sizes

Sizes = tuple[int, ...]
Run = tuple[int, int]


class Passes(NamedTuple):
    """Bytes that one rank sends and receives, forward and backward."""

    forward: Moved = Moved()
    backward: Moved = Moved()

    def __add__(self, other: object) -> Passes:
        """Both, one after the other."""
        if not isinstance(other, Passes):
            return NotImplemented
        return Passes(self.forward + other.forward, self.backward + other.backward)

    @property
    def sent_bytes(self) -> int:
        """Sent, forward and backward."""
        return self.forward.sent_bytes + self.backward.sent_bytes

    @property
    def received_bytes(self) -> int:
        """Received, forward and backward."""
        return self.forward.received_bytes + self.backward.received_bytes

    @property
    def bytes(self) -> int:
        """Sent and received, forward and backward."""
        return self.sent_bytes + self.received_bytes


@dataclass(frozen=True)
class Spot:
    """A grid of `sizes` sharded along `dim` over `degree` ranks as `xdist.GridShard` does, and the
    block that reads it there: rows of the batch, channels of its input, bytes an element."""

    sizes: Sizes
    dim: int
    degree: int
    batch: int
    channels: int
    itemsize: int

    @cached_property
    def shares(self) -> tuple[int, ...]:
        """Positions along the sharded dim, by rank."""
        return tuple(even_sizes(self.sizes[self.dim], self.degree))

    @cached_property
    def layout(self) -> Layout:
        """Which positions along the sharded dim each rank holds."""
        return Layout.contiguous(self.sizes[self.dim], self.degree)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Positions `[start, stop)` along the sharded dim, by rank."""
        return even_windows(self.sizes[self.dim], self.degree)

    @property
    def across(self) -> int:
        """Positions of the grid, and rows of the batch, at one position of the sharded dim."""
        return self.batch * prod(self.sizes) // self.sizes[self.dim]

    def nothing(self) -> tuple[Passes, ...]:
        """Nothing moves, on any rank."""
        return (Passes(),) * self.degree


class Option(NamedTuple):
    """One way to do what a block needs where it stands.

    strategy: its name, empty where nothing has to be chosen; moved: by rank; idle: ranks that have
    no part in the work although they hold positions.
    """

    strategy: str
    moved: tuple[Passes, ...]
    idle: int = 0


class Reach(Protocol):
    """What a block reads beyond each position: hashable, and pure integers.

    `Convolution`, `Halo`, `Neighborhood`, `Windows`, `Strided`, `Patches`, `Unpatches` and `Scan`
    are such; one of your own needs these two methods.
    """

    def grid(self, sizes: Sizes) -> Sizes:
        """The grid behind the block. Raises where `sizes` do not fit."""
        ...

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """The ways to do it with `spot.dim` sharded, in the order that decides ties; none where
        that dim must be whole."""
        ...


def switched(sizes: Sizes, source: int, target: int, degree: int, size: int) -> tuple[Passes, ...]:
    """Bytes of a switch from dim `source` to `target`, by rank; size: bytes of one position."""
    if source == target or degree == 1:
        return (Passes(),) * degree
    there, back = even_sizes(sizes[source], degree), even_sizes(sizes[target], degree)
    other = prod(sizes) // (sizes[source] * sizes[target])
    return tuple(
        Passes(
            switch_bytes(there, back, rank, other, size),
            switch_bytes(back, there, rank, other, size),
        )
        for rank in range(degree)
    )


def fetched(spot: Spot, windows: Sequence[Run], channels: int) -> tuple[Passes, ...]:
    """Bytes of a window move along the sharded dim, by rank; gradients return as sums."""
    other = spot.across * channels
    there = [
        window_bytes(spot.layout, windows, rank, other, spot.itemsize)
        for rank in range(spot.degree)
    ]
    wide = sum_itemsize(spot.itemsize)
    return tuple(Passes(moved, moved.back(spot.itemsize, wide)) for moved in there)


def at_least(name: str, value: int | tuple[int, ...], least: int) -> int | tuple[int, ...]:
    """`value` as int or tuple of ints.

    Raises:
        ShapeError: no integers, or one below `least`.
    """
    try:
        found = index(value) if not isinstance(value, tuple) else tuple(index(v) for v in value)
    except TypeError as error:
        raise ShapeError(f"{name} must be an int or a tuple of ints", f"got {value!r}") from error
    low = min(found, default=least) if isinstance(found, tuple) else found
    if low < least:
        raise ShapeError(f"{name} must be at least {least}", f"got {value}")
    return found
