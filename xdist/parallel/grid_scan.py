"""Recurrences over a sharded grid: the route, and the scan of rows.

Sharded before and after: one dim of the grid, in `torch.tensor_split`'s runs.
Moves: nothing where the sharded dim is not scanned; states (recurrent_scan.py) where it is the
    outermost dim of the order, both directions in one exchange; else the recurrence's inputs are
    switched to the dim that cost/grid_scan.py chooses, and its outputs back.
Saved for backward: the inputs as they lie in the grid, without permuted copies, and the states
    between tiles of a row; rows are permuted a group at a time.
Must divide: nothing; shares may be uneven or empty.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from xdist.cost import grid_scan as cost
from xdist.cost import recurrent as recurrent_cost
from xdist.cost.scan import check_algorithm, choose_algorithm
from xdist.errors import StrategyError
from xdist.grid_shard import GridShard
from xdist.layout import Layout
from xdist.parallel.grid_row_scan import RowCall, RowPlan, RowScan
from xdist.parallel.grid_rows import Rows
from xdist.parallel.recurrence import state_dtype
from xdist.parallel.recurrent import ALGORITHMS, STRATEGIES, Request, problem_of, run_together
from xdist.shard import DerivedShard, SequenceShard

_log = logging.getLogger("xdist")


def run_grid(
    requests: Sequence[Request],
    gshard: GridShard,
    order: tuple[int, ...],
    *,
    strategy: str = "auto",
    algorithm: str = "auto",
) -> list[Tensor]:
    """Recurrences over the grid, in one exchange: requests whose inputs with tokens are
    [B, n, heads, ...], this rank's part with its grid dims flattened; outputs likewise.

    Raises:
        StrategyError: no such strategy or algorithm.
    """
    _check_strategy(requests, strategy, algorithm)
    problem, tensors, picks = _described(requests, gshard, order, strategy, algorithm)
    route = cost.choose_route(problem)
    _log.debug("grid_scan of %s over %s: %s", requests[0].name, order, route)
    tokens = [i for i in tensors if i not in picks.whole]
    inner = gshard
    if route.dim != gshard.dim:
        grids = [tensors[i].unflatten(1, gshard.local_sizes) for i in tokens]
        moved, inner = gshard.switch_many(grids, route.dim)
        for i, x in zip(tokens, moved, strict=True):
            tensors[i] = x.flatten(1, len(gshard.sizes))
    outs = _scanned(requests, picks, tensors, inner, order, route.strategy, algorithm)
    if inner is not gshard:
        grids, _ = inner.switch_many(
            [out.unflatten(1, inner.local_sizes) for out in outs], gshard.dim
        )
        outs = [out.flatten(1, len(gshard.sizes)) for out in grids]
    results = []
    for request, out in zip(requests, outs, strict=True):
        result = request.finish(out)
        assert isinstance(result, Tensor)
        results.append(result)
    return results


@dataclass(frozen=True)
class _Picks:
    """Where each call's inputs stand among the distinct tensors, and which are whole."""

    places: tuple[tuple[int | None, ...], ...]
    whole: frozenset[int]
    shared: frozenset[int]


def _check_strategy(requests: Sequence[Request], strategy: str, algorithm: str) -> None:
    name = requests[0].name
    if strategy not in STRATEGIES:
        raise StrategyError(f"{name} has no strategy {strategy!r}", "", f"use one of {STRATEGIES}")
    if algorithm not in ALGORITHMS or (strategy == "switch" and algorithm != "auto"):
        raise StrategyError(
            f"{name} has no scan algorithm {algorithm!r} under strategy {strategy!r}",
            "",
            f"use one of {ALGORITHMS} with strategy 'scan', or leave it out",
        )
    for request in requests:
        check_algorithm(algorithm, request.op.transition)


def _described(
    requests: Sequence[Request],
    gshard: GridShard,
    order: tuple[int, ...],
    strategy: str,
    algorithm: str,
) -> tuple[cost.GridScanProblem, dict[int, Tensor], _Picks]:
    """The call in integers, and its distinct tensors by number."""
    tensors: dict[int, Tensor] = {}
    numbers: dict[int, int] = {}
    places, whole, uses = [], set(), dict[int, int]()
    for request in requests:
        own: list[int | None] = []
        for index, x in enumerate(request.inputs):
            if x is None:
                own.append(None)
                continue
            number = numbers.setdefault(id(x), len(numbers))
            tensors[number] = x
            uses[number] = uses.get(number, 0) + 1
            if index in request.op.whole:
                whole.add(number)
            own.append(number)
        places.append(tuple(own))
    # Any layout of the right ranks: the formulas make their own.
    any_shard = DerivedShard(gshard.mesh, gshard.layout)
    problem = cost.GridScanProblem(
        sizes=gshard.sizes,
        dim=gshard.dim,
        ranks=gshard.size,
        order=order,
        calls=tuple(problem_of(request, any_shard, algorithm) for request in requests),
        moved=tuple(
            recurrent_cost.TokenInput(x.shape[2], x.shape[3], x.element_size())
            for number, x in tensors.items()
            if number not in whole
        ),
        strategy="scan" if algorithm != "auto" else strategy,
    )
    shared = frozenset(number for number, count in uses.items() if count > 1)
    return problem, tensors, _Picks(tuple(places), frozenset(whole), shared)


def _scanned(
    requests: Sequence[Request],
    picks: _Picks,
    tensors: dict[int, Tensor],
    gshard: GridShard,
    order: tuple[int, ...],
    strategy: str,
    algorithm: str,
) -> list[Tensor]:
    """The outputs [B, n, H, V] of tensors that lie where they are scanned."""
    like = next(x for number, x in tensors.items() if number not in picks.whole)
    rows = Rows(like.shape[0], gshard.local_sizes, order)
    if strategy == "switch":
        shard = DerivedShard(gshard.mesh, cost.scan_layout(gshard.sizes, order, gshard.size))
        return _over_heads(requests, picks, tensors, rows, shard)
    local = strategy == "local"
    layout = (
        Layout.contiguous(rows.tokens, 1)
        if local
        else cost.scan_layout(gshard.sizes, order, gshard.size)
    )
    calls, algorithms = [], []
    for request, places in zip(requests, picks.places, strict=True):
        given = tuple(None if i is None else tensors[i] for i in places)
        _, heads, key_dim, value_dim = request.op.state_shape(given)
        out = (heads, request.op.value_dim(given), request.op.output_dtype(given))
        calls.append(RowCall(request.op, request.reverse, places, out))
        state = (like.shape[0] * _rows_of(rows), heads, key_dim, value_dim)
        algorithms.append(
            algorithm if local or algorithm != "auto" else _algorithm(request, given, layout, state)
        )
    plan = RowPlan(
        tuple(calls),
        rows,
        layout,
        0 if local else gshard.rank,
        None if local else gshard.group,
        picks.whole,
        picks.shared,
        tuple(algorithms),
    )
    return list(RowScan.apply(plan, *(tensors[number] for number in sorted(tensors))))


def _rows_of(rows: Rows) -> int:
    count = 1
    for size in rows.row_shape[1:]:
        count *= size
    return count


def _algorithm(
    request: Request,
    given: tuple[Tensor | None, ...],
    layout: Layout,
    state: tuple[int, int, int, int],
) -> str:
    """Chosen for the states of all rows: groups of rows travel together."""
    itemsize = state_dtype(given).itemsize
    scanned = layout.mirrored() if request.reverse else layout
    rates = request.op.rates_of(given) is not None
    return choose_algorithm(
        scanned, (0, layout.length), state, request.op.transition, itemsize, rates=rates
    ).algorithm


def _over_heads(
    requests: Sequence[Request],
    picks: _Picks,
    tensors: dict[int, Tensor],
    rows: Rows,
    shard: SequenceShard,
) -> list[Tensor]:
    """Tokens to heads and back, through rows of all tokens: these are copies."""
    taken = {i: x if i in picks.whole else rows.take(x) for i, x in tensors.items()}
    plain = [
        Request(
            request.name,
            request.op,
            tuple(None if i is None else taken[i] for i in places),
            reverse=request.reverse,
        )
        for request, places in zip(requests, picks.places, strict=True)
    ]
    found = run_together(plain, shard, strategy="switch", algorithm="auto")
    return [rows.back(out) for out in found if isinstance(out, Tensor)]
