"""Inside chunks, with a decay of its own for every key dim: halving.

A quotient of cumulative products would overflow, and a [C, C, K] table of decays is C times the
input. Each chunk is instead halved again and again; with c = cumulative log decay g in the chunk:

    O_i = (q_i . k_i) v_i
    for half = 1, 2, ..., C/2:
        for each block of 2*half tokens (batched), m = the last token of its first half:
            Q' = Q_second * exp(c - c_m)          both exponents are at most 0:
            K' = K_first  * exp(c_m - c)          nothing overflows, whatever the decay
            O_second += (Q' K'^T) V_first

The exponents are sums of g, never differences of c (halves.py).

log2(C) levels of C*K powers each, and exactly the C(C-1)/2 products that causality leaves. Shapes
and dtypes are those of within_scalar.py, but g [R,C,K]; results are in the dtype of the states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.linear.chunks import DocumentIds
from xdist_kernels.linear.halves import halves, levels


class _Level(NamedTuple):
    """One halving: blocks of 2*half tokens, `blocks` = R * C / (2*half) of them."""

    half: int
    query: Tensor  # [blocks, half, K] exp(c - c_m) of the second halves
    key: Tensor  # [blocks, half, K] exp(c_m - c) of the first halves
    same: Tensor | None  # [blocks, half, half] query and key of one document


def _levels(g: Tensor, ids: DocumentIds | None, dtype: torch.dtype) -> Iterator[_Level]:
    for half, since, until in levels(g):
        same = None
        if ids is not None:
            early, late = halves(ids.tokens[..., None], half)
            same = (late == early.mT).repeat(g.shape[0] // ids.tokens.shape[0], 1, 1)
        yield _Level(half, since.exp2().to(dtype), until.exp2().to(dtype), same)


def outputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, ids: DocumentIds | None) -> Tensor:
    """O [R,C,V], without the scale and without what a state before the chunk adds."""
    wide = g.dtype
    out = torch.linalg.vecdot(q.to(wide), k.to(wide))[..., None] * v.to(wide)
    for level in _levels(g, ids, q.dtype):
        k_first, q_second = halves(k, level.half)[0], halves(q, level.half)[1]
        scores = torch.bmm(q_second * level.query, (k_first * level.key).mT)
        if level.same is not None:
            scores = scores * level.same
        halves(out, level.half)[1].add_(torch.bmm(scores, halves(v, level.half)[0]))
    return out


def gradients(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, g: Tensor, ids: DocumentIds | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk [R,C,K] and dv [R,C,V] of `outputs`."""
    wide = g.dtype
    q_wide, k_wide, dout_wide = q.to(wide), k.to(wide), dout.to(wide)
    diagonal = torch.linalg.vecdot(dout_wide, v.to(wide))[..., None]
    dq, dk = diagonal * k_wide, diagonal * q_wide
    dv = torch.linalg.vecdot(q_wide, k_wide)[..., None] * dout_wide
    for level in _levels(g, ids, q.dtype):
        k_first, q_second = halves(k, level.half)[0], halves(q, level.half)[1]
        v_first, dout_second = halves(v, level.half)[0], halves(dout, level.half)[1]
        key, query = k_first * level.key, q_second * level.query
        scores, dscores = torch.bmm(query, key.mT), torch.bmm(dout_second, v_first.mT)
        if level.same is not None:
            scores, dscores = scores * level.same, dscores * level.same
        halves(dq, level.half)[1].add_(torch.bmm(dscores, key) * level.query)
        halves(dk, level.half)[0].add_(torch.bmm(dscores.mT, query) * level.key)
        halves(dv, level.half)[0].add_(torch.bmm(scores.mT, dout_second))
    return dq, dk, dv
