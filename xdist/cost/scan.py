"""The scan move in integers: who sends what in which round, its bytes, its hops, and the choice.

    gather     one round: every summary to the ranks that need it, folded there
    chain      round by round from segment to segment in position order, each state once a hop
    pipelined  the chain cut into `blocks` blocks of value columns: block b a round behind block b-1

A parcel is sent in the first round in which all it needs has arrived, so the rounds of a schedule
are the hops of its critical path. No torch, no process group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from xdist.cost import moves
from xdist.cost.moves import Moved, ScanRoute, scan_routes
from xdist.errors import StrategyError
from xdist.layout import Layout, even_sizes

# The order decides ties: fewest hops first.
ALGORITHMS = ("gather", "chain", "pipelined")

# What a link carries in the time that one message takes to begin: about 10 us at 25 GB/s.
HOP_BYTES = 256 * 1024


class Parcel(NamedTuple):
    """What the segment at `place` in position order gives to one rank, in round `round`.

    Its transition, or a state: its summary (gather), or block `block` of the state behind it.
    """

    round: int
    place: int
    block: int
    is_transition: bool
    sender: int
    receiver: int


@lru_cache(maxsize=64)
def routes_of(layout: Layout, cu_seqlens: tuple[int, ...]) -> tuple[ScanRoute, ...]:
    """`scan_routes`, found once for all layers and steps."""
    return tuple(scan_routes(layout, cu_seqlens))


@lru_cache(maxsize=256)
def schedule(
    layout: Layout,
    cu_seqlens: tuple[int, ...],
    algorithm: str,
    *,
    blocks: int = 1,
    transitions: bool = False,
    backward: bool = False,
    rank: int | None = None,
) -> tuple[Parcel, ...]:
    """The parcels of one exchange, in one order for everyone.

    `transitions`: whether segments have transitions (they travel forward, by gather alone).
    `rank`: only those that it sends or receives.
    """
    routes = routes_of(layout, cu_seqlens)
    if algorithm == "gather":
        found = _gathered(routes, transitions and not backward, backward)
    else:
        found = (
            Parcel(turn + block, place, block, False, sender, receiver)
            for turn, place, sender, receiver in _links(routes, backward)
            for block in range(blocks)
        )
    return tuple(sorted(p for p in found if rank is None or rank in (p.sender, p.receiver)))


def _gathered(routes: Sequence[ScanRoute], transitions: bool, backward: bool) -> Iterator[Parcel]:
    for place, route in enumerate(routes):
        sender = route.piece.rank
        for user in route.back_users if backward else route.users:
            if user != sender:
                yield Parcel(0, place, 0, False, sender, user)
        for user in route.transition_users if transitions else ():
            if user != sender:
                yield Parcel(0, place, 0, True, sender, user)


def _links(routes: Sequence[ScanRoute], backward: bool) -> Iterator[tuple[int, int, int, int]]:
    """Round, place, sender and receiver of each state that a chain carries to another rank."""
    step = -1 if backward else 1
    ready = 0  # the round in which the state in front of the next place is known there
    for place in range(len(routes))[::step]:
        route = routes[place]
        ready = ready if route.passes else 0
        if not (route.enters if backward else route.leaves):
            ready = 0
            continue
        sender, receiver = route.piece.rank, routes[place + step].piece.rank
        if sender != receiver:
            yield ready, place, sender, receiver
            ready += 1


def hops(
    layout: Layout,
    cu_seqlens: Sequence[int],
    algorithm: str,
    *,
    blocks: int = 1,
    backward: bool = False,
) -> int:
    """Messages on the critical path of one direction, one after the other."""
    parcels = schedule(layout, tuple(cu_seqlens), algorithm, blocks=blocks, backward=backward)
    return parcels[-1].round + 1 if parcels else 0


def block_sizes(columns: int, blocks: int) -> list[int]:
    """Value columns of each block: the first `columns mod blocks` hold one more."""
    return even_sizes(columns, max(1, min(blocks, columns)))


def scan_bytes(
    layout: Layout,
    cu_seqlens: Sequence[int],
    rank: int,
    state_shape: Sequence[int],
    transition: str,
    itemsize: int,
    *,
    algorithm: str = "gather",
    rates: bool = False,
    backward: bool = False,
) -> Moved:
    """Bytes that `rank` sends and receives in one direction of one scan.

    `state_shape` is `[..., K, V]` of one segment, `itemsize` that of sums; `rates`: transitions
    travel as one number a state. Along a chain each state is sent once to the next segment's rank,
    whatever the number of blocks and ranks, and no transition.
    """
    if algorithm == "gather":
        kind = "scalar" if rates else transition
        return moves.scan_bytes(
            layout, cu_seqlens, rank, state_shape, kind, itemsize, backward=backward
        )
    check_algorithm(algorithm, transition)
    sent = received = 0
    for _, _, sender, receiver in _links(routes_of(layout, tuple(cu_seqlens)), backward):
        sent += sender == rank
        received += receiver == rank
    state = prod(state_shape) * itemsize
    return Moved(sent * state, received * state)


def check_algorithm(algorithm: str, transition: str) -> None:
    """Refuse what cannot be done.

    Raises:
        StrategyError: no such algorithm, or log-sum-exp states cut into columns.
    """
    if algorithm not in (*ALGORITHMS, "auto"):
        raise StrategyError(
            f"a scan has no algorithm {algorithm!r}", "", f"use one of {(*ALGORITHMS, 'auto')}"
        )
    if algorithm == "pipelined" and transition == "logsumexp":
        raise StrategyError(
            "a scan of log-sum-exp states cannot be pipelined over value columns",
            "all columns of a state share its exponent",
            "use 'gather', 'chain' or 'auto'",
        )


@dataclass(frozen=True)
class ScanChoice:
    """What `auto` chose, with the cost in bytes of each algorithm it looked at."""

    algorithm: str
    blocks: int
    costs: dict[str, int]

    def __str__(self) -> str:
        said = ", ".join(f"{name} {cost}" for name, cost in self.costs.items())
        blocks = f" in {self.blocks} blocks" if self.algorithm == "pipelined" else ""
        return (
            f"{self.algorithm}{blocks} (bytes on the critical path and {HOP_BYTES} a hop: {said})"
        )


def scan_cost(
    layout: Layout,
    cu_seqlens: Sequence[int],
    state_shape: Sequence[int],
    transition: str,
    itemsize: int,
    *,
    algorithm: str,
    blocks: int = 1,
    rates: bool = False,
) -> int:
    """The cost that `auto` compares, in bytes: forward and backward, over all rounds,

    HOP_BYTES + the most bytes that one rank sends or receives in the round.
    """
    check_algorithm(algorithm, transition)
    routes = routes_of(layout, tuple(cu_seqlens))
    if algorithm == "gather":
        extra = moves.transition_elements("scalar" if rates else transition, state_shape[-2])
        sizes = prod(state_shape) * itemsize, prod(state_shape[:-2]) * extra * itemsize
        return sum(_gather_cost(routes, layout.parts, *sizes, way) for way in (False, True))
    width = max(block_sizes(state_shape[-1], blocks))
    each = prod(state_shape[:-1]) * width * itemsize
    return sum(
        _chain_cost(list(_links(routes, way)), layout.parts, each, blocks) for way in (False, True)
    )


def _gather_cost(
    routes: Sequence[ScanRoute], parts: int, state: int, extra: int, backward: bool
) -> int:
    sent, received = [0] * parts, [0] * parts
    for parcel in _gathered(routes, extra > 0 and not backward, backward):
        size = extra if parcel.is_transition else state
        sent[parcel.sender] += size
        received[parcel.receiver] += size
    busiest = max(*sent, *received)
    return HOP_BYTES + busiest if busiest else 0


def _chain_cost(links: list[tuple[int, int, int, int]], parts: int, each: int, blocks: int) -> int:
    if not links:
        return 0
    turns = 1 + max(turn for turn, *_ in links)
    counts = np.zeros((2 * parts, turns + 1), dtype=np.int64)
    for turn, _, sender, receiver in links:
        counts[sender, turn + 1] += 1
        counts[parts + receiver, turn + 1] += 1
    before = counts.cumsum(axis=1)
    # In round k the links of rounds k - blocks + 1 to k carry a block each.
    k = np.arange(turns + blocks - 1)
    busy = before[:, np.minimum(k + 1, turns)] - before[:, np.clip(k + 1 - blocks, 0, turns)]
    return len(k) * HOP_BYTES + int(busy.max(axis=0).sum()) * each


@lru_cache(maxsize=256)
def best_blocks(
    layout: Layout, cu_seqlens: tuple[int, ...], state_shape: tuple[int, ...], itemsize: int
) -> int:
    """The number of blocks of the lowest `scan_cost` of a pipelined chain; ties: the fewest."""
    return min(
        block_counts(state_shape[-1]),
        key=lambda count: scan_cost(
            layout,
            cu_seqlens,
            state_shape,
            "none",
            itemsize,
            algorithm="pipelined",
            blocks=count,
        ),
    )


def block_counts(columns: int) -> list[int]:
    """The numbers of blocks looked at: 1 column; else 2, 4, 8, ... below `columns`, and it."""
    powers = [1 << power for power in range(1, columns.bit_length()) if 1 << power < columns]
    return [*powers, max(1, columns)]


@lru_cache(maxsize=256)
def choose_algorithm(
    layout: Layout,
    cu_seqlens: tuple[int, ...],
    state_shape: tuple[int, ...],
    transition: str,
    itemsize: int,
    *,
    rates: bool = False,
) -> ScanChoice:
    """The algorithm of the lowest `scan_cost`; ties: the first of `ALGORITHMS`.

    A pure function of shapes and degrees. Log-sum-exp states and single columns are not cut.
    """
    blocks = {"gather": 1, "chain": 1}
    if transition != "logsumexp" and state_shape[-1] > 1:
        blocks["pipelined"] = best_blocks(layout, cu_seqlens, state_shape, itemsize)
    costs = {
        name: scan_cost(
            layout,
            cu_seqlens,
            state_shape,
            transition,
            itemsize,
            algorithm=name,
            blocks=count,
            rates=rates,
        )
        for name, count in blocks.items()
    }
    best = min(costs, key=lambda name: costs[name])
    return ScanChoice(best, blocks[best], costs)
