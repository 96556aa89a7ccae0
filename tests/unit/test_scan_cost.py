"""The scan move in integers: bytes and hops of its algorithms, no circular waits, the choice."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdist.cost import moves
from xdist.cost import scan as cost
from xdist.documents import Documents
from xdist.errors import StrategyError
from xdist.layout import Layout
from xdist.testing import layouts

STATE = (2, 3, 4, 8)  # [batch, heads, K, V]
STATE_BYTES = 2 * 3 * 4 * 8 * 4


def _bytes(layout: Layout, rank: int, algorithm: str, *, backward: bool = False) -> moves.Moved:
    n = layout.length
    return cost.scan_bytes(
        layout, (0, n), rank, STATE, "matrix", 4, algorithm=algorithm, backward=backward
    )


@pytest.mark.parametrize("algorithm", cost.ALGORITHMS)
def test_bytes_do_not_grow_with_the_sequence(algorithm: str) -> None:
    for backward in (False, True):
        short, long = (
            [_bytes(Layout.zigzag(n, 4), r, algorithm, backward=backward) for r in range(4)]
            for n in (64, 64_000_000)
        )
        assert short == long


@pytest.mark.parametrize("algorithm", ["chain", "pipelined"])
def test_a_chain_carries_one_state_a_hop_whatever_the_number_of_ranks(algorithm: str) -> None:
    """K x V elements in and out of a rank, no transition, for 3 ranks and for 64; gather grows."""
    for parts in (3, 8, 64):
        layout = Layout.contiguous(640, parts)
        for rank in range(parts):
            there = _bytes(layout, rank, algorithm)
            assert there == (STATE_BYTES * (rank + 1 < parts), STATE_BYTES * (rank > 0))
            assert _bytes(layout, rank, algorithm, backward=True) == there.back()
    last = [_bytes(Layout.contiguous(640, p), p - 1, "gather").received_bytes for p in (3, 8, 64)]
    assert last == sorted(set(last))


def test_hops() -> None:
    for parts in (1, 2, 5):
        line, bent = Layout.contiguous(60, parts), Layout.zigzag(60, parts)
        for backward in (False, True):
            count = [
                cost.hops(line, (0, 60), name, blocks=blocks, backward=backward)
                for name, blocks in (("gather", 1), ("chain", 1), ("pipelined", 4))
            ]
            assert count == [int(parts > 1), parts - 1, parts + 2 if parts > 1 else 0]
            # There and back; the two segments in the middle lie on one rank.
            assert cost.hops(bent, (0, 60), "chain", backward=backward) == 2 * (parts - 1)
    # A document's start breaks the chain: every rank sends at once, and nobody waits for two.
    line = Layout.contiguous(60, 5)
    cuts = (0, 6, 18, 30, 42, 54, 60)
    assert cost.hops(line, cuts, "chain") == 1
    assert cost.hops(line, tuple(range(61)), "chain") == 0


def _drawn(n: int, parts: int, seed: int) -> list[tuple[Layout, tuple[int, ...]]]:
    cuts = [(0, n), (0, n // 3, n // 3, n // 2, n), (0, *range(1, n, 4), n)]
    return list(product(layouts(n, parts, seed=seed).values(), cuts))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 1000), st.integers(1, 9))
def test_the_schedule_is_the_formula(n: int, parts: int, seed: int, blocks: int) -> None:
    """Parcels of every rank add up to `scan_bytes`; what is sent is received."""
    columns = cost.block_sizes(STATE[3], blocks)
    each = STATE_BYTES // STATE[3]
    for (layout, cuts), backward in product(_drawn(n, parts, seed), (False, True)):
        for algorithm in cost.ALGORITHMS:
            count = len(columns) if algorithm == "pipelined" else 1
            widths = columns if algorithm == "pipelined" else [STATE[3]]
            sent, received = [0] * parts, [0] * parts
            for parcel in cost.schedule(
                layout, cuts, algorithm, blocks=count, transitions=True, backward=backward
            ):
                assert parcel.sender != parcel.receiver
                size = 2 * 3 * 16 * 4 if parcel.is_transition else each * widths[parcel.block]
                sent[parcel.sender] += size
                received[parcel.receiver] += size
            for rank in range(parts):
                formula = cost.scan_bytes(
                    layout, cuts, rank, STATE, "matrix", 4, algorithm=algorithm, backward=backward
                )
                assert formula == (sent[rank], received[rank])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 40), st.integers(1, 6), st.integers(0, 1000), st.integers(1, 5))
def test_ranks_never_wait_in_a_circle(n: int, parts: int, seed: int, blocks: int) -> None:
    """Messages that go one at a time, each only when both ends are at it (as with NCCL), end; also
    those of two directions in one exchange."""
    for layout, cuts in _drawn(n, parts, seed):
        mirror = layout.mirrored(), Documents(cuts).mirrored().cu_seqlens
        for backward in (False, True):
            parcels = [
                parcel
                for one, documents in ((layout, cuts), mirror)
                for parcel in cost.schedule(
                    one, documents, "pipelined", blocks=blocks, backward=backward
                )
            ]
            messages = {(p.round, p.sender, p.receiver) for p in parcels}
            queues = [
                sorted({m[0] for m in messages if rank in m[1:]}, reverse=True)
                for rank in range(parts)
            ]
            while messages:
                ready = {
                    m
                    for m in messages
                    if all(queues[end] and queues[end][-1] == m[0] for end in m[1:])
                }
                assert ready, "every rank waits"
                messages -= ready
                for rank, queue in enumerate(queues):
                    if queue and not any(m[0] == queue[-1] and rank in m[1:] for m in messages):
                        queue.pop()


def _walked(
    layout: Layout, cuts: tuple[int, ...], shape: tuple[int, ...], kind: str, name: str, blocks: int
) -> int:
    """The cost by its definition, round by round over the parcels of the schedule."""
    extra = {"scalar": 1, "diagonal": shape[-2], "matrix": shape[-2] ** 2}.get(kind, 0)
    lead = shape[0] * shape[1] * 4
    total = 0
    for backward in (False, True):
        busy: dict[int, dict[tuple[str, int], int]] = {}
        for p in cost.schedule(
            layout, cuts, name, blocks=blocks, transitions=extra > 0, backward=backward
        ):
            size = lead * (extra if p.is_transition else shape[-2] * -(-shape[-1] // blocks))
            ends = busy.setdefault(p.round, {})
            for end in (("sends", p.sender), ("receives", p.receiver)):
                ends[end] = ends.get(end, 0) + size
        total += sum(cost.HOP_BYTES + max(ends.values()) for ends in busy.values())
    return total


def test_auto_is_the_argmin() -> None:
    """Over shapes and degrees: bytes on the critical path, and HOP_BYTES a hop, recomputed here."""
    seen = set()
    shapes = [(1, 1, 4, 4), (1, 8, 64, 64), (1, 32, 128, 128), (2, 2048, 16, 1), (1, 4, 256, 2)]
    for parts, shape, kind in product((1, 2, 3, 8), shapes, moves.TRANSITIONS):
        for layout in (Layout.contiguous(4096, parts), Layout.zigzag(4096, parts)):
            for cuts in ((0, 4096), (0, 1000, 1003, 2048, 4096)):
                columns = shape[-1]
                tried = [("gather", 1), ("chain", 1)]
                if kind != "logsumexp" and columns > 1:
                    powers = [b for b in (2, 4, 8, 16, 32, 64, 128) if b < columns]
                    tried += [("pipelined", b) for b in [*powers, columns]]
                costs = [_walked(layout, cuts, shape, kind, name, b) for name, b in tried]
                wanted = tried[costs.index(min(costs))]
                found = cost.choose_algorithm(layout, cuts, shape, kind, 4)
                assert (found.algorithm, found.blocks) == wanted
                assert found.costs[found.algorithm] == min(costs)
                assert str(found.costs["gather"]) in str(found)
                seen.add(found.algorithm)
    assert seen == set(cost.ALGORITHMS)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(StrategyError, match="exponent"):
        cost.check_algorithm("pipelined", "logsumexp")
    with pytest.raises(StrategyError, match="'gather', 'chain', 'pipelined', 'auto'"):
        cost.check_algorithm("tree", "scalar")


def test_mirrored_layouts_and_documents() -> None:
    layout = Layout.from_segments(10, [[(6, 10), (0, 2)], [], [(2, 6)]])
    assert layout.mirrored().segments(0) == [(0, 4), (8, 10)]
    assert layout.mirrored().segments(2) == [(4, 8)]
    assert layout.mirrored().mirrored() == layout
    documents = Documents((0, 3, 3, 10))
    assert documents.mirrored() == Documents((0, 7, 7, 10))
    assert documents.mirrored().mirrored() == documents
