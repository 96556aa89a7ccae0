"""Gated linear attention of ONE tile of a few thousand tokens, scalar decay per head: the fast CPU path.

What the streaming model calls for every tile: forward and backward are explicit, every product is
a batched matrix product over chunks, and packed documents are masks, so that any number of cuts
costs nothing and no slice is taken in a loop.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        (S = 0 before the first token of a document)
    o_t = scale * S_t^T q_t

In chunks of C tokens, with c_i the running sum of g inside a chunk (MATH.md 1, "chunked form"):

    o_i = scale * ( sum_{j<=i} exp(c_i - c_j) (q_i . k_j) v_j  +  exp(c_i) S_in^T q_i )
    E   = sum_j exp(c_C - c_j) k_j v_j^T ,    S_out = exp(c_C) S_in + E

and the states of all chunks come from one product with a lower-triangular matrix of decays.
Heads are strided views of one tensor: nothing is permuted or copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 32
# torch.exp2 is three times faster than torch.exp on a CPU: decays are taken to base 2 first.
_LOG2_E = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class Decays:
    """Decay factors of a tile; N = B * chunks, C tokens a chunk. Zero across a document's start.

    intra [H, N, C, C]: exp(c_i - c_j) * scale for j <= i; query [N, C, H]: exp(c_i) * scale;
    key [N, C, H]: exp(c_C - c_j); states [B, H, chunks + 1, chunks + 1]: from (incoming state,
    the chunks' E) to (state before each chunk, state after the tile).
    """

    intra: Tensor
    query: Tensor
    key: Tensor
    states: Tensor


def _document_index(starts: Tensor, chunks: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Documents counted inside the tile: per token [chunks, C], before and at the end of each chunk."""
    index = starts.to(torch.int32).cumsum(0).view(chunks, size)
    last = index[:, -1]
    before = torch.cat([last.new_zeros(1), last[:-1]])
    return index, before, last


def decays(
    log_decay: Tensor, scale: float, starts: Tensor | None = None, *, chunk: int = CHUNK
) -> Decays:
    """The factors of a tile.

    log_decay: [B, T, H], T a multiple of `chunk`; starts: bool [T], True at a document's first
    token (None: no document starts here).
    """
    batch, tokens, heads = log_decay.shape
    chunks = tokens // chunk
    running = (log_decay * _LOG2_E).view(batch * chunks, chunk, heads).cumsum(1)
    by_head = running.permute(2, 0, 1)
    total = running[:, -1:, :]
    # Beyond the diagonal the exponent would be positive and could overflow: cut before exp.
    intra = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).clamp_(max=0.0).exp2_()
    query = running.exp2()
    key = (total - running).exp2_()
    along = total.view(batch, chunks, heads).transpose(1, 2).cumsum(-1)
    zero = along.new_zeros(batch, heads, 1)
    after = torch.cat([zero, along], -1)
    states = (after.unsqueeze(-1) - after.unsqueeze(-2)).clamp_(max=0.0).exp2_().tril_()
    if starts is None:
        intra.mul_(torch.ones(chunk, chunk, dtype=intra.dtype, device=intra.device).tril_())
    else:
        index, before, last = _document_index(starts, chunks, chunk)
        same = (index.unsqueeze(-1) == index.unsqueeze(-2)).tril_()
        intra.view(heads, batch, chunks, chunk, chunk).mul_(same)
        shape = (batch, chunks, chunk, heads)
        query.view(shape).mul_((index == before.unsqueeze(-1)).unsqueeze(-1))
        key.view(shape).mul_((index == last.unsqueeze(-1)).unsqueeze(-1))
        # A state made by the end of chunk j reaches chunk c if no document started in between.
        ends = torch.cat([last.new_zeros(1), last])
        states.mul_(ends.unsqueeze(-1) == ends.unsqueeze(-2))
    return Decays(intra.mul_(scale), query.mul_(scale), key, states)


def _heads(z: Tensor, heads: int, which: int) -> list[Tensor]:
    """Per head views [N, C, D] of part `which` (0 q, 1 k, 2 v) of z [N, C, 3 * H * D]."""
    size = z.shape[-1] // (3 * heads)
    first = which * heads * size
    return [z[..., first + h * size : first + (h + 1) * size] for h in range(heads)]


def _scaled(z: Tensor, heads: int, which: int, factor: Tensor) -> Tensor:
    """Part `which` of z times a factor per token and head -> [N, C, H, D]."""
    rows, size, width = z.shape
    part = z.view(rows, size, 3, heads, width // (3 * heads))[:, :, which]
    return part * factor.unsqueeze(-1)


def _states(key: Tensor, values: list[Tensor], factors: Tensor, state: Tensor) -> Tensor:
    """States before each chunk and after the tile, [B, H, chunks + 1, K, V]."""
    batch, heads, _, _ = factors.shape
    size = values[0].shape[-1]
    sums = [state.unsqueeze(2)]
    own = torch.stack([key[:, :, h].transpose(1, 2).bmm(values[h]) for h in range(heads)])
    own = own.view(heads, batch, -1, size, size).transpose(0, 1)
    sums = torch.cat([state.unsqueeze(2), own], 2).flatten(3)
    return (factors @ sums).view(batch, heads, -1, size, size)


def summary(z: Tensor, factors: Decays, state: Tensor) -> Tensor:
    """The state after the tile, [B, H, K, V], without its outputs.

    z: [N, C, 3 * H * D] (q, k, v of all heads after each other); state: the one before the tile.
    """
    heads = state.shape[1]
    key = _scaled(z, heads, 1, factors.key)
    return _states(key, _heads(z, heads, 2), factors.states[:, :, -1:], state)[:, :, 0]


def states(z: Tensor, factors: Decays, state: Tensor) -> Tensor:
    """The states before each chunk and after the tile, [B, H, chunks + 1, K, V]."""
    heads = state.shape[1]
    key = _scaled(z, heads, 1, factors.key)
    return _states(key, _heads(z, heads, 2), factors.states, state)


def forward(z: Tensor, factors: Decays, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [N, C, H * D] and all states [B, H, chunks + 1, K, V] (the last: after the tile)."""
    heads = state.shape[1]
    queries, keys, values = (_heads(z, heads, part) for part in range(3))
    through = states(z, factors, state)
    before = through[:, :, :-1].transpose(0, 1).flatten(1, 2)
    query = _scaled(z, heads, 0, factors.query)
    out = torch.empty_like(query)
    for h in range(heads):
        weight = queries[h].bmm(keys[h].transpose(1, 2)).mul_(factors.intra[h])
        part = weight.bmm(values[h])
        out[:, :, h] = part.baddbmm_(query[:, :, h], before[h])
    return out.flatten(2), through


def adjoint_summary(z: Tensor, factors: Decays, dout: Tensor, dstate: Tensor) -> Tensor:
    """Gradient of the state before the tile from dout [N, C, H * D] and that of the state after."""
    heads = dstate.shape[1]
    query = _scaled(z, heads, 0, factors.query)
    size = dout.shape[-1] // heads
    douts = [dout[..., h * size : (h + 1) * size] for h in range(heads)]
    return _adjoint_states(query, douts, factors.states[..., :1], dstate)[:, :, 0]


def _adjoint_states(query: Tensor, douts: list[Tensor], factors: Tensor, dstate: Tensor) -> Tensor:
    """Gradients of the state before the tile and of each chunk's E, [B, H, chunks + 1, K, V]."""
    batch, heads, _, _ = factors.shape
    size = douts[0].shape[-1]
    own = torch.stack([query[:, :, h].transpose(1, 2).bmm(douts[h]) for h in range(heads)])
    own = own.view(heads, batch, -1, size, size).transpose(0, 1)
    sums = torch.cat([own, dstate.unsqueeze(2)], 2).flatten(3)
    return (factors.transpose(-1, -2) @ sums).view(batch, heads, -1, size, size)


def backward(
    z: Tensor, factors: Decays, through: Tensor, dout: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one tile.

    through: the states as `states` or `forward` returns them; dout: [N, C, H * D]; dstate: [B, H, K, V], the gradient of
    the state after the tile. Returns dz like z, dlog_decay [B, T, H], and the gradient of the
    state before the tile.
    """
    batch, heads = through.shape[:2]
    rows, size, width = z.shape
    dim = width // (3 * heads)
    queries, keys, values = (_heads(z, heads, part) for part in range(3))
    douts = [dout[..., h * dim : (h + 1) * dim] for h in range(heads)]
    query = _scaled(z, heads, 0, factors.query)
    key = _scaled(z, heads, 1, factors.key)
    adjoint = _adjoint_states(query, douts, factors.states, dstate)
    before = through[:, :, :-1].transpose(0, 1).flatten(1, 2)
    after = adjoint[:, :, 1:].transpose(0, 1).flatten(1, 2)
    dz = torch.empty(rows, size, 3, heads, dim, dtype=z.dtype, device=z.device)
    for h in range(heads):
        weight = queries[h].bmm(keys[h].transpose(1, 2)).mul_(factors.intra[h])
        dz[:, :, 2, h] = weight.transpose(1, 2).bmm(douts[h]).baddbmm_(key[:, :, h], after[h])
        dweight = douts[h].bmm(values[h].transpose(1, 2)).mul_(factors.intra[h])
        dquery = douts[h].bmm(before[h].transpose(1, 2)).mul_(factors.query[..., h : h + 1])
        dz[:, :, 0, h] = dquery.baddbmm_(dweight, keys[h])
        dkey = values[h].bmm(after[h].transpose(1, 2)).mul_(factors.key[..., h : h + 1])
        dz[:, :, 1, h] = dkey.baddbmm_(dweight.transpose(1, 2), queries[h])
    # d c_t = q_t . dq_t - k_t . dk_t, and log_decay_t enters every later c of its chunk; what flows
    # on is the inner product of the state after the chunk with its gradient (MATH.md 0).
    parts = z.view(rows, size, 3, heads, dim)[:, :, :2] * dz[:, :, :2]
    parts = parts.sum(-1)
    slope = parts[:, :, 0] - parts[:, :, 1]  # [N, C, H]
    edge = _edge(through, adjoint)
    total = slope.sum(1, keepdim=True) + edge
    dlog_decay = (total - slope.cumsum(1) + slope).view(batch, -1, heads)
    return dz.view(rows, size, width), dlog_decay, adjoint[:, :, 0]


def _edge(through: Tensor, adjoint: Tensor) -> Tensor:
    """<S, dS> after each chunk, [N, 1, H]."""
    dot = torch.linalg.vecdot(through[:, :, 1:].flatten(3), adjoint[:, :, 1:].flatten(3))
    return dot.permute(0, 2, 1).reshape(-1, 1, through.shape[1])
