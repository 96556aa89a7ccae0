"""Chunked linear attention over one tile of tokens, with a decay of its own for every key dim.

A quotient of cumulative products would overflow, and a [C, C, K] table of decays is C times the
input. Each chunk is instead halved again and again; with c = cumulative log decay in the chunk:

    O_i = (q_i . k_i) v_i
    for half = C/2, C/4, ..., 1:
        for each block of 2*half tokens (batched), m = the last token of its first half:
            Q' = Q_second * exp(c - c_m)          both exponents are at most 0:
            K' = K_first  * exp(c_m - c)          nothing overflows, whatever the decay
            O_second += (Q' K'^T) V_first
    E = (K * exp(c_C - c))^T V;  S_in = T [S_0, E_0, ...];  O += (Q * exp(c)) S_in;  O *= scale

log2(C) levels of C*K powers each, and exactly the C(C-1)/2 products that causality leaves. The
signatures, shapes and dtypes are those of scalar.py, except log_decay [B,n,H,K].
"""

from __future__ import annotations

from collections.abc import Iterator
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
    to_chunks,
    to_tokens,
)

CHUNK_TOKENS = 64


def _chunk_size(n: int, chunk: int) -> int:
    """The chunk, halved while half of it already holds all n tokens; a power of two."""
    while chunk // 2 >= n:
        chunk //= 2
    return chunk


class _Decays(NamedTuple):
    """Cumulative log decays of one tile, to base 2, and the factors made of them."""

    cumulative: Tensor  # [R, C, K]
    since_start: Tensor  # [R, C, K] exp(c_i), zero after a document starts in the chunk
    until_end: Tensor  # [R, C, K] exp(c_C - c_i), zero before the chunk's last document
    borders: Tensor  # [rows, K, chunks + 1, chunks + 1]


def _decays(log_decay: Tensor, ids: DocumentIds | None, chunk: int, wide: torch.dtype) -> _Decays:
    batch, _, heads, key_dim = log_decay.shape
    rows = batch * heads
    c = (to_chunks(log_decay, chunk).to(wide) * LOG2_E).cumsum(1)
    since, until = c.exp2(), (c[:, -1:] - c).exp2_()
    if ids is not None:
        since = since * ids.since_start(rows)
        until = until * ids.until_end(rows)
    borders = border_decays(c[:, -1].reshape(rows, -1, key_dim), ids, wide)
    return _Decays(c, since, until, borders)


class _Level(NamedTuple):
    """One halving: blocks of 2*half tokens, `blocks` = R * C / (2*half) of them."""

    half: int
    query: Tensor  # [blocks, half, K] exp(c - c_m) of the second halves
    key: Tensor  # [blocks, half, K] exp(c_m - c) of the first halves
    same: Tensor | None  # [blocks, half, half] query and key of one document


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """First and second halves of the blocks of x [R, C, D]: two [blocks, half, D] views."""
    blocks = x.view(-1, 2, half, x.shape[-1])
    return blocks[:, 0], blocks[:, 1]


def _levels(d: _Decays, ids: DocumentIds | None, dtype: torch.dtype) -> Iterator[_Level]:
    half = d.cumulative.shape[1] // 2
    while half:
        first, second = _halves(d.cumulative, half)
        middle = first[:, -1:]
        same = None
        if ids is not None:
            early, late = _halves(ids.tokens[..., None], half)
            same = (late == early.mT).repeat(d.borders.shape[0], 1, 1)
        query, key = (second - middle).exp2_().to(dtype), (middle - first).exp2_().to(dtype)
        yield _Level(half, query, key, same)
        half //= 2


def _scaled(x: Tensor, factor: Tensor) -> Tensor:
    # Converted first: a product of two dtypes is five times slower than one of equal dtypes.
    return (x.to(factor.dtype) * factor).to(x.dtype)


def _border_states(k: Tensor, v: Tensor, d: _Decays, state: Tensor) -> Tensor:
    rows = d.borders.shape[0]
    own = torch.bmm(_scaled(k, d.until_end).mT, v).to(state.dtype)
    shape = (rows, -1, *own.shape[1:])
    return carry(d.borders, torch.cat([state.reshape(shape), own.view(shape)], 1))


def chunk_diagonal_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor,
    *,
    resets: Tensor | None = None,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor]:
    """One tile forward; arguments and results as `chunk_scalar_forward`, log_decay [B,n,H,K].

    `chunk` is a power of two.
    """
    batch, n, heads, _ = q.shape
    chunk = _chunk_size(n, chunk)
    ids = document_ids(resets, chunk)
    d = _decays(log_decay, ids, chunk, state.dtype)
    q, k, v = to_chunks(q, chunk), to_chunks(k, chunk), to_chunks(v, chunk)
    states = _border_states(k, v, d, state)
    into = states[:, :-1].reshape(-1, *states.shape[2:]).to(q.dtype)

    wide = state.dtype
    out = torch.linalg.vecdot(q.to(wide), k.to(wide))[..., None] * v.to(wide)
    out += torch.bmm(_scaled(q, d.since_start), into)
    for level in _levels(d, ids, q.dtype):
        k_first, _ = _halves(k, level.half)
        _, q_second = _halves(q, level.half)
        scores = torch.bmm(q_second * level.query, (k_first * level.key).mT)
        if level.same is not None:
            scores = scores * level.same
        _halves(out, level.half)[1].add_(torch.bmm(scores, _halves(v, level.half)[0]))
    out = to_tokens(out.mul_(scale).to(v.dtype), batch, heads, n)
    return out, states[:, -1].reshape(state.shape)


def chunk_diagonal_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    state: Tensor,
    dout: Tensor,
    dstate: Tensor,
    *,
    resets: Tensor | None = None,
    chunk: int = CHUNK_TOKENS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Adjoint of `chunk_diagonal_forward`: dq, dk, dv, dlog_decay [B,n,H,K], dinitial."""
    batch, n, heads, _ = q.shape
    chunk = _chunk_size(n, chunk)
    rows = batch * heads
    wide = state.dtype
    ids = document_ids(resets, chunk)
    d = _decays(log_decay, ids, chunk, wide)
    dtype = q.dtype
    q, k, v, dout = (to_chunks(x, chunk) for x in (q, k, v, (dout * scale).to(dtype)))
    states = _border_states(k, v, d, state)

    own = torch.bmm(_scaled(q, d.since_start).mT, dout).to(wide)
    shape = (rows, -1, *own.shape[1:])
    entries = torch.cat([own.view(shape), dstate.to(wide).reshape(shape)], 1)
    dstates = carry(d.borders.mT, entries)
    into = states[:, :-1].reshape(own.shape).to(dtype)
    after = dstates[:, 1:].reshape(own.shape).to(dtype)

    q_wide, k_wide, dout_wide = q.to(wide), k.to(wide), dout.to(wide)
    diagonal = torch.linalg.vecdot(dout_wide, v.to(wide))[..., None]
    dq = torch.bmm(dout, into.mT).to(wide) * d.since_start + diagonal * k_wide
    dk = torch.bmm(v, after.mT).to(wide) * d.until_end + diagonal * q_wide
    dv = torch.linalg.vecdot(q_wide, k_wide)[..., None] * dout_wide
    dv += torch.bmm(_scaled(k, d.until_end), after)
    for level in _levels(d, ids, dtype):
        k_first, q_second = _halves(k, level.half)[0], _halves(q, level.half)[1]
        v_first, dout_second = _halves(v, level.half)[0], _halves(dout, level.half)[1]
        key, query = k_first * level.key, q_second * level.query
        scores, dscores = torch.bmm(query, key.mT), torch.bmm(dout_second, v_first.mT)
        if level.same is not None:
            scores, dscores = scores * level.same, dscores * level.same
        _halves(dq, level.half)[1].add_(torch.bmm(dscores, key) * level.query)
        _halves(dk, level.half)[0].add_(torch.bmm(dscores.mT, query) * level.key)
        _halves(dv, level.half)[0].add_(torch.bmm(scores.mT, dout_second))

    ends = (dstates[:, 1:] * states[:, 1:]).sum(-1).reshape(-1, 1, q.shape[-1])
    dlog_decay = gate_gradient(q_wide * dq - k_wide * dk, ends, ids)
    grads = (to_tokens(x.to(dtype), batch, heads, n) for x in (dq, dk, dv))
    dq, dk, dv = grads
    dlog_decay = to_tokens(dlog_decay, batch, heads, n)
    return dq, dk, dv, dlog_decay, dstates[:, 0].reshape(state.shape)
