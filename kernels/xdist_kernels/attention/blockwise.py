"""Blockwise softmax attention with explicit backward: the CPU path, and correct on any device.

    for each block of queries:                                  forward
        m, l, acc = -inf, 0, 0
        for each block of keys that any of them sees:
            S = log2(e) * softcap(scale * Q K^T), -inf where not visible (no mask on full blocks)
            m' = max(m, rowmax S);  P = 2^(S - m')
            l, acc = l * 2^(m - m') + rowsum P, acc * 2^(m - m') + Z P V
        O = acc / l;  lse = ln(2) * (m + log2 l)                (empty row: O = 0, lse = -inf)
    for each block of queries, for each block of keys:          backward
        P = 2^(S - log2(e) * lse);  dV += (Z P)^T dO;  dS = P * (Z dO V^T - delta) * softcap'
        dQ += scale * dS K;  dK += scale * dS^T Q               delta = rowsum(dO * O)
    Z = kept / (1 - rate) is the dropout (dropout.py), 1 without; l and lse know nothing of it.

Memory beyond inputs and outputs is one block of scores per batch row and head. Sums are in
float32, in float64 for float64. The tiling and online softmax are those of FlashAttention-2
(Dao 2023, arXiv 2307.08691, algorithms 1 and 2).
Shapes: B batch, n queries, m keys, H query heads, G key heads, R = H / G, D and E head dims.
Inside a block, heads lie as `[B*G, R*rows, D]`, so that one product serves a whole group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from xdist_kernels.attention.blocks import KeyBlock, QueryBlock, Spans, plan_blocks, visible
from xdist_kernels.attention.dropout import Dropped

_LOG2E = math.log2(math.e)
_LN2 = math.log(2.0)
# Keys a block, and scores a block over all heads: measured on Zen 4, one thread (1 MiB of L2).
_KEY_TOKENS = 256
_BLOCK_SCORES = 384 * 1024


def forward_rows(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    spans: Spans, k_positions: Tensor, scale: float, softcap: float | None,
    dropout: Dropped | None,
) -> None:  # fmt: skip
    """Fills `out` and `lse` for heads that share one visibility."""
    groups, wide = k.shape[2], out.dtype
    for block in _plan(q, spans, k_positions):
        rows = slice(block.start, block.stop)
        q_ = _fold(q[:, rows], groups, wide)
        m_ = q_.new_full(q_.shape[:2], -torch.inf)
        l_ = torch.zeros_like(m_)
        acc = q_.new_zeros(*q_.shape[:2], v.shape[-1])
        words = _words(dropout, q_.shape[:2], rows, q)
        for keys in block.keys:
            part = slice(keys.start, keys.stop)
            s_, _ = _scores(q_, _fold(k[:, part], groups, wide), scale, softcap)
            _hide(s_, block, keys, spans, k_positions)
            new = torch.maximum(m_, s_.amax(-1))
            base = new.masked_fill(new == -torch.inf, 0.0)
            p_ = s_.sub_(base.unsqueeze(-1)).exp2_()
            kept = (m_ - base).exp2_()
            l_.mul_(kept).add_(p_.sum(-1))
            if words is not None and dropout is not None:
                p_.mul_(dropout.kept(words, k_positions[part]))
            acc.mul_(kept.unsqueeze(-1)).baddbmm_(p_, _fold(v[:, part], groups, wide))
            m_ = new
        # An empty row has l = 0 and acc = 0: 0 / inf keeps its output 0, -inf + -inf its lse -inf.
        acc.div_(l_.masked_fill(l_ == 0, torch.inf).unsqueeze(-1))
        if dropout is not None:
            acc.mul_(dropout.scale)
        _unfold_into(out[:, rows], acc, groups)
        _unfold_into(
            lse[:, rows].unsqueeze(-1), m_.add_(l_.log2_()).mul_(_LN2).unsqueeze(-1), groups
        )


def backward_rows(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dout: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
    spans: Spans, k_positions: Tensor, scale: float, softcap: float | None,
    dropout: Dropped | None,
) -> None:  # fmt: skip
    """Fills `dq` and adds to `dk` `[B,G,m,D]`, `dv` `[B,G,m,E]` for heads of one visibility."""
    groups, wide, batch = k.shape[2], dq.dtype, q.shape[0]
    for block in _plan(q, spans, k_positions):
        rows = slice(block.start, block.stop)
        q_, do_ = _fold(q[:, rows], groups, wide), _fold(dout[:, rows], groups, wide)
        delta_ = _fold(delta[:, rows].unsqueeze(-1), groups, wide)
        lse_ = _fold(lse[:, rows].unsqueeze(-1), groups, wide) * _LOG2E
        lse_.masked_fill_(lse_ == -torch.inf, 0.0)
        dq_ = torch.zeros_like(q_)
        words = _words(dropout, q_.shape[:2], rows, q)
        if dropout is not None:
            do_ = do_ * dropout.scale
        for keys in block.keys:
            part = slice(keys.start, keys.stop)
            k_, v_ = _fold(k[:, part], groups, wide), _fold(v[:, part], groups, wide)
            s_, slope = _scores(q_, k_, scale, softcap, slope=True)
            _hide(s_, block, keys, spans, k_positions)
            p_ = s_.sub_(lse_).exp2_()
            ds_ = torch.bmm(do_, v_.transpose(1, 2))
            seen = p_
            if words is not None and dropout is not None:
                kept = dropout.kept(words, k_positions[part])
                seen = p_ * kept
                ds_.mul_(kept)
            dv[:, :, part] += torch.bmm(seen.transpose(1, 2), do_).view(
                batch, groups, keys.stop - keys.start, v.shape[-1]
            )
            ds_.sub_(delta_).mul_(p_)
            if slope is not None:
                ds_.mul_(slope)
            dq_.baddbmm_(ds_, k_, alpha=scale)
            dk_ = torch.bmm(ds_.transpose(1, 2), q_)
            dk_ = dk_.view(batch, groups, keys.stop - keys.start, q.shape[-1])
            dk[:, :, part].add_(dk_, alpha=scale)
        _unfold_into(dq[:, rows], dq_, groups)


def _words(
    dropout: Dropped | None, folded: Sequence[int], rows: slice, q: Tensor
) -> tuple[Tensor, Tensor] | None:
    """The queries' hash words `[B*G, R*rows]`, as `_fold` lays the queries out."""
    if dropout is None:
        return None
    a, c = dropout.queries(q.shape[0], slice(0, q.shape[2]), rows)
    return a.view(*folded), c.view(*folded)


def _plan(q: Tensor, spans: Spans, k_positions: Tensor) -> Iterator[QueryBlock]:
    """Blocks sized so that their scores, over all heads of the batch, fit the cache."""
    per_key = max(1, q.shape[0] * q.shape[2]) * _KEY_TOKENS
    query_tokens = min(256, max(16, _BLOCK_SCORES // per_key))
    return plan_blocks(spans, k_positions, query_tokens, _KEY_TOKENS)


def _scores(
    q: Tensor, k: Tensor, scale: float, softcap: float | None, *, slope: bool = False
) -> tuple[Tensor, Tensor | None]:
    """`log2(e) * softcap(scale * q k^T)` `[B*G, R*rows, keys]`, and the softcap's derivative."""
    factor = scale * _LOG2E if softcap is None else scale / softcap
    s_ = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    torch.baddbmm(s_, q, k.transpose(1, 2), beta=0, alpha=factor, out=s_)
    if softcap is None:
        return s_, None
    s_.tanh_()
    derivative = 1 - s_.square() if slope else None
    return s_.mul_(softcap * _LOG2E), derivative


def _hide(s_: Tensor, block: QueryBlock, keys: KeyBlock, spans: Spans, k_positions: Tensor) -> None:
    """Sets scores of keys that are not visible to -inf; full blocks need nothing."""
    if keys.full:
        return
    seen = visible(spans, slice(block.start, block.stop), k_positions[keys.start : keys.stop])
    s_.view(-1, *seen.shape).masked_fill_(~seen, -torch.inf)


def _fold(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """`[B, rows, H, D]` to contiguous `[B*G, R*rows, D]` in `dtype`."""
    batch, rows, heads, dim = x.shape
    x = x.reshape(batch, rows, groups, heads // groups, dim).permute(0, 2, 3, 1, 4)
    return x.to(dtype).reshape(batch * groups, heads // groups * rows, dim)


def _unfold_into(target: Tensor, x: Tensor, groups: int) -> None:
    """Copies `[B*G, R*rows, dim]` into `target` `[B, rows, H, dim]`."""
    batch, rows, heads, dim = target.shape
    x = x.view(batch, groups, heads // groups, rows, dim).permute(0, 3, 1, 2, 4)
    target.copy_(x.reshape(batch, rows, heads, dim))
