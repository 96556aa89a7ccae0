"""Gated linear attention over one tile of some thousand tokens: forward, adjoint and backward.

    for each chunk (batched, not looped), with c = cumulative log decay g inside the chunk:
        E     = (K * exp(c_C - c))^T V                     the chunk's own summary
        S_in  = T [S_0, E_0, E_1, ...]                     T_sj: decay between two chunk borders
        O     = scale * (inside the chunk + (Q * exp(c)) S_in)

What is inside a chunk needs no state: within_scalar.py and within_diagonal.py. The backward pass
runs the same products transposed; T^T carries the gradients of the states back.

Shapes: q, k [B,T,Hk,K], v, out [B,T,H,V] with H % Hk == 0 (each key head serves H/Hk value heads),
log_decay None, [B,T,H,1] or [B,T,H,K], finite and at most 0, states [B,H,K,V] float32 (float64
with float64 inputs), starts bool [T], True where a document starts behind the tile's first token.
Matrix products run in the dtype of q; decays, states and their chain in the states' dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.linear import within_diagonal, within_scalar
from xdist_kernels.linear.blocks import (
    Block,
    Half,
    Prepared,
    chunk_size,
    each,
    each_dout,
    head_blocks,
    joined_states,
    joined_tokens,
)
from xdist_kernels.linear.chunks import (
    LOG2_E,
    DocumentIds,
    border_decays,
    carry,
    collect,
    document_ids,
    gate_gradient,
    group_size,
    spread,
    state_dtype,
    to_chunks,
    to_tokens,
)
from xdist_kernels.linear.halves import sums_behind


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    starts: Tensor | None = None,
) -> Prepared:
    """A tile's decay factors."""
    batch, n, heads, _ = v.shape
    ids = document_ids(starts, chunk_size(n))
    blocks = []
    for rows, own, shared in head_blocks(batch, heads, group_size(k, v), n):
        decay = None if log_decay is None else log_decay[rows, :, own]
        blocks.append(_block(q[rows, :, shared], k[rows, :, shared], v[rows, :, own], decay, ids))
    return Prepared(q, k, v, log_decay, scale, tuple(blocks))


def _block(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, ids: DocumentIds | None
) -> Block:
    batch, n, heads, _ = v.shape
    rows, chunk, wide = batch * heads, chunk_size(n), state_dtype(v)
    since = until = None
    if log_decay is None:
        totals = torch.zeros(rows, -(-n // chunk), 1, dtype=wide, device=v.device)
        if ids is not None:
            since, until = ids.since_start(rows).to(wide), ids.until_end(rows).to(wide)
        return Block(q, k, v, None, since, until, border_decays(totals, ids, wide), ids)
    g = to_chunks(log_decay, chunk).to(wide) * LOG2_E
    c = g.cumsum(1)
    borders = border_decays(c[:, -1].reshape(rows, -1, c.shape[-1]), ids, wide)
    since, until = c.exp2_(), sums_behind(g).exp2_()
    if ids is not None:
        since, until = since * ids.since_start(rows), until * ids.until_end(rows)
    return Block(q, k, v, g, since, until, borders, ids)


def transition(p: Prepared) -> Tensor | None:
    """Log M of a tile without `starts`: [B,H,1] or [B,H,K], summed in float64; None: no decay."""
    if p.log_decay is None:
        return None
    return p.log_decay.sum(1, dtype=torch.float64).to(state_dtype(p.v))


def _chunks(b: Block, x: Tensor) -> Tensor:
    """x [B,T,*,D] of this block as [R,C,D], key heads repeated for their value heads."""
    return to_chunks(spread(x, b.v.shape[2] // x.shape[2]), b.chunk)


def _scaled(x: Tensor, factor: Tensor | None) -> Tensor:
    # Converted first: a product of two dtypes is five times slower than one of equal dtypes.
    return x if factor is None else (x.to(factor.dtype) * factor).to(x.dtype)


def _add_scaled(total: Tensor, x: Tensor, factor: Tensor | None) -> None:
    """total += x * factor."""
    if factor is None:
        total += x
    elif total.dtype == factor.dtype:
        total.addcmul_(x.to(factor.dtype), factor)
    else:
        total += _scaled(x, factor)


def _outputs(b: Block, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[R,C,V] inside the chunks, without scale."""
    if b.g is not None and b.g.shape[-1] > 1:
        return within_diagonal.outputs(q, k, v, b.g, b.ids)
    return within_scalar.outputs(q, k, v, b.g, b.ids)


def _gradients(
    b: Block, q: Tensor, k: Tensor, v: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `_outputs`."""
    if b.g is not None and b.g.shape[-1] > 1:
        return within_diagonal.gradients(q, k, v, dout, b.g, b.ids)
    return within_scalar.gradients(q, k, v, dout, b.g, b.ids)


def _sums(b: Block, left: Tensor, right: Tensor) -> Tensor:
    """left^T right of each chunk, [rows, chunks, K, V] in the states' dtype."""
    found = torch.bmm(left.mT, right).to(b.borders.dtype)
    return found.view(b.borders.shape[0], -1, *found.shape[1:])


def _with_first(state: Tensor, entries: Tensor) -> Tensor:
    """[rows, chunks + 1, K, V]: the state before the tile, then what each chunk adds."""
    first = state.to(entries.dtype).reshape(entries.shape[0], 1, *entries.shape[2:])
    return torch.cat([first, entries], 1)


def _with_last(entries: Tensor, dstate: Tensor) -> Tensor:
    last = dstate.to(entries.dtype).reshape(entries.shape[0], 1, *entries.shape[2:])
    return torch.cat([entries, last], 1)


def advance(p: Prepared, state: Tensor) -> Tensor:
    """The state after the tile [B,H,K,V]; no outputs are computed."""
    parts = []
    for b, own in zip(p.blocks, each(p, state), strict=True):
        entries = _entries(b)
        parts.append(carry(b.borders[..., -1:, :], _with_first(own, entries)))
    return joined_states(parts, p)


def _entries(b: Block) -> Tensor:
    if b.entries is not None:
        return b.entries
    return _sums(b, _scaled(_chunks(b, b.k), b.until_end), _chunks(b, b.v))


def ahead(p: Prepared) -> Prepared:
    """The tile with all that `run` needs beside the state, outputs inside the chunks above all."""
    blocks = []
    for b in p.blocks:
        q, k, v = (_chunks(b, x) for x in (b.q, b.k, b.v))
        entries = _sums(b, _scaled(k, b.until_end), v)
        blocks.append(b._replace(inner=_outputs(b, q, k, v), entries=entries))
    return p._replace(blocks=tuple(blocks))


def run(p: Prepared, state: Tensor) -> tuple[Tensor, Tensor]:
    """out [B,T,H,V] in the dtype of v (it may be a strided view) and the state after the tile."""
    outs, ends = [], []
    for b, own in zip(p.blocks, each(p, state), strict=True):
        q, inner, entries = _chunks(b, b.q), b.inner, b.entries
        if inner is None or entries is None:
            k, v = _chunks(b, b.k), _chunks(b, b.v)
            inner, entries = _outputs(b, q, k, v), _sums(b, _scaled(k, b.until_end), v)
        states = carry(b.borders, _with_first(own, entries))
        into = states[:, :-1].reshape(-1, *states.shape[2:]).to(q.dtype)
        queries = _scaled(q, b.since_start)
        if inner.dtype == q.dtype:
            out = torch.baddbmm(inner, queries, into, beta=p.scale, alpha=p.scale)
        else:
            out = (inner + torch.bmm(queries, into)).mul_(p.scale)
        batch, n, heads, _ = b.v.shape
        outs.append(to_tokens(out.to(b.v.dtype), batch, heads, n))
        # A copy: a view would keep the states of all chunks of the tile until backward.
        ends.append(states[:, -1].clone())
    return joined_tokens(outs, p, p.v, p.v.dtype), joined_states(ends, p)


def adjoint(p: Prepared, dout: Tensor, dstate: Tensor) -> Tensor:
    """Gradient of the state before the tile from those of outputs and of the state after it."""
    parts = []
    for b, douts, own in zip(p.blocks, each_dout(p, dout), each(p, dstate), strict=True):
        queries = _scaled(_chunks(b, b.q), b.since_start)
        asked = _sums(b, queries, to_chunks(douts, b.chunk)).mul_(p.scale)
        parts.append(carry(b.borders.mT[..., :1, :], _with_last(asked, own)))
    return joined_states(parts, p)


def backward_ahead(p: Prepared, state: Tensor, dout: Tensor) -> Prepared:
    """The tile with all of `backward` that does not need the gradient of the state after it."""
    blocks = [
        b._replace(half=_half(b, own, douts, p.scale))
        for b, own, douts in zip(p.blocks, each(p, state), each_dout(p, dout), strict=True)
    ]
    return p._replace(blocks=tuple(blocks))


def _half(b: Block, state: Tensor, dout: Tensor, scale: float) -> Half:
    q, k, v = (_chunks(b, x) for x in (b.q, b.k, b.v))
    douts = to_chunks(dout, b.chunk) * scale
    entries = _sums(b, _scaled(k, b.until_end), v)
    states = carry(b.borders, _with_first(state, entries))
    into = states[:, :-1].reshape(-1, *states.shape[2:]).to(q.dtype)
    asked = _sums(b, _scaled(q, b.since_start), douts)
    dq, dk, dv = _gradients(b, q, k, v, douts)
    _add_scaled(dq, torch.bmm(douts, into.mT), b.since_start)
    return Half(q, k, v, dq, dk, dv, states, asked)


def backward(
    p: Prepared, state: Tensor, dout: Tensor, dstate: Tensor
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """(dq, dk, dv like the inputs, dlog_decay), and the gradient of the state before the tile.

    `state` is the one before the tile. dlog_decay has the shape of log_decay and the dtype of the
    states; None without decay. Everything but the state is recomputed.
    """
    found = []
    parts = zip(p.blocks, each(p, state), each_dout(p, dout), each(p, dstate), strict=True)
    for b, own, douts, after in parts:
        half = _half(b, own, douts, p.scale) if b.half is None else b.half
        found.append(_complete(b, half, after))
    grads = [
        joined_tokens([g.inputs[i] for g in found], p, x, x.dtype)
        for i, x in enumerate((p.q, p.k, p.v))
    ]
    dlog = None
    if p.log_decay is not None:
        dlog = joined_tokens([g.inputs[3] for g in found], p, p.log_decay, state_dtype(p.v))
    return (*grads, dlog), joined_states([g.before for g in found], p)


class _Gradients(NamedTuple):
    """Of a block: dq, dk, dv and, with decay, dlog_decay [b,T,*,D]; of the state before it."""

    inputs: tuple[Tensor, ...]
    before: Tensor


def _complete(b: Block, half: Half, dstate: Tensor) -> _Gradients:
    q, k, v, dq, dk, dv, states, asked = half
    dstates = carry(b.borders.mT, _with_last(asked, dstate))
    after = dstates[:, 1:].reshape(-1, *dstates.shape[2:]).to(q.dtype)
    if b.half is not None:
        dk, dv = dk.clone(), dv.clone()
    _add_scaled(dk, torch.bmm(v, after.mT), b.until_end)
    dv += torch.bmm(_scaled(k, b.until_end), after)
    batch, n, heads, _ = b.v.shape
    group = heads // b.q.shape[2]
    dtype = b.v.dtype
    grads = [collect(to_tokens(x.to(dtype), batch, heads, n), group) for x in (dq, dk)]
    grads.append(to_tokens(dv.to(dtype), batch, heads, n))
    if b.g is not None:
        wide = states.dtype
        ends = (dstates[:, 1:] * states[:, 1:]).sum(-1).reshape(-1, 1, q.shape[-1])
        slope = q.to(wide) * dq.to(wide) - k.to(wide) * dk.to(wide)
        if b.g.shape[-1] == 1:
            slope, ends = slope.sum(-1, keepdim=True), ends.sum(-1, keepdim=True)
        grads.append(to_tokens(gate_gradient(slope, ends, b.ids), batch, heads, n))
    return _Gradients(tuple(grads), dstates[:, 0].clone())
