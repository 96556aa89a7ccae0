"""Chunked linear attention over one tile of tokens, with no decay or one decay per token and head.

    for each chunk (batched, not looped), with c = cumulative log decay inside the chunk:
        D_ij  = exp(c_i - c_j) for j <= i, else 0          never a quotient of two products
        E     = (K * exp(c_C - c))^T V                     the chunk's own summary
        S_in  = T [S_0, E_0, E_1, ...]                     T_sj: decay between two chunk borders
        O     = scale * ((Q K^T * D) V + (Q * exp(c)) S_in)

The backward pass runs the same products transposed; T^T carries the state gradients back. The
gradient of the log decay is a reverse cumulative sum of q.dq - k.dk inside each chunk plus
<dS, S> at the chunk's end (MATH.md section 0), so rounding never adds up over more than a chunk.

Shapes: q, k [B,n,H,K], v [B,n,H,V], log_decay [B,n,H] or None, state [B,H,K,V]. Inside, R stands
for the fused (B, H, chunk) and C for a chunk's tokens. Nothing here depends on data: the
functions can be traced by torch.compile. Matrix products run in the dtype of q; decays, states
and their chain run in float32, or in float64 when q is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_TOKENS = 64


class _Decays(NamedTuple):
    """Decay factors of one tile; every field is None-free so that the callers do not branch."""

    within: Tensor  # [R, C, C] D above, in the products' dtype; [C, C] without decay
    since_start: Tensor | None  # [R, C, 1] exp(c_i), zero after a document starts in the chunk
    until_end: Tensor | None  # [R, C, 1] exp(c_C - c_i), zero before the chunk's last document
    borders: Tensor  # [B*H, chunks + 1, chunks + 1] T above, in the states' dtype
    same_document: Tensor | None  # [chunks, C, C] bool, only with resets


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and decays: float32, or float64 when `x` is float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, n, H, D] -> [B*H*chunks, C, D] contiguous, the last chunk filled up with zeros."""
    batch, n, heads, dim = x.shape
    rows = x.transpose(1, 2)
    if n % chunk:
        rows = F.pad(rows, (0, 0, 0, -n % chunk))
    return rows.reshape(batch * heads * (rows.shape[2] // chunk), chunk, dim).contiguous()


def _tokens(x: Tensor, batch: int, heads: int, n: int) -> Tensor:
    """Undo `_chunks`: a [B, n, H, D] view without the filling."""
    return x.reshape(batch, heads, -1, x.shape[-1])[:, :, :n].transpose(1, 2)


def _document_ids(resets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Documents started up to each token [chunks, C], and up to each chunk border [chunks + 1]."""
    ids = F.pad(resets, (0, -resets.shape[0] % chunk)).to(torch.int64).cumsum(0)
    ids = ids.reshape(-1, chunk)
    return ids, F.pad(ids[:, -1], (1, 0))


def _decays(
    q: Tensor, log_decay: Tensor | None, resets: Tensor | None, chunk: int, rows: int
) -> _Decays:
    """All factors of a tile of `rows` = B*H rows; `q` lends its dtype and device."""
    wide = state_dtype(q)
    count = -(-q.shape[1] // chunk)
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    borders_lower = torch.ones(count + 1, count + 1, dtype=torch.bool, device=q.device).tril()
    ids = border_ids = same = None
    if resets is not None:
        ids, border_ids = _document_ids(resets, chunk)
        same = ids[:, :, None] == ids[:, None, :]
        lower = lower & same
        borders_lower = borders_lower & (border_ids[:, None] == border_ids[None, :])
    if log_decay is None:
        within = lower.to(q.dtype)
        since = until = None
        borders = borders_lower.to(wide).expand(rows, -1, -1)
        if ids is not None and border_ids is not None:
            since = (ids == border_ids[:-1, None]).to(wide).repeat(rows, 1)[..., None]
            until = (ids == border_ids[1:, None]).to(wide).repeat(rows, 1)[..., None]
            within = within.repeat(rows, 1, 1)
        return _Decays(within, since, until, borders, same)

    g = _chunks(log_decay[..., None], chunk).squeeze(-1).to(wide)
    c = g.cumsum(1)
    # The borders are few: float64 keeps their differences exact to float32 over a long tile.
    total = F.pad(g.double().sum(1).reshape(rows, count).cumsum(1), (1, 0))
    far = (total[:, :, None] - total[:, None, :]).masked_fill(~borders_lower, -torch.inf)
    bias = torch.zeros(lower.shape, dtype=wide, device=q.device).masked_fill_(~lower, -torch.inf)
    within = (c[:, :, None] - c[:, None, :]).view(rows, count, chunk, chunk).add_(bias).exp_()
    since, until = c.exp(), (c[:, -1:] - c).exp()
    if ids is not None and border_ids is not None:
        since = since * (ids == border_ids[:-1, None]).repeat(rows, 1)
        until = until * (ids == border_ids[1:, None]).repeat(rows, 1)
    return _Decays(
        within.view(-1, chunk, chunk).to(q.dtype),
        since[..., None],
        until[..., None],
        far.exp().to(wide),
        same,
    )


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else (x * factor).to(x.dtype)


def _border_states(k: Tensor, v: Tensor, d: _Decays, state: Tensor) -> Tensor:
    """States at every chunk border, [B*H, chunks + 1, K, V]: the first is `state`."""
    rows, count = d.borders.shape[0], d.borders.shape[1] - 1
    own = torch.bmm(_scaled(k, d.until_end).mT, v).to(state.dtype)
    entries = torch.cat([state.reshape(rows, 1, -1), own.reshape(rows, count, -1)], 1)
    return torch.bmm(d.borders, entries).view(rows, count + 1, k.shape[-1], v.shape[-1])


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
    d = _decays(q, log_decay, resets, chunk, batch * heads)
    q, k, v = _chunks(q, chunk), _chunks(k, chunk), _chunks(v, chunk)
    states = _border_states(k, v, d, state)
    into = states[:, :-1].reshape(-1, *states.shape[2:]).to(q.dtype)
    scores = torch.bmm(q, k.mT) * d.within
    carried = torch.bmm(_scaled(q, d.since_start), into)
    out = torch.baddbmm(carried, scores, v, beta=scale, alpha=scale)
    return _tokens(out, batch, heads, n), states[:, -1].reshape(state.shape)


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
    d = _decays(q, log_decay, resets, chunk, rows)
    q, k, v, dout = (_chunks(x, chunk) for x in (q, k, v, dout.to(q.dtype)))
    states = _border_states(k, v, d, state)
    count = states.shape[1] - 1

    # Gradients of the border states: each chunk's own use of its incoming state, carried back.
    q_since = _scaled(q, d.since_start)
    own = torch.bmm(q_since.mT, dout).to(state.dtype).mul_(scale).reshape(rows, count, -1)
    entries = torch.cat([own, dstate.reshape(rows, 1, -1).to(state.dtype)], 1)
    dstates = torch.bmm(d.borders.mT, entries).view(states.shape)
    into = states[:, :-1].reshape(-1, *states.shape[2:])
    dout_of = dstates[:, 1:].reshape(-1, *states.shape[2:])

    dscores = torch.bmm(dout, v.mT) * d.within
    dq = torch.bmm(dout, into.to(q.dtype).mT)
    dq = torch.baddbmm(_scaled(dq, d.since_start), dscores, k, beta=scale, alpha=scale)
    dk = torch.bmm(v, dout_of.to(q.dtype).mT)
    dk = torch.baddbmm(_scaled(dk, d.until_end), dscores.mT, q, alpha=scale)
    scores = torch.bmm(q, k.mT) * d.within
    dv = torch.bmm(_scaled(k, d.until_end), dout_of.to(q.dtype))
    dv = torch.baddbmm(dv, scores.mT, dout, alpha=scale)

    dlog_decay = None
    if log_decay is not None:
        ends = (dstates[:, 1:] * states[:, 1:]).sum((-1, -2))
        dlog_decay = _gate_gradient(q, k, dq, dk, ends.reshape(-1, 1), d.same_document)
        dlog_decay = _tokens(dlog_decay[..., None], batch, heads, n).squeeze(-1)
    grads = (_tokens(x, batch, heads, n) for x in (dq, dk, dv))
    return (*grads, dlog_decay, dstates[:, 0].reshape(state.shape))


def _gate_gradient(
    q: Tensor, k: Tensor, dq: Tensor, dk: Tensor, ends: Tensor, same_document: Tensor | None
) -> Tensor:
    """[R, C] gradient of the log decay; `ends` [R, 1] is <dS, S> at each chunk's last token.

    d(log a_t) = sum over i >= t of (q_i.dq_i - k_i.dk_i) in t's document, plus the end's term
    where that document reaches the end; at a document's first token the decay has no effect.
    """
    wide = ends.dtype
    own = (q.to(wide) * dq).sum(-1) - (k.to(wide) * dk).sum(-1)
    chunk = own.shape[1]
    later = torch.ones(chunk, chunk, dtype=wide, device=own.device).tril()
    if same_document is None:
        return own @ later + ends
    later = later * same_document
    count = later.shape[0]
    sums = torch.einsum("rcj,cjt->rct", own.view(-1, count, chunk), later)
    reaches_end = same_document[:, :, -1].to(wide)
    return (sums + ends.view(-1, count, 1) * reaches_end).reshape(-1, chunk)
