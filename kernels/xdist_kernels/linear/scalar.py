"""Chunked linear attention over one tile of tokens, with no decay or one decay per token and head.

    for each chunk (batched, not looped), with c = cumulative log decay inside the chunk:
        D_ij  = exp(c_i - c_j) for j <= i, else 0          never a quotient of two products
        E     = (K * exp(c_C - c))^T V                     the chunk's own summary
        S_in  = T [S_0, E_0, E_1, ...]                     T_sj: decay between two chunk borders
        O     = scale * ((Q K^T * D) V + (Q * exp(c)) S_in)

The backward pass runs the same products transposed; T^T carries the state gradients back.

Shapes: q, k [B,n,H,K], v [B,n,H,V], log_decay [B,n,H] or None, state [B,H,K,V]; inside, those of
chunks.py. Nothing here depends on data: the functions can be traced by torch.compile. Matrix
products run in the dtype of q; decays, states and their chain in float32, or in float64 when q
is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.linear.chunks import (
    LOG2_E,
    DocumentIds,
    border_decays,
    carry,
    document_ids,
    gate_gradient,
    state_dtype,
    to_chunks,
    to_tokens,
)

CHUNK_TOKENS = 64


class _Decays(NamedTuple):
    """Decay factors of one tile."""

    within: Tensor  # [R, C, C] or [C, C]: D above, in the products' dtype
    since_start: Tensor | None  # [R, C, 1] exp(c_i), zero after a document starts in the chunk
    until_end: Tensor | None  # [R, C, 1] exp(c_C - c_i), zero before the chunk's last document
    borders: Tensor  # [rows, 1, chunks + 1, chunks + 1] T above, in the states' dtype


def _decays(
    q: Tensor, log_decay: Tensor | None, ids: DocumentIds | None, chunk: int, rows: int
) -> _Decays:
    """All factors of a tile of `rows` = B*H rows; `q` lends its dtype, device and length."""
    wide = state_dtype(q)
    count = -(-q.shape[1] // chunk)
    visible = torch.ones(chunk, chunk, dtype=wide, device=q.device).tril()
    if ids is not None:
        visible = visible * ids.same()
    if log_decay is None:
        totals = torch.zeros(rows, count, 1, dtype=wide, device=q.device)
        borders = border_decays(totals, ids, wide)
        visible = visible.to(q.dtype)
        if ids is None:
            return _Decays(visible, None, None, borders)
        since, until = ids.since_start(rows).to(wide), ids.until_end(rows).to(wide)
        return _Decays(visible.repeat(rows, 1, 1), since, until, borders)

    c = (to_chunks(log_decay[..., None], chunk).to(wide) * LOG2_E).cumsum(1)
    borders = border_decays(c[:, -1].view(rows, count, 1), ids, wide)
    # Above the diagonal the exponent is positive and could overflow: cut before the power.
    within = (c - c.mT).clamp_(max=0.0).exp2_().view(rows, count, chunk, chunk).mul_(visible)
    since, until = c.exp2(), (c[:, -1:] - c).exp2_()
    if ids is not None:
        since = since * ids.since_start(rows)
        until = until * ids.until_end(rows)
    return _Decays(within.view(-1, chunk, chunk).to(q.dtype), since, until, borders)


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    # Converted first: a product of two dtypes is five times slower than one of equal dtypes.
    return x if factor is None else (x.to(factor.dtype) * factor).to(x.dtype)


def _border_states(k: Tensor, v: Tensor, d: _Decays, state: Tensor) -> Tensor:
    """States at every chunk border, [rows, chunks + 1, K, V]: the first is `state`."""
    rows = d.borders.shape[0]
    own = torch.bmm(_scaled(k, d.until_end).mT, v).to(state.dtype)
    shape = (rows, -1, *own.shape[1:])
    return carry(d.borders, torch.cat([state.reshape(shape), own.view(shape)], 1))


def chunk_scalar_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    *,
    resets: Tensor | None = None,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """One tile forward: out [B,n,H,V] in the dtype of v, and the state after it [B,H,K,V].

    `state` [B,H,K,V] is what the tile starts from, float32 (float64 with float64 inputs).
    `resets` bool [n] is True at the first token of each document: nothing earlier, `state`
    included, reaches it. `n` is at least 1. `out` may be a strided view.
    """
    batch, n, heads, _ = q.shape
    chunk = min(chunk, n)
    d = _decays(q, log_decay, document_ids(resets, chunk), chunk, batch * heads)
    q, k, v = to_chunks(q, chunk), to_chunks(k, chunk), to_chunks(v, chunk)
    states = _border_states(k, v, d, state)
    into = states[:, :-1].reshape(-1, *states.shape[2:]).to(q.dtype)
    scores = torch.bmm(q, k.mT).mul_(d.within)
    carried = torch.bmm(_scaled(q, d.since_start), into)
    out = torch.baddbmm(carried, scores, v, beta=scale, alpha=scale)
    return to_tokens(out, batch, heads, n), states[:, -1].reshape(state.shape)


def chunk_scalar_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor,
    dout: Tensor,
    dstate: Tensor,
    *,
    resets: Tensor | None = None,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Adjoint of `chunk_scalar_forward`: dq, dk, dv, dlog_decay (None without decay), dinitial.

    `state` is the state the tile started from, `dout` [B,n,H,V] and `dstate` [B,H,K,V] the
    gradients of its two outputs. Everything else is recomputed. dlog_decay is float32 or wider.
    """
    batch, n, heads, _ = q.shape
    chunk = min(chunk, n)
    rows = batch * heads
    ids = document_ids(resets, chunk)
    d = _decays(q, log_decay, ids, chunk, rows)
    q, k, v, dout = (to_chunks(x, chunk) for x in (q, k, v, dout.to(q.dtype)))
    states = _border_states(k, v, d, state)

    # Gradients of the border states: each chunk's own use of its incoming state, carried back.
    own = torch.bmm(_scaled(q, d.since_start).mT, dout).to(state.dtype).mul_(scale)
    shape = (rows, -1, *own.shape[1:])
    entries = torch.cat([own.view(shape), dstate.to(state.dtype).reshape(shape)], 1)
    dstates = carry(d.borders.mT, entries)
    into = states[:, :-1].reshape(own.shape).to(q.dtype)
    after = dstates[:, 1:].reshape(own.shape).to(q.dtype)

    dscores = torch.bmm(dout, v.mT).mul_(d.within)
    dq = _scaled(torch.bmm(dout, into.mT), d.since_start)
    dq = torch.baddbmm(dq, dscores, k, beta=scale, alpha=scale)
    dk = _scaled(torch.bmm(v, after.mT), d.until_end)
    dk = torch.baddbmm(dk, dscores.mT, q, alpha=scale)
    scores = torch.bmm(q, k.mT).mul_(d.within)
    dv = torch.bmm(_scaled(k, d.until_end), after)
    dv = torch.baddbmm(dv, scores.mT, dout, alpha=scale)

    dlog_decay = None
    if log_decay is not None:
        wide = state.dtype
        slope = torch.linalg.vecdot(q.to(wide), dq.to(wide))
        slope = (slope - torch.linalg.vecdot(k.to(wide), dk.to(wide)))[..., None]
        ends = (dstates[:, 1:] * states[:, 1:]).sum((-1, -2)).reshape(-1, 1, 1)
        dlog_decay = to_tokens(gate_gradient(slope, ends, ids), batch, heads, n).squeeze(-1)
    dq, dk, dv = (to_tokens(x, batch, heads, n) for x in (dq, dk, dv))
    return dq, dk, dv, dlog_decay, dstates[:, 0].reshape(state.shape)
