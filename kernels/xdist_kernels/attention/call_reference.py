"""Softmax attention one query at a time, in float64: the functions of torch.py.

Forward is reference.py. Backward, for query i of head h with s_j, z_j and the keys it sees as
there, lse_i that of all keys (these may be some of them) and delta_i = do_i . o_i:

    p_j  = exp(s_j - lse_i)
    dv_j += z_j p_j do_i
    ds_j = p_j (z_j do_i . v_j - delta_i),   times 1 - (s_j / softcap)^2 where there is a softcap
    dq_i = scale sum_j ds_j k_j,   dk_j += scale ds_j q_i
"""

from __future__ import annotations

import torch
from torch import Tensor

from xdist_kernels.attention.dropout import Dropped
from xdist_kernels.attention.reference import Spans, attention_reference
from xdist_kernels.attention.torch import attention_delta, sinks_backward
from xdist_kernels.errors import KernelError
from xdist_kernels.merge.torch import merge_

__all__ = ["attention_backward", "attention_delta", "attention_forward", "sinks_backward"]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def attention_forward(
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
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, rounded once; arguments and shapes in torch.py."""
    batch, n, heads, _ = q.shape
    wide = _wide(q)
    if batch * n * heads == 0:
        out, lse = q.new_zeros(batch, n, heads, v.shape[3]), q.new_zeros(batch, n, heads)
    else:
        with torch.no_grad():
            out, lse = attention_reference(
                q, k, v, scale=scale, spans=spans, k_positions=k_positions, softcap=softcap,
                sinks=sinks, dropout=dropout,
            )  # fmt: skip
    found = out.to(wide), lse.to(wide)
    if into is None:
        return found
    merge_(*into, *found)
    return into


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor | None,
    dout: Tensor,
    *,
    scale: float,
    spans: Spans,
    k_positions: Tensor,
    softcap: float | None = None,
    dropout: Dropped | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients dq, dk and dv, float32 (float64); arguments and shapes in torch.py."""
    wide, per_group = _wide(q), q.shape[2] // max(1, k.shape[2])
    if delta is None:
        if out is None:
            raise KernelError("backward needs delta, or the output to make it of")
        delta = attention_delta(out, dout)
    q, k, v, lse, delta, dout = (x.double() for x in (q, k, v, lse, delta, dout))
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    for i in range(q.shape[1]):
        for h in range(q.shape[2]):
            lo, hi, prefix_lo, prefix_hi = (int(s[h, i] if s.dim() == 2 else s[i]) for s in spans)
            seen = (k_positions >= lo) & (k_positions < hi)
            seen |= (k_positions >= prefix_lo) & (k_positions < prefix_hi)
            at, g = seen.nonzero().flatten(), h // per_group
            if not len(at):
                continue
            k_, v_, do_ = k[:, at, g], v[:, at, g], dout[:, i, h, None]
            s_ = scale * torch.einsum("bd,bjd->bj", q[:, i, h], k_)
            slope = torch.full_like(s_, scale)
            if softcap is not None:
                s_ = softcap * torch.tanh(s_ / softcap)
                slope = scale * (1 - (s_ / softcap) ** 2)
            z = (
                torch.ones_like(s_)
                if dropout is None
                else _kept(dropout, i, h, k_positions[at], s_)
            )
            p = torch.exp(s_ - lse[:, i, h, None])
            ds = p * (z * (do_ * v_).sum(-1) - delta[:, i, h, None]) * slope
            dq[:, i, h] = torch.einsum("bj,bjd->bd", ds, k_)
            dk[:, at, g] += ds[..., None] * q[:, i, h, None]
            dv[:, at, g] += (z * p)[..., None] * do_
    return dq.to(wide), dk.to(wide), dv.to(wide)


def _kept(dropout: Dropped, i: int, h: int, positions: Tensor, like: Tensor) -> Tensor:
    """z [B, keys] of query i of head h."""
    query = int(dropout.q_positions[i])
    kept = [
        [dropout.keeps(row, h, query, int(position)) for position in positions]
        for row in range(like.shape[0])
    ]
    return dropout.scale * like.new_tensor(kept)
