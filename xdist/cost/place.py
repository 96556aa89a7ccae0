"""Which dim of a grid is sharded at each block: a shortest path over (block, sharded dim).

A model is a chain of blocks over a grid; one dim is sharded at a time, and a switch in front of a
block shards another one. A block along whose dims something must be seen whole, or is reached for,
costs bytes - or cannot be - where that dim is sharded. Compared are, one after the other:

    1. idle ranks, added up over the blocks: with no position of the block's grid, or no head
    2. bytes of the busiest rank, added up: of each move what it sends and receives, forward and
       backward; of each block what it holds of the input and its gradient
    3. bytes that all ranks send
    4. switches
    5. dims, block by block: the lower one first

So ranks without tokens are accepted only where nothing else can be; few bytes count before few
switches; what ranks hold is the same wherever shares are even, and decides against uneven ones; and
equal placements are told apart by the lower dim. No torch, no process group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from operator import index
from typing import NamedTuple

from xdist.cost.conv_nd import even_windows
from xdist.cost.place_attention import Condition, Heads, mixed
from xdist.cost.place_block import Block
from xdist.cost.place_path import Cost, Edges, Path, bytes_cost, shortest
from xdist.cost.place_reach import Convolution, Halo, Patches, Unpatches
from xdist.cost.place_result import Placed, Placement
from xdist.cost.place_scan import Scan
from xdist.cost.place_spot import Option, Passes, Reach, Sizes, Spot, at_least, switched
from xdist.cost.place_windows import Neighborhood, Strided, Windows
from xdist.errors import ConfigError, LayoutError, StrategyError

__all__ = [
    "Block",
    "Condition",
    "Convolution",
    "Halo",
    "Heads",
    "Neighborhood",
    "Option",
    "Passes",
    "Patches",
    "Placed",
    "Placement",
    "Reach",
    "Scan",
    "Spot",
    "Strided",
    "Unpatches",
    "Windows",
    "place_switches",
]


def place_switches(
    blocks: Sequence[Block],
    sizes: Sequence[int],
    degree: int,
    *,
    start: int | None = None,
    end: int | None = None,
    batch: int = 1,
) -> Placement:
    """Which dim is sharded at each block, by which strategy, and the bytes that moves.

    Args:
        blocks: the model's blocks in order.
        sizes: the grid in front of the first one.
        degree: ranks that share the grid.
        start: the dim that is sharded when the model is called; None: the best one.
        end: the dim that is sharded when it answers; None: the best one.
        batch: rows of a rank's batch. It scales all bytes and changes no choice.

    A pure function of its arguments; every rank computes the same. See the top of this file for
    what is compared.

    Raises:
        ConfigError: no blocks, a degree or batch below 1.
        LayoutError: sizes below 1, or a dim that the grid does not have.
        ShapeError: a reach that does not fit its grid.
        StrategyError: a block that can stand nowhere.
    """
    given = tuple(blocks)
    if not given:
        raise ConfigError("place_switches needs at least one block", "got none")
    at_least("degree", degree, 1)
    at_least("batch", batch, 1)
    grid = tuple(index(size) for size in sizes)
    if not grid or min(grid) < 1:
        raise LayoutError("a grid needs at least one dim, of at least 1 each", f"got {grid}")
    for name, dim in (("start", start), ("end", end)):
        if dim is not None and not 0 <= dim < len(grid):
            raise LayoutError(f"{name}={dim} is no dim of the grid", f"it has {len(grid)}: {grid}")
    return _place(given, grid, degree, start, end, batch)


class _Here(NamedTuple):
    """A block with one dim sharded: its cost there, and its option for each need."""

    cost: Cost
    chosen: tuple[Option, ...]


Here = list[_Here | None]  # by dim; None where the block cannot stand


@lru_cache(maxsize=64)
def _place(
    blocks: tuple[Block, ...], sizes: Sizes, degree: int, start: int | None, end: int | None,
    batch: int,
) -> Placement:  # fmt: skip
    grids = [sizes]
    for block in blocks:
        grids.append(block.grid(grids[-1]))
    here = [
        _standing(block, grid, behind, degree, batch)
        for block, grid, behind in zip(blocks, grids, grids[1:], strict=False)
    ]
    edges = [
        _switches(grid, degree, batch * block.channels * block.itemsize)
        for block, grid in zip(blocks, grids, strict=False)
    ]
    last = blocks[-1]
    edges.append(_switches(grids[-1], degree, batch * last.behind * last.itemsize))
    costs = [[one and one.cost for one in block] for block in here]
    path = shortest(costs, edges, start, end)
    return _result(blocks, grids, batch, here, edges, path, start, end)


@lru_cache(maxsize=1024)
def _options(block: Block, spot: Spot) -> tuple[tuple[Option, ...], ...]:
    """The ways of each need: of what must be whole, of the condition, of each reach."""
    found = [mixed(block.whole, block.heads, spot)]
    found.append(block.condition.options(spot) if block.condition else ())
    grid = spot.sizes
    for reach in block.reach:
        own = Spot(grid, spot.dim, spot.degree, spot.batch, spot.channels, spot.itemsize)
        found.append(reach.options(own))
        grid = reach.grid(grid)
    return tuple(found)


def _standing(block: Block, sizes: Sizes, behind: Sizes, degree: int, batch: int) -> Here:
    """The block with each dim sharded; None where it cannot be."""
    found: Here = []
    unnamed = replace(block, name="")
    for dim in range(len(sizes)):
        spot = Spot(sizes, dim, degree, batch, block.channels, block.itemsize)
        whole, condition, *reaches = _options(unnamed, spot)
        needs = [whole, *([condition] if block.condition else []), *reaches]
        if not all(needs):
            found.append(None)
            continue
        # Needs do not depend on each other, so each takes its own best way.
        chosen = tuple(min(ways, key=_cost) for ways in needs)
        empty = sum(a == b for a, b in even_windows(behind[dim], degree))
        held = 2 * max(spot.shares) * spot.across * block.channels * block.itemsize
        cost = Cost(idle=empty, busiest=held)
        for option in chosen:
            cost = cost.plus(_cost(option))
        found.append(_Here(cost, chosen))
    if not any(found):
        raise StrategyError(
            f"block {block.name!r} can stand nowhere: no dim can stay sharded",
            f"it needs the dims {block.whole or 'of its reach'} whole of the grid {sizes}",
            "give it heads, so that its attention becomes Ulysses or ring on the flattened tokens",
        )
    return found


def _cost(option: Option) -> Cost:
    return bytes_cost(option.moved).plus(Cost(idle=option.idle))


@lru_cache(maxsize=256)
def _switches(sizes: Sizes, degree: int, size: int) -> Edges:
    """`[from][to]`: bytes of a switch of `size` bytes a position, by rank."""
    dims = range(len(sizes))
    return [[switched(sizes, a, b, degree, size) for b in dims] for a in dims]


def _result(
    blocks: tuple[Block, ...], grids: list[Sizes], batch: int, here: list[Here],
    edges: list[Edges], path: Path, start: int | None, end: int | None,
) -> Placement:  # fmt: skip
    first = path.dims[0] if start is None else start
    last = path.dims[-1] if end is None else end
    placed, came_from = [], first
    for i, (block, dim) in enumerate(zip(blocks, path.dims, strict=True)):
        chosen = here[i][dim]
        assert chosen is not None
        why = _why(block, here[i], path.through[i], dim)
        placed.append(
            Placed(block, grids[i], dim, came_from, edges[i][came_from][dim], chosen.chosen, why)
        )
        came_from = dim
    degree = len(edges[0][0][0])
    back = edges[-1][came_from][last]
    return Placement(grids[0], grids[-1], degree, batch, first, last, tuple(placed), back)


def _why(block: Block, here: Here, through: list[Cost | None], dim: int) -> str:
    """What it needs, and what every other dim would cost the whole model."""
    least = through[dim]
    assert least is not None
    needs = [f"needs {_named(block.whole)} whole"] if block.whole else []
    needs += [str(reach) for reach in block.reach]
    stands = here[dim]
    if stands and stands.cost.idle:
        needs.append(f"{stands.cost.idle} idle rank(s)")
    others = [
        f"dim {other} {'cannot be sharded' if here[other] is None else _more(cost, least)}"
        for other, cost in enumerate(through)
        if other != dim
    ]
    return "; ".join(filter(None, [", ".join(needs), ", ".join(others) or "the only dim"]))


def _named(dims: Sequence[int]) -> str:
    return f"dim {dims[0]}" if len(dims) == 1 else f"dims {', '.join(map(str, dims))}"


def _more(cost: Cost | None, least: Cost) -> str:
    assert cost is not None
    more = Cost(*(a - b for a, b in zip(cost, least, strict=True)))
    if more.idle:
        return f"leaves {more.idle} more ranks idle"
    if more.busiest:
        return f"costs {more.busiest:,} bytes more"
    if more.total:
        return f"moves {more.total:,} bytes more over all ranks"
    return f"needs {more.switches} more switches" if more.switches else "does as well"
