"""Strategies are what they say: bytes, memory, leaks, refusals."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

import xdist
from tests.multirank.attention_cases import (
    Case,
    call,
    draw,
    mesh_of,
    segments,
    shards,
    visible,
)
from tests.multirank.attention_peaks import PeakBytes
from tests.multirank.test_attention import FINITE, MASKS, cross_grid, strategies
from xdist.cost.attention import attention_cost
from xdist.errors import MaskError, NumericsError, ShapeError, StrategyError
from xdist.mask import Mask
from xdist.parallel.attention import explain, problem_of
from xdist.testing import RankPool, count_c10d_bytes, layouts
from xdist_kernels.attention import blockwise, window

Bytes = tuple[int, int, int, int]


def counted(case: Case) -> tuple[list[Bytes], dict[str, int]]:
    """(forward sent, received, backward sent, received): ledger, dispatch mode, formula."""
    shard, key_shard = shards(case)
    with xdist.comm.ledger() as forward, count_c10d_bytes() as forward_seen:
        out, leaves, dout = call(case)
    with xdist.comm.ledger() as backward, count_c10d_bytes() as backward_seen:
        torch.autograd.grad(out, list(leaves.values()), dout)
    problem = problem_of(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        shard,
        mask=case.mask,
        sinks=leaves.get("sinks"),
        key_shard=key_shard,
    )
    cost = attention_cost(problem, case.strategy, shard.rank)
    ledger = [(w.sent_bytes, w.received_bytes) for w in (forward, backward)]
    seen = [(w.sent_bytes, w.received_bytes) for w in (forward_seen, backward_seen)]
    formula = (
        cost.forward_sent_bytes,
        cost.forward_received_bytes,
        cost.backward_sent_bytes,
        cost.backward_received_bytes,
    )
    # Making the shards compares fingerprints: control bytes, in the dispatch mode's count alone.
    control = forward.control_bytes
    assert forward.control_bytes or len(case.layout) == 1
    seen[0] = (seen[0][0] - control, seen[0][1] - control)
    by_move = {name: t.sent_bytes for name, t in forward.by_move.items()}
    return [(*ledger[0], *ledger[1]), (*seen[0], *seen[1]), formula], by_move


def count_cases(cases: list[Case]) -> list[tuple[list[Bytes], dict[str, int]]]:
    return [counted(case) for case in cases]


KINDS = ("drawn", "zigzag", "empty", "uneven", "contiguous")


def byte_cases(parts: int) -> list[Case]:
    cases = []
    for i, (name, mask) in enumerate(MASKS.items()):
        dtype = torch.float64 if i % 3 == 0 else torch.bfloat16
        layout = segments(layouts(24, parts, seed=i)[KINDS[i % 5]])
        docs = (0, 5, 5, 16, 24) if i % 2 else None
        heads = (4, 1) if name == "per_head" else (7, 7) if i % 2 else (6, 2)
        cases += [Case(s, layout, mask, 24, *heads, docs, dtype) for s in strategies(name)]
    return [*cases, *cross_grid(parts)[::5]]


def test_ledger_formula_and_dispatch_mode_count_the_same_bytes(
    pool2: RankPool, pool4: RankPool
) -> None:
    for parts, pool in ((2, pool2), (4, pool4)):
        cases = byte_cases(parts)[:: parts // 2]
        answers = pool.run(count_cases, cases)
        for number, case in enumerate(cases):
            ranks = [answer[number][0] for answer in answers]
            for ledger, seen, formula in ranks:
                assert ledger == formula, case
                assert seen == formula, case
            # Summed over ranks what is sent is received.
            assert sum(r[0][0] for r in ranks) == sum(r[0][1] for r in ranks)
            assert sum(r[0][2] for r in ranks) == sum(r[0][3] for r in ranks)
            moves = {m for answer in answers for m in answer[number][1]}
            assert moves <= {"switch" if case.strategy == "ulysses" else case.strategy}


def test_only_keys_that_are_seen_travel(pool2: RankPool) -> None:
    """Ring and halo receive exactly the keys of the other rank that some query here sees."""
    for name, strategy in product(MASKS, ("ring", "halo")):
        if strategy == "halo" and name not in FINITE:
            continue
        case = Case(strategy, segments(layouts(24, 2, seed=4)["drawn"]), MASKS[name], 24)
        seen = visible(case).any(0)
        for rank, (counts, _) in enumerate(pool2.run(counted, case)):
            own, other = (case.q_layout.positions(r) for r in (rank, 1 - rank))
            tokens = int(seen[own][:, other].any(0).sum())
            assert counts[0][1] == tokens * case.batch * case.groups * (4 + 3) * 8, case


def leak(cases: list[Case]) -> list[list[torch.Tensor]]:
    """Per case: out with the inputs as drawn, then with one key and value changed after another."""
    found = []
    for case in cases:
        shard, key_shard = shards(case)
        at = torch.from_numpy(case.q_layout.positions(shard.rank))
        outs = []
        for token in (None, 0, 7, 13, case.n - 1):
            whole = draw(case)
            if token is not None:
                whole["k"][:, token] += 1.0
                whole["v"][:, token] -= 5.0
            q, k, v = (whole[name][:, at] for name in ("q", "k", "v"))
            outs.append(
                xdist.attention(
                    q, k, v, shard, mask=case.mask, strategy=case.strategy, key_shard=key_shard
                )
            )
        found.append(outs)
    return found


def test_a_token_changes_the_queries_that_see_it_and_no_other(pool2: RankPool) -> None:
    """The leak test, per mask and strategy, with packed documents: bit for bit."""
    cases = []
    for number, (name, mask) in enumerate(MASKS.items()):
        layout = segments(list(layouts(24, 2, seed=6).values())[number % 3])
        docs = (0, 6, 10, 24)
        cases += [Case(s, layout, mask, 24, documents=docs) for s in strategies(name)]
    answers = pool2.run(leak, cases)
    for number, case in enumerate(cases):
        seen = visible(case)
        for rank in range(2):
            own = torch.from_numpy(case.q_layout.positions(rank))
            plain, *others = answers[rank][number]
            for token, out in zip((0, 7, 13, 23), others, strict=True):
                changed = (out != plain).any(-1).any(0)  # [n, H]
                assert torch.equal(changed, seen[:, own, token].T), (token, case)


TOKENS = 1024  # a rank
BLOCK_BYTES = TOKENS * 2 * 64 * 4  # keys and values of one share


def peaks(case: Case) -> tuple[int, int]:
    """Peak bytes of forward and of backward, beyond inputs; zeros on a rank without a part."""
    if mesh_of(len(case.layout)) is None:
        return 0, 0
    call(replace(case, n=24, layout=segments(xdist.Layout.contiguous(24, len(case.layout)))))
    shard, _ = shards(case)
    whole = torch.randn(1, shard.local_length, 1, case.dim)
    q, k, v = (whole.clone().requires_grad_() for _ in range(3))
    sizes = blockwise._KEY_TOKENS, blockwise._BLOCK_SCORES, window._RUN_SCORES
    blockwise._KEY_TOKENS, blockwise._BLOCK_SCORES = 64, 64 * 64  # so that keys are what weighs
    window._RUN_SCORES = 64 * 64
    try:
        with PeakBytes() as forward:
            out = xdist.attention(q, k, v, shard, mask=case.mask, strategy=case.strategy)
        with PeakBytes() as backward:
            torch.autograd.grad(out, (q, k, v), whole)
    finally:
        blockwise._KEY_TOKENS, blockwise._BLOCK_SCORES, window._RUN_SCORES = sizes
    return forward.peak_bytes, backward.peak_bytes


def peak_case(strategy: str, parts: int, n: int = TOKENS) -> Case:
    mask = Mask(window=64) if strategy == "halo" else Mask(causal=False, chunk=64 * parts)
    # Rank r holds every P-th run of 64 tokens: every query sees keys of all ranks, few of each.
    runs = [[(s, s + 64) for s in range(64 * r, n * parts, 64 * parts)] for r in range(parts)]
    layout = tuple(tuple(r) for r in runs)
    if strategy == "halo":
        layout = segments(xdist.Layout.contiguous(n * parts, parts))
    return Case(strategy, layout, mask, n * parts, 1, 1, None, torch.float32, batch=1, dim=64)


def blocks_held(pool: RankPool, strategy: str, parts: int = 0) -> list[float]:
    """Peak of the busiest of `parts` ranks (0: all), forward and backward, in keys and values of
    one share."""
    answers = pool.run(peaks, peak_case(strategy, parts or pool.world_size))
    return [max(answer[i] for answer in answers) / BLOCK_BYTES for i in (0, 1)]


def test_ring_and_halo_never_hold_the_whole_sequence(pool3: RankPool, pool4: RankPool) -> None:
    """With the same share a rank, one rank more costs ring and halo no more memory."""
    ring = [blocks_held(pool, "ring") for pool in (pool3, pool4)]
    assert ring[1][0] <= ring[0][0] + 0.1, ring
    # A step in full swing: two blocks, one gradient worked on, one sent, one received, one block
    # as sent, and this rank's own gradients.
    assert ring[1][1] <= 9, ring
    halo = [blocks_held(pool, "halo") for pool in (pool3, pool4)]
    assert halo[1][0] <= halo[0][0] + 0.1, halo
    assert halo[1][1] <= halo[0][1] + 0.1, halo
    assert halo[1][0] <= 1.8, halo  # output and its merging; 64 tokens of others, not a share


def test_gather_holds_what_it_received_and_no_more(pool3: RankPool, pool4: RankPool) -> None:
    """In shares. Forward: what came, once as it came and once joined, and the output. Backward,
    beyond that what came is freed: its gradients as computed, as sent, those of the rank's own keys
    from every other."""
    for pool in (pool3, pool4):
        others = pool.world_size - 1
        forward, backward = blocks_held(pool, "gather")
        assert 2 * others <= forward <= 2 * others + 0.8, forward
        assert backward <= 2 * others + 0.8, backward


@pytest.mark.slow
def test_a_longer_ring_holds_no_more(pool8: RankPool) -> None:
    five, six = (blocks_held(pool8, "ring", parts) for parts in (5, 6))
    assert six[0] <= five[0] + 0.1
    assert six[1] <= five[1] + 0.1
    assert six[1] <= 9


def test_halo_with_unlimited_reach_and_unknown_strategies_raise() -> None:
    q = torch.randn(1, 8, 2, 4)
    with pytest.raises(StrategyError, match="unlimited to the left"):
        xdist.attention(q, q, q, mask=Mask(), strategy="halo")
    with pytest.raises(StrategyError, match="unlimited to the right"):
        xdist.attention(q, q, q, mask=Mask(causal=False, window=(3, None)), strategy="halo")
    with pytest.raises(StrategyError, match="auto, ulysses, halo, ring, gather, 2d"):
        xdist.attention(q, q, q, mask=Mask(), strategy="3d")
    chunked = Mask(causal=False, chunk=4)
    with pytest.raises(StrategyError, match="share the queries' positions"):
        xdist.attention(q, q, q, mask=chunked, strategy="halo", key_shard="replicated")


def refused(case: Case) -> tuple[str, int]:
    """What a forced strategy that cannot serve raises on this rank, and the bytes sent by then."""
    shards(case)
    with xdist.comm.ledger() as moved:
        try:
            call(case)
        except StrategyError as error:
            return str(error), moved.sent_bytes
    return "", moved.sent_bytes


def test_all_ranks_refuse_before_anything_is_sent(pool2: RankPool) -> None:
    case = Case("halo", segments(xdist.Layout.contiguous(8, 2)), Mask(), 8)
    first, second = pool2.run(refused, case)
    assert first == second
    assert "unlimited to the left" in first[0]
    assert first[1] == 0


def test_shapes_and_masks_that_do_not_fit_raise_with_the_numbers() -> None:
    q, k = torch.randn(1, 8, 4, 6), torch.randn(1, 8, 3, 6)
    with pytest.raises(ShapeError, match="4 query heads, 3 key heads"):
        xdist.attention(q, k, k, mask=Mask())
    with pytest.raises(ShapeError, match="do not fit together"):
        xdist.attention(q, q[..., :3], q, mask=Mask())
    with pytest.raises(ShapeError, match=r"torch\.float32, torch\.float64"):
        xdist.attention(q, q.double(), q.double(), mask=Mask())
    with pytest.raises(ShapeError, match="7 tokens, rank 0 holds 8"):
        xdist.attention(q, q[:, :7], q[:, :7], mask=Mask())
    with pytest.raises(MaskError, match="3 windows for 4 heads"):
        xdist.attention(q, q, q, mask=Mask(window=[1, 2, 3]))
    with pytest.raises(MaskError, match="share the queries' positions"):
        xdist.attention(q, q, q, mask=Mask(), key_shard="replicated")
    with pytest.raises(ShapeError, match="one float per query head"):
        xdist.attention(q, q, q, mask=Mask(), sinks=torch.zeros(3))
    with pytest.raises(ShapeError, match="softcap must be positive"):
        xdist.attention(q, q, q, mask=Mask(), softcap=0.0)
    mesh = xdist.init_mesh()
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(9, 1), [0, 4, 9])
    with pytest.raises(ShapeError, match="8 tokens, the shard gives rank 0 9"):
        xdist.attention(q, q, q, shard, mask=Mask())
    nine, full = torch.randn(1, 9, 2, 4), Mask(causal=False)
    with pytest.raises(MaskError, match="2 query documents, 1 key documents"):
        xdist.attention(nine, nine, nine, shard, mask=full, key_shard="replicated")


def checked(case: Case) -> str:
    shard, _ = shards(case)
    q = torch.randn(1, shard.local_length, 2, 4)
    if shard.rank == 1:
        q[0, 0, 0, 0] = torch.nan
    with xdist.checks():
        try:
            xdist.attention(q, q, q, shard, mask=case.mask)
        except NumericsError as error:
            return str(error)
    return ""


def test_checks_refuse_values_that_are_not_finite_on_all_ranks(pool2: RankPool) -> None:
    case = Case("auto", segments(xdist.Layout.contiguous(8, 2)), Mask(), 8)
    first, second = pool2.run(checked, case)
    assert first == second
    assert "[1]" in first


def test_auto_says_what_it_chose_and_why() -> None:
    q = torch.empty(1, 4096, 8, 64, device="meta")
    kv = torch.empty(1, 4096, 1, 64, device="meta")
    choice = explain(q, kv, kv, mask=Mask())
    assert choice.strategy in choice.busiest
    assert "halo" in choice.unable
    assert f"auto chose {choice.strategy}" in str(choice)
