"""A leak test per mask: a token changes the queries that see it, and no other, under any strategy.

Batch row 0 holds the inputs as drawn, each further row changes one token: first every key and its
value in turn (outputs then say who saw it), then every output gradient (gradients of values then
say the same of backward). Who sees whom comes from the words of the design (`attention_dense`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import xdist
from tests.multirank.attention_cases import Case, Segments, draw, segments, shards, visible
from tests.multirank.attention_draws import finite
from xdist.mask import Mask
from xdist.testing import RankPool, layouts

N = 24
DOCUMENTS = (0, 5, 5, 14, 24)
WHOLE = (((0, N),),)  # a layout of one rank; each strategy has its own below
MASKS = {
    "causal": Mask(),
    "bidirectional": Mask(causal=False),
    "window": Mask(window=5),
    "two-sided window": Mask(causal=False, window=(2, 4)),
    "left alone": Mask(causal=False, window=(3, None)),
    "right alone": Mask(causal=False, window=(None, 2)),
    "window wider than a share": Mask(causal=False, window=(9, 11)),
    "window of itself": Mask(window=0),
    "prefix": Mask(prefix=4),
    "prefix and window": Mask(prefix=3, window=2),
    "chunk": Mask(chunk=7),
    "bidirectional chunk": Mask(causal=False, chunk=5),
    "prefix, chunk and window": Mask(prefix=9, chunk=6, window=2),
    "prefix, chunk and two sides": Mask(causal=False, prefix=2, chunk=9, window=(1, 3)),
    "per head": Mask(window=[3, None, (0, 0), 30]),
    "per head, two sides": Mask(causal=False, window=[(2, 1), (None, 0), 4, (0, None)], prefix=2),
}
# Changed by more than rounding; what does change does so by more than 1e-5.
ROUNDING = 1e-11


def strategies(mask: Mask, cross: bool = False) -> list[str]:
    able = ["ulysses", "ring", "gather", "2d"]
    return able if cross or not finite(mask) else [*able, "halo"]


def changed_by_each_token(cases: list[Case]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Per case, bool: out `[M, n, H]` by key, dv and dk `[N, m, G]` and dq `[N, n, H]` by dout."""
    found = []
    for case in cases:
        shard, key_shard = shards(case)
        keys, queries = case.key_tokens, case.n
        whole = {name: x.expand(1 + keys + queries, *x.shape[1:]).clone() if x.dim() == 4 else x
                 for name, x in draw(case).items()}  # fmt: skip
        each = torch.arange(keys)
        whole["k"][1 + each, each] += 1.0
        whole["v"][1 + each, each] -= 5.0
        each = torch.arange(queries)
        whole["dout"][1 + keys + each, each] += 3.0
        at = torch.from_numpy(case.q_layout.positions(shard.rank))
        layout = case.k_layout
        key_at = torch.arange(keys)
        if layout is not None:
            key_at = torch.from_numpy(layout.positions(shard.rank))
        q, dout = whole["q"][:, at].requires_grad_(), whole["dout"][:, at]
        k, v = (whole[name][:, key_at].requires_grad_() for name in ("k", "v"))
        out = xdist.attention(
            q, k, v, shard, mask=case.mask, strategy=case.strategy, key_shard=key_shard,
            softcap=case.softcap, sinks=whole.get("sinks"),
        )  # fmt: skip
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
        rows = slice(1, 1 + keys), slice(1 + keys, None)
        found.append((_changed(out, rows[0]), *(_changed(x, rows[1]) for x in (dv, dk, dq))))
    return found


def _changed(x: Tensor, rows: slice) -> Tensor:
    return ((x[rows] - x[:1]).abs() > ROUNDING).any(-1)


def check(cases: list[Case], pool: RankPool) -> None:
    answers = pool.run(changed_by_each_token, cases)
    for number, case in enumerate(cases):
        seen = visible(case)  # [H, N, M]
        shared = seen.unflatten(0, (case.groups, -1)).any(1)  # [G, N, M]
        for rank, answer in enumerate(answers):
            out, dv, dk, dq = answer[number]
            at = torch.from_numpy(case.q_layout.positions(rank))
            layout = case.k_layout
            key_at = torch.arange(case.m)
            if layout is not None:
                key_at = torch.from_numpy(layout.positions(rank))
            assert torch.equal(out, seen[:, at].permute(2, 1, 0)), case
            users = shared[:, :, key_at].permute(1, 2, 0)
            if layout is not None:  # else each rank's part holds its own queries alone
                assert torch.equal(dv, users), case
            assert not (dv & ~users).any(), case
            assert not (dk & ~users).any(), case
            itself = torch.arange(case.n)[:, None, None] == at[None, :, None]
            assert not (dq & ~itself).any(), case


def with_strategies(cases: list[Case]) -> list[Case]:
    """Each case under each strategy that serves its mask, on 4 ranks, layouts in turn."""
    found = []
    for number, case in enumerate(cases):
        names = list(layouts(case.n, 4))
        for turn, strategy in enumerate(strategies(case.mask, case.keys is not None)):
            name = names[(number + turn) % len(names)]
            layout = segments(layouts(case.n, 4, seed=number)[name])
            found.append(replace(case, strategy=strategy, layout=layout, ulysses=2))
    return found


def test_no_mask_leaks(pool4: RankPool) -> None:
    """Every mask, in packed documents, with and without soft-cap and sinks."""
    cases = [
        Case("", WHOLE, mask, N, documents=DOCUMENTS, batch=1,
             softcap=3.0 if i % 3 == 0 else None, sinks=i % 2 == 0)
        for i, mask in enumerate(MASKS.values())
    ]  # fmt: skip
    check(with_strategies(cases), pool4)


def test_a_single_document_leaks_nothing(pool4: RankPool) -> None:
    """The masks again without documents, whose ends would hide what a prefix lets through."""
    cases = [
        Case("", WHOLE, mask, N, batch=1, softcap=2.0 if i % 2 else None, sinks=i % 3 == 0)
        for i, mask in enumerate(MASKS.values())
    ]
    check(with_strategies(cases)[::2], pool4)


def test_cross_attention_leaks_nothing(pool4: RankPool) -> None:
    """Document i sees document i of the keys; replicated keys are one document."""
    keys: Segments = segments(layouts(19, 4, seed=3)["drawn"])
    full, chunked = Mask(causal=False), Mask(causal=False, chunk=4)
    key_documents = (0, 11, 11, 15, 19)
    cases = [
        Case("", WHOLE, full, N, keys=keys, m=19, batch=1, sinks=True,
             documents=DOCUMENTS, key_documents=key_documents),
        Case("", WHOLE, chunked, N, keys=keys, m=19, batch=1,
             documents=DOCUMENTS, key_documents=key_documents),
        Case("", WHOLE, chunked, N, keys=keys, m=19, batch=1, softcap=2.0),
        Case("", WHOLE, chunked, N, keys="replicated", m=19, batch=1, sinks=True),
    ]  # fmt: skip
    check(with_strategies(cases), pool4)
