"""The shortest path over (block, sharded dim), by costs that are compared part by part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from xdist.cost.place_spot import Passes

Edges = list[list[tuple[Passes, ...]]]
"""`[from][to]`: bytes of a switch, by rank."""


class Cost(NamedTuple):
    """What is compared, in this order."""

    idle: int = 0
    busiest: int = 0
    total: int = 0
    switches: int = 0

    def plus(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


def bytes_cost(moved: Sequence[Passes]) -> Cost:
    return Cost(0, max(one.bytes for one in moved), sum(one.sent_bytes for one in moved))


class Path(NamedTuple):
    """dims: the best dim of each block. through: the best cost of all with block i on dim d."""

    dims: list[int]
    through: list[list[Cost | None]]


def shortest(
    own: list[list[Cost | None]], edges: list[Edges], start: int | None, end: int | None
) -> Path:
    """Costs to go, from the last block on; then forward, of equal ones the lowest dim."""
    dims = range(len(own[0]))
    steps = [[[_step(edge[a][b], a, b) for b in dims] for a in dims] for edge in edges]
    enter = [Cost() if start is None else steps[0][start][d] for d in dims]
    leave = [Cost() if end is None else steps[-1][d][end] for d in dims]

    go = [[added(own[-1][d], leave[d]) for d in dims]]
    for i in reversed(range(len(own) - 1)):
        onward = [_least(added(steps[i + 1][d][b], go[0][b]) for b in dims) for d in dims]
        go.insert(0, [added(own[i][d], onward[d]) for d in dims])
    come: list[list[Cost | None]] = [[*enter]]
    for i in range(1, len(own)):
        left = [added(come[-1][a], own[i - 1][a]) for a in dims]
        come.append([_least(added(left[a], steps[i][a][d]) for a in dims) for d in dims])

    path: list[int] = []
    for i in range(len(own)):
        before = enter if i == 0 else steps[i][path[-1]]
        costs = [added(before[d], go[i][d]) for d in dims]
        path.append(costs.index(_least(costs)))
    return Path(path, [[added(come[i][d], go[i][d]) for d in dims] for i in range(len(own))])


def _step(moved: tuple[Passes, ...], source: int, target: int) -> Cost:
    return Cost() if source == target else bytes_cost(moved).plus(Cost(switches=1))


def added(*costs: Cost | None) -> Cost | None:
    """None where one is: it cannot be."""
    total = Cost()
    for cost in costs:
        if cost is None:
            return None
        total = total.plus(cost)
    return total


def _least(costs: Iterable[Cost | None]) -> Cost | None:
    return min((cost for cost in costs if cost is not None), default=None)
