"""Scans over a grid: where the tokens go before a scan, and the bytes of the whole call. Integers.

The grid [S1..Sk] is sharded along one dim. `order` names the dims that a scan runs over, from the
outermost to the innermost; the other dims are rows of a batch. Rules (s: the sharded dim):

    local   s is no dim of the order               every rank scans whole rows, nothing moves
    scan    s is the outermost dim of the order    states cross ranks (cost/recurrent.py)
    switch  s lies inside the order, or states     the inputs are switched to another dim, scanned
            would be more bytes than tokens        there as above, and the outputs switched back

A switch goes to a row dim with a position for every rank, or to the outermost dim of the order.
The route with the fewest bytes is taken, forward and backward, summed over ranks; ties: staying,
then the outermost dim, then row dims in order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from xdist.cost import recurrent
from xdist.cost.moves import Moved, switch_bytes
from xdist.documents import Documents
from xdist.layout import Layout, even_sizes


@dataclass(frozen=True)
class GridScanProblem:
    """One call of `xdist.grid_scan`: one recurrence, or both directions of one.

    dim: the sharded one. calls: each direction over a sequence; its batch is the tensors' own, its
    layout and documents do not count. moved: the distinct inputs with tokens, of all directions.
    strategy: what was asked for; other than "auto" the scan stays on ranks of the order.
    """

    sizes: tuple[int, ...]
    dim: int
    ranks: int
    order: tuple[int, ...]
    calls: tuple[recurrent.Problem, ...]
    moved: tuple[recurrent.TokenInput, ...]
    strategy: str = "auto"

    @property
    def row_dims(self) -> tuple[int, ...]:
        """The dims that the scan does not run over."""
        return tuple(d for d in range(len(self.sizes)) if d not in self.order)


@dataclass(frozen=True)
class GridRoute:
    """The sharded dim of the scan, what moves there ("local", "scan", or "switch" to heads), and
    the bytes that all ranks send, forward and backward, on each route looked at, by its dim."""

    dim: int
    strategy: str
    total_bytes: dict[int, int]

    def __str__(self) -> str:
        said = ", ".join(f"dim {dim} {count} bytes" for dim, count in self.total_bytes.items())
        return f"{self.strategy} along dim {self.dim} ({said}, forward and backward, all ranks)"


def scan_layout(sizes: tuple[int, ...], order: tuple[int, ...], ranks: int) -> Layout:
    """Tokens in the order of the scan, its outermost dim sharded."""
    inner = prod(sizes[d] for d in order[1:])
    held, start = [], 0
    for share in even_sizes(sizes[order[0]], ranks):
        held.append([(start * inner, (start + share) * inner)])
        start += share
    return Layout.from_segments(start * inner, held)


@lru_cache(maxsize=256)
def scan_calls(problem: GridScanProblem) -> tuple[recurrent.Problem, ...]:
    """The calls as recurrences over a sharded sequence, each row one of its batch."""
    p = problem
    layout = scan_layout(p.sizes, p.order, p.ranks)
    rows = prod(p.sizes[d] for d in p.row_dims)
    whole = Documents.of(None, layout.length)
    return tuple(
        replace(call, layout=layout, documents=whole, batch=call.batch * rows) for call in p.calls
    )


def _candidates(problem: GridScanProblem) -> list[int]:
    p = problem
    if p.ranks == 1 or p.dim not in p.order:
        return [p.dim]
    if p.strategy != "auto":
        return [p.order[0]]
    return [p.order[0], *(d for d in p.row_dims if p.sizes[d] >= p.ranks)]


def _strategy_along(problem: GridScanProblem, dim: int) -> str:
    if problem.ranks == 1 or dim not in problem.order:
        return "local"
    if problem.strategy != "auto":
        return problem.strategy
    return recurrent.choose(*scan_calls(problem)).strategy


def _switches(problem: GridScanProblem, dim: int, rank: int, *, backward: bool) -> Moved:
    """The inputs to `dim` and the outputs back, or in backward the outputs' gradients to `dim` and
    the inputs' back."""
    p = problem
    if dim == p.dim:
        return Moved()
    here, there = even_sizes(p.sizes[p.dim], p.ranks), even_sizes(p.sizes[dim], p.ranks)
    other = p.calls[0].batch * prod(s for d, s in enumerate(p.sizes) if d not in (p.dim, dim))
    # Elements have one byte here: tensors of several dtypes travel.
    inputs = sum(x.heads * x.head_elements * x.element_bytes for x in p.moved) * other
    outputs = sum(c.heads * c.out_dim * c.element_bytes for c in p.calls) * other
    first, last = (outputs, inputs) if backward else (inputs, outputs)
    there_and = switch_bytes(here, there, rank, first, 1)
    return there_and + switch_bytes(there, here, rank, last, 1)


def _bytes_along(problem: GridScanProblem, dim: int, rank: int, *, backward: bool) -> Moved:
    strategy = _strategy_along(problem, dim)
    total = _switches(problem, dim, rank, backward=backward)
    if strategy == "local":
        return total
    for call in scan_calls(problem):
        total += recurrent.recurrent_bytes(call, strategy, rank, backward=backward)
    return total


@lru_cache(maxsize=256)
def choose_route(problem: GridScanProblem) -> GridRoute:
    """The route of the fewest bytes: a pure function of sizes and shapes."""
    totals = {
        dim: sum(
            _bytes_along(problem, dim, rank, backward=backward).sent_bytes
            for rank in range(problem.ranks)
            for backward in (False, True)
        )
        for dim in _candidates(problem)
    }
    dim = min(totals, key=lambda one: totals[one])
    return GridRoute(dim, _strategy_along(problem, dim), totals)


def grid_scan_bytes(problem: GridScanProblem, rank: int, *, backward: bool) -> Moved:
    """Bytes that sequence rank `rank` sends and receives in one direction of one call."""
    return _bytes_along(problem, choose_route(problem).dim, rank, backward=backward)


def scan_home(sizes: tuple[int, ...], dim: int, ranks: int, order: tuple[int, ...]) -> int:
    """The dim along which a layer that scans in `order` is sharded, for tokens sharded along `dim`.

    Where the scan can run as the tokens lie, `dim`. A layer switches its tokens once, before its
    recurrence's inputs are made of them, so any target is the same bytes: a row dim with a position
    for every rank, where nothing more moves (the longest, then the first), else the outermost.
    """
    if ranks == 1 or dim not in order or dim == order[0]:
        return dim
    rows = [d for d in range(len(sizes)) if d not in order and sizes[d] >= ranks]
    return max(rows, key=lambda d: (sizes[d], -d)) if rows else order[0]


def spread_windows(fine: int, stride: int, ranks: int) -> list[tuple[int, int]]:
    """Of a grid `stride` times as coarse, the positions that each rank's fine positions lie in."""
    found, start = [], 0
    for share in even_sizes(fine, ranks):
        stop = start + share
        found.append((start // stride, -(-stop // stride)) if share else (0, 0))
        start = stop
    return found
