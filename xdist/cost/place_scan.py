"""What a scan over dims of a grid costs along the sharded one: `xdist.grid_scan`'s formulas."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from xdist.cost.grid_scan import GridScanProblem, choose_route, grid_scan_bytes
from xdist.cost.moves import sum_itemsize, transition_elements
from xdist.cost.place_spot import Option, Passes, Sizes, Spot, at_least
from xdist.cost.recurrent import Problem, TokenInput
from xdist.documents import Documents
from xdist.errors import ShapeError


@dataclass(frozen=True)
class Scan:
    """`xdist.grid_scan` of a recurrence: dims of `order` from outermost to innermost, rows of the
    others beside each other.

    heads, key_dim, value_dim: of the state, as in xdist.cost.recurrent; transition: as there; both:
    two directions in one exchange. inputs: of one direction, those with tokens, for routes that
    move tokens; empty: q, k, v and a decay, each per head. shared: how many of the first inputs
    are the same of both directions, as those of one set are, and then travel once. itemsize: of
    the output; None: the block's.

    Sharded outside `order` nothing moves, along its outermost dim states do; inside, or where
    states would be more bytes, tokens are switched for the scan and back, as grid_scan chooses.
    """

    order: tuple[int, ...]
    heads: int
    key_dim: int
    value_dim: int
    transition: str = "diagonal"
    reverse: bool = False
    both: bool = False
    inputs: tuple[TokenInput, ...] = ()
    shared: int = 0
    itemsize: int | None = None

    def __post_init__(self) -> None:
        at_least("order", self.order, 0)
        if not self.order or len(set(self.order)) != len(self.order):
            raise ShapeError("order names each scanned dim once", f"got {self.order}")
        for name in ("heads", "key_dim", "value_dim"):
            at_least(name, getattr(self, name), 1)

    @classmethod
    def selective(
        cls, order: tuple[int, ...], channels: int, states: int, *, itemsize: int = 4,
        both: bool = False, shared: int = 0,
    ) -> Scan:  # fmt: skip
        """Of `xdist.selective_scan` over u, delta [.., channels] and B, C [.., states]."""
        wide = TokenInput(channels, 1, itemsize)
        narrow = TokenInput(1, states, itemsize)
        # What travels of a transition is the sum of delta: one number a channel.
        return cls(
            order, channels, states, 1, "scalar", both=both, shared=shared, itemsize=itemsize,
            inputs=(wide, wide, narrow, narrow),
        )  # fmt: skip

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
        """The one way that grid_scan takes."""
        return (_option(self, spot),)

    def problem(self, spot: Spot) -> GridScanProblem:
        """The call as grid_scan sees it."""
        itemsize = spot.itemsize if self.itemsize is None else self.itemsize
        own = self.inputs or self._plain(itemsize)
        directions = (False, True) if self.both else (self.reverse,)
        calls = tuple(
            Problem(
                spot.layout, Documents.of(None, spot.sizes[spot.dim]), spot.batch, self.heads,
                self.key_dim, self.value_dim, self.value_dim, self.transition, itemsize, own,
                reverse=reverse,
            )
            for reverse in directions
        )  # fmt: skip
        moved = own[: self.shared] + len(directions) * own[self.shared :]
        return GridScanProblem(spot.sizes, spot.dim, spot.degree, self.order, calls, moved)

    def _plain(self, itemsize: int) -> tuple[TokenInput, ...]:
        keys = TokenInput(self.heads, self.key_dim, itemsize)
        found = [keys, keys, TokenInput(self.heads, self.value_dim, itemsize)]
        decay = transition_elements(self.transition, self.key_dim)
        if decay:
            found.append(TokenInput(self.heads, decay, sum_itemsize(itemsize)))
        return tuple(found)


@lru_cache(maxsize=256)
def _option(scan: Scan, spot: Spot) -> Option:
    if spot.degree == 1 or spot.dim not in scan.order:
        return Option("", spot.nothing())
    problem = scan.problem(spot)
    route = choose_route(problem)
    moved = tuple(
        Passes(*(grid_scan_bytes(problem, rank, backward=b) for b in (False, True)))
        for rank in range(spot.degree)
    )
    name = {"switch": "over heads"}.get(route.strategy, route.strategy)
    if route.dim != spot.dim:
        name = f"{name} along dim {route.dim}"
    return Option(name, moved)
