"""How many messages attention sends, counted by a dispatch mode over c10d: q, k and v go in one,
and who sees nothing of a rank's keys gets none."""

from __future__ import annotations

from dataclasses import replace

import torch

import xdist
from tests.multirank.attention_cases import Case, segments, shards, visible
from xdist.layout import Layout
from xdist.mask import Mask
from xdist.testing import RankPool, count_c10d_bytes

N, PARTS = 24, 4
Counts = tuple[int, int, int, int, int, int]


def counted(cases: list[Case]) -> list[Counts]:
    """Of each case on this rank, forward then backward: messages sent, received, exchanges."""
    found = []
    for case in cases:
        shard, _ = shards(case)
        shapes = (case.heads, case.dim), (case.groups, case.dim), (case.groups, case.value_dim)
        q, k, v = (torch.ones(1, shard.local_length, *s, requires_grad=True) for s in shapes)
        with count_c10d_bytes() as forward, xdist.comm.ledger() as went:
            out = xdist.attention(
                q, k, v, shard,
                mask=case.mask, strategy=case.strategy, head_chunks=case.head_chunks,
            )  # fmt: skip
        with count_c10d_bytes() as backward, xdist.comm.ledger() as came:
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        found.append(
            (
                forward.ops.get("send", 0), forward.ops.get("recv_", 0), went.calls,
                backward.ops.get("send", 0), backward.ops.get("recv_", 0), came.calls,
            )
        )  # fmt: skip
    return found


def seen_by(case: Case) -> list[list[bool]]:
    """Whether a query of rank r sees a key of rank s, `[r][s]`, from the dense mask."""
    seen = visible(case).any(0)
    at = [torch.from_numpy(case.q_layout.positions(rank)) for rank in range(PARTS)]
    return [[bool(seen[q][:, k].any()) for k in at] for q in at]


def test_q_k_and_v_go_in_one_message_and_the_output_in_one(pool4: RankPool) -> None:
    """Ulysses: two exchanges forward and two back, each one message to every other rank, whatever
    the heads; in two runs of heads twice as many."""
    layout = segments(Layout.zigzag(N, PARTS))
    cases = [Case("ulysses", layout, Mask(), N, *heads) for heads in ((8, 8), (8, 2), (7, 1))]
    cases.append(replace(cases[0], head_chunks=2))
    for answer in pool4.run(counted, cases):
        for case, counts in zip(cases, answer, strict=True):
            exchanges = 2 * case.head_chunks
            messages = exchanges * (PARTS - 1)
            assert counts == (messages, messages, exchanges) * 2, case


def test_only_ranks_that_see_a_key_are_sent_it(pool4: RankPool) -> None:
    """Ring, halo and gather: one message from each rank to each that sees some of its keys (gather:
    to every other), and one back with the gradients; a ring's backward sends keys again."""
    masks = (Mask(window=3), Mask(causal=False, window=(8, 2)), Mask(chunk=9))
    cases = [
        Case(strategy, segments(make(N, PARTS)), mask, N)
        for strategy in ("ring", "halo", "gather")
        for mask in masks
        for make in (Layout.contiguous, Layout.zigzag)
    ]
    plain = Case("ring", segments(Layout.contiguous(N, PARTS)), Mask(), N)
    cases += [plain, replace(plain, mask=Mask(chunk=6), strategy="halo")]
    answers = pool4.run(counted, cases)
    for number, case in enumerate(cases):
        met = seen_by(case)
        for rank, answer in enumerate(answers):
            others = [r for r in range(PARTS) if r != rank]
            users = sum(met[r][rank] for r in others)
            owners = sum(met[rank][r] for r in others)
            if case.strategy == "gather":
                users = owners = PARTS - 1
            sent, received, _, back_sent, back_received, _ = answer[number]
            again = (users, owners) if case.strategy == "ring" else (0, 0)
            assert (sent, received) == (users, owners), case
            assert (back_sent, back_received) == (owners + again[0], users + again[1]), case
    # Of the last case chunks end with the shares: no query sees a key of another rank.
    assert not any(any(row[:r] + row[r + 1 :]) for r, row in enumerate(seen_by(cases[-1])))
