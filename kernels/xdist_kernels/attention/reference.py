"""Softmax attention, one query at a time, in float64: what every other form must equal.

For query i of head h, with G key heads shared by H query heads (g = h // (H / G)):
    (1) s_j = scale * q_i . k_j                    for every key j it sees
    (2) s_j = softcap * tanh(s_j / softcap)        if there is a softcap
    (3) Z   = sum_j exp(s_j) + exp(sink_h)         the sink only if there is one
    (4) o_i = sum_j z_j exp(s_j) / Z * v_j;        lse_i = log Z
        z_j = 1, or with dropout 1 / (1 - rate) where the pair is kept and 0 where not
A query that sees nothing and has no sink (or one of -inf) has o_i = 0 and lse_i = -inf.
Letters: B batch, n queries, m keys, H query heads, G key heads, D key dim, E value dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xdist_kernels.attention.dropout import Dropped

Spans = tuple[Tensor, Tensor, Tensor, Tensor]


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    spans: Spans,
    k_positions: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: Dropped | None = None,
) -> tuple[Tensor, Tensor]:
    """The arguments of `torch.attention_forward`, computed in float64 by plain differentiable ops.

    Returns out `[B,n,H,E]` and lse `[B,n,H]`, float64. Slow: one Python step a query and head.
    """
    q, k, v = q.double(), k.double(), v.double()
    batch, n, heads, _ = q.shape
    per_group = heads // max(1, k.shape[2])
    rows, logs = [], []
    for i in range(n):
        for h in range(heads):
            lo, hi, prefix_lo, prefix_hi = (int(s[h, i] if s.dim() == 2 else s[i]) for s in spans)
            seen = (k_positions >= lo) & (k_positions < hi)
            seen |= (k_positions >= prefix_lo) & (k_positions < prefix_hi)
            k_, v_ = k[:, seen, h // per_group], v[:, seen, h // per_group]
            s_ = scale * torch.einsum("bd,bjd->bj", q[:, i, h], k_)  # (1)
            if softcap is not None:
                s_ = softcap * torch.tanh(s_ / softcap)  # (2)
            # (3): a sink is a key whose value is zero
            if sinks is not None and sinks[h] != -math.inf:
                s_ = torch.cat([s_, sinks[h].double().expand(batch, 1)], dim=1)
                v_ = torch.cat([v_, v_.new_zeros(batch, 1, v_.shape[-1])], dim=1)
            if s_.shape[1] == 0:
                rows.append(v.new_zeros(batch, v.shape[-1]))
                logs.append(v.new_full((batch,), -math.inf))
                continue
            p_ = torch.softmax(s_, dim=1)
            if dropout is not None:
                keys = k_positions[seen].tolist()
                p_ = p_ * _dropout_factors(dropout, batch, h, i, keys, p_.shape[1])
            rows.append(torch.einsum("bj,bje->be", p_, v_))  # (4)
            logs.append(torch.logsumexp(s_, dim=1))
    if not rows:
        return v.new_zeros(batch, n, heads, v.shape[-1]), v.new_zeros(batch, n, heads)
    out = torch.stack(rows, dim=1).reshape(batch, n, heads, v.shape[-1])
    return out, torch.stack(logs, dim=1).reshape(batch, n, heads)


def _dropout_factors(
    dropout: Dropped, batch: int, head: int, query: int, keys: list[int], columns: int
) -> Tensor:
    """The z_j `[batch, columns]` of one query and head; a sink's column is past the keys."""
    factors = torch.ones(batch, columns, dtype=torch.float64)
    at = int(dropout.q_positions[query])
    for row in range(batch):
        for j, key in enumerate(keys):
            factors[row, j] = dropout.scale if dropout.keeps(row, head, at, key) else 0.0
    return factors
