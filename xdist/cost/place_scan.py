"""What a scan over dims of a grid costs along the sharded one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from xdist.cost.place_spot import Option, Passes, Sizes, Spot, at_least, runs_of, switched
from xdist.cost.recurrent import Problem, recurrent_bytes
from xdist.documents import Documents
from xdist.errors import ShapeError
from xdist.layout import Layout


@dataclass(frozen=True)
class Scan:
    """`xdist.grid_scan` of a recurrence: dims of `order` from outermost to innermost, rows of the
    others beside each other.

    heads, key_dim, value_dim: of the state; transition: as in xdist.cost.moves; both: two
    directions in one exchange; inputs, outputs: channels that a scan inside takes along when the
    dim it lies in is switched for another, and brings back (None: the block's).

    Sharded outside `order`: nothing moves. Along its outermost dim: states do. Along an inner one:
    inputs are switched to the dim of the fewest bytes and outputs back.
    """

    order: tuple[int, ...]
    heads: int
    key_dim: int
    value_dim: int
    transition: str = "diagonal"
    reverse: bool = False
    both: bool = False
    inputs: int | None = None
    outputs: int | None = None

    def __post_init__(self) -> None:
        at_least("order", self.order, 0)
        if not self.order or len(set(self.order)) != len(self.order):
            raise ShapeError("order names each scanned dim once", f"got {self.order}")
        for name in ("heads", "key_dim", "value_dim"):
            at_least(name, getattr(self, name), 1)

    def __str__(self) -> str:
        return f"scan over {self.order}{' both ways' if self.both else ''}"

    def grid(self, sizes: Sizes) -> Sizes:
        """The same grid."""
        if max(self.order) >= len(sizes):
            raise ShapeError(
                f"order {self.order} names a dim that the grid does not have",
                f"it has {len(sizes)}: {sizes}",
                "count from 0",
            )
        return sizes

    def options(self, spot: Spot) -> tuple[Option, ...]:
        """Nothing, states, or a switch there and back around the scan."""
        if spot.dim not in self.order:
            return (Option("", spot.nothing()),)
        if spot.dim == self.order[0]:
            return (Option("scan", _states(self, spot)),)
        return tuple(self._switched(spot, dim) for dim in self._targets(spot))

    def _targets(self, spot: Spot) -> list[int]:
        inner = self.order[1:]
        return [dim for dim in range(len(spot.sizes)) if dim not in inner]

    def _switched(self, spot: Spot, dim: int) -> Option:
        there = switched(spot.sizes, spot.dim, dim, spot.degree, _row(spot, self.inputs))
        back = switched(spot.sizes, dim, spot.dim, spot.degree, _row(spot, self.outputs))
        moved = [a + b for a, b in zip(there, back, strict=True)]
        if dim == self.order[0]:
            own = _states(self, replace(spot, dim=dim))
            moved = [a + b for a, b in zip(moved, own, strict=True)]
        idle = sum(run[0] == run[1] for run in runs_of(spot.sizes[dim], spot.degree))
        return Option(f"switch to dim {dim}", tuple(moved), idle)


def _row(spot: Spot, channels: int | None) -> int:
    """Bytes of one position, over the batch."""
    return spot.batch * spot.itemsize * (spot.channels if channels is None else channels)


def _states(scan: Scan, spot: Spot) -> tuple[Passes, ...]:
    """States that cross ranks where the outermost dim is sharded."""
    inner = prod(spot.sizes[dim] for dim in scan.order[1:])
    rows = spot.batch * prod(spot.sizes) // (inner * spot.sizes[spot.dim])
    tokens = spot.sizes[spot.dim] * inner
    layout = Layout.from_segments(tokens, [[(a * inner, b * inner)] for a, b in spot.runs])
    found = list(spot.nothing())
    for reverse in (False, True) if scan.both else (scan.reverse,):
        problem = Problem(
            layout, Documents.of(None, tokens), rows, scan.heads, scan.key_dim, scan.value_dim,
            scan.value_dim, scan.transition, spot.itemsize, (), reverse=reverse,
        )  # fmt: skip
        found = [
            one + Passes(*(recurrent_bytes(problem, "scan", r, backward=b) for b in (False, True)))
            for r, one in enumerate(found)
        ]
    return tuple(found)
