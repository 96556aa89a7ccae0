"""Gated linear attention of ONE tile of a few thousand tokens, one decay per head: the fast path.

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

from xdist_kernels.linear.halves import sums_behind, sums_between, within

CHUNK = 32
# torch.exp2 is three times faster than torch.exp on a CPU: decays are taken to base 2 first.
_LOG2_E = 1.0 / math.log(2.0)


@dataclass(frozen=True)
class Decays:
    """Decay factors of a tile; N = B * chunks, C tokens a chunk. Zero across a document's start.

    intra [H, N, C, C]: exp(c_i - c_j) * scale for j <= i; query [N, C, H * D]: exp(c_i) * scale;
    key [N, C, H * D]: exp(c_C - c_j), both repeated over the D channels of a head;
    states [H, B, chunks + 1, chunks + 1]: from (incoming state, the chunks' E) to (state before
    each chunk, state after the tile).
    """

    intra: Tensor
    query: Tensor
    key: Tensor
    states: Tensor


def _spread(heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[H, H * D]: repeats a number per head over its D channels, as a product."""
    return torch.eye(heads, dtype=dtype, device=device).repeat_interleave(dim, 1)


def _slopes(heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[2 * H * D, H]: sums over the channels of q minus those of k, per head, as a product."""
    one = _spread(heads, dim, dtype, device).t()
    return torch.cat([one, -one])


def _document_index(starts: Tensor, chunks: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Documents counted inside the tile: per token [chunks, C], before and after each chunk."""
    index = starts.to(torch.int32).cumsum(0).view(chunks, size)
    last = index[:, -1]
    before = torch.cat([last.new_zeros(1), last[:-1]])
    return index, before, last


def decays(
    log_decay: Tensor,
    scale: float,
    starts: Tensor | None = None,
    *,
    dim: int,
    chunk: int = CHUNK,
) -> Decays:
    """The factors of a tile.

    log_decay: [B, T, H], T a multiple of `chunk`, a power of two; starts: bool [T], True at a
    document's first token (None: no document starts here); dim: channels of a head.
    """
    batch, tokens, heads = log_decay.shape
    chunks = tokens // chunk
    kind = (log_decay.dtype, log_decay.device)
    own = (log_decay * _LOG2_E).view(batch * chunks, chunk, heads)
    by_head = own.permute(2, 0, 1).reshape(-1, chunk, 1)
    intra = within(by_head, log_decay.dtype).mul_(scale).view(heads, -1, chunk, chunk)
    query = own.cumsum(1).add_(math.log2(scale)).exp2_()
    key = sums_behind(own).exp2_()
    totals = by_head.view(heads, batch, chunks, chunk).sum(-1, dtype=torch.float64)
    states = sums_between(totals).to(log_decay.dtype).exp2_().tril_()
    if starts is not None:
        index, before, last = _document_index(starts, chunks, chunk)
        same = index.unsqueeze(-1) == index.unsqueeze(-2)
        intra.view(heads, batch, chunks, chunk, chunk).mul_(same)
        shape = (batch, chunks, chunk, heads)
        query.view(shape).mul_((index == before.unsqueeze(-1)).unsqueeze(-1))
        key.view(shape).mul_((index == last.unsqueeze(-1)).unsqueeze(-1))
        # A state made by the end of chunk j reaches chunk c if no document started in between.
        ends = torch.cat([last.new_zeros(1), last])
        states.mul_(ends.unsqueeze(-1) == ends.unsqueeze(-2))
    spread = _spread(heads, dim, *kind)
    return Decays(intra, query @ spread, key @ spread, states)


def _heads(z: Tensor, heads: int, which: int) -> list[Tensor]:
    """Per head views [N, C, D] of part `which` (0 q, 1 k, 2 v) of z [N, C, 3 * H * D]."""
    size = z.shape[-1] // (3 * heads)
    return _split(z, heads, which * heads * size, size)


def _split(x: Tensor, heads: int, first: int, size: int) -> list[Tensor]:
    return [x[..., first + h * size : first + (h + 1) * size] for h in range(heads)]


def _query(z: Tensor, factors: Decays) -> Tensor:
    """q * exp(c) * scale, [N, C, H * D]."""
    return z[..., : factors.query.shape[-1]] * factors.query


def _key(z: Tensor, factors: Decays) -> Tensor:
    """k * exp(c_C - c), [N, C, H * D]."""
    width = factors.key.shape[-1]
    return z[..., width : 2 * width] * factors.key


def _chunk_sums(left: Tensor, rights: list[Tensor], batch: int, first: int) -> Tensor:
    """left^T right of each chunk in slots first.. of [H, B, chunks + 1, K, V]; one slot is free."""
    heads = len(rights)
    rows, _, size = rights[0].shape
    sums = left.new_empty(heads, batch, rows // batch + 1, size, size)
    for h, part in enumerate(_split(left, heads, 0, size)):
        own = sums[h, :, first : first + rows // batch]
        if batch == 1:
            torch.bmm(part.transpose(1, 2), rights[h], out=own[0])
        else:
            own.copy_(part.transpose(1, 2).bmm(rights[h]).view_as(own))
    return sums


def states(z: Tensor, factors: Decays, state: Tensor) -> Tensor:
    """The states before each chunk and after the tile, [H, B, chunks + 1, K, V].

    z: [N, C, 3 * H * D] (q, k, v of all heads after each other); state [B, H, K, V]: the one
    before the tile.
    """
    batch, heads = state.shape[:2]
    sums = _chunk_sums(_key(z, factors), _heads(z, heads, 2), batch, 1)
    sums[:, :, 0] = state.transpose(0, 1)
    return (factors.states @ sums.flatten(3)).unflatten(-1, sums.shape[-2:])


def summary(kv: Tensor, factors: Decays, state: Tensor) -> Tensor:
    """The state after the tile, [B, H, K, V], from keys and values kv [N, C, 2 * H * D] alone."""
    batch, heads = state.shape[:2]
    keys, values = kv.chunk(2, -1)
    sums = _chunk_sums(keys * factors.key, _split(values, heads, 0, state.shape[3]), batch, 1)
    sums[:, :, 0] = state.transpose(0, 1)
    after = factors.states[:, :, -1:] @ sums.flatten(3)
    return after.view(heads, *state.shape[:1], *state.shape[2:]).transpose(0, 1)


def _of_chunks(states: Tensor, first: int) -> list[Tensor]:
    """Per head the states [N, K, V] from slot `first`, one a chunk."""
    count = states.shape[2] - 1
    return [own[:, first : first + count].flatten(0, 1) for own in states]


def forward(z: Tensor, factors: Decays, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [N, C, H * D] and all states as `states` gives them."""
    heads = state.shape[1]
    queries, keys, values = (_heads(z, heads, part) for part in range(3))
    through = states(z, factors, state)
    scaled = _query(z, factors)
    size = scaled.shape[-1] // heads
    out = torch.empty_like(scaled)
    owns, froms = _split(out, heads, 0, size), _split(scaled, heads, 0, size)
    for h, before in enumerate(_of_chunks(through, 0)):
        weight = queries[h].bmm(keys[h].transpose(1, 2)).mul_(factors.intra[h])
        owns[h].copy_(weight.bmm(values[h]).baddbmm_(froms[h], before))
    return out, through


def adjoint_summary(z: Tensor, factors: Decays, dout: Tensor, dstate: Tensor) -> Tensor:
    """Gradient of the state before the tile from dout [N, C, H * D] and that of the state after."""
    return _adjoint(z, factors, dout, dstate, factors.states[..., :1])[:, :, 0].transpose(0, 1)


def _adjoint(z: Tensor, factors: Decays, dout: Tensor, dstate: Tensor, wanted: Tensor) -> Tensor:
    """Gradients of the state before the tile and of each chunk's E, [H, B, chunks + 1, K, V]."""
    batch, heads = dstate.shape[:2]
    size = dstate.shape[-1]
    sums = _chunk_sums(_query(z, factors), _split(dout, heads, 0, size), batch, 0)
    sums[:, :, -1] = dstate.transpose(0, 1)
    return (wanted.transpose(-1, -2) @ sums.flatten(3)).unflatten(-1, sums.shape[-2:])


def backward(
    z: Tensor, factors: Decays, through: Tensor, dout: Tensor, dstate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one tile.

    through: the states as `states` or `forward` returns them; dout: [N, C, H * D]; dstate:
    [B, H, K, V], the gradient of the state after the tile. Returns dz like z, dlog_decay
    [B, T, H], and the gradient of the state before the tile.
    """
    batch, heads, _, dim = dstate.shape
    queries, keys, values = (_heads(z, heads, part) for part in range(3))
    douts = _split(dout, heads, 0, dim)
    adjoint = _adjoint(z, factors, dout, dstate, factors.states)
    scaled = _split(_key(z, factors), heads, 0, dim)
    dz = torch.empty_like(z)
    dqueries, dkeys, dvalues = (_heads(dz, heads, part) for part in range(3))
    befores, afters = _of_chunks(through, 0), _of_chunks(adjoint, 1)
    for h in range(heads):
        of_query, of_key = factors.query[..., h * dim, None], factors.key[..., h * dim, None]
        weight = queries[h].bmm(keys[h].transpose(1, 2)).mul_(factors.intra[h])
        dvalues[h].copy_(weight.transpose(1, 2).bmm(douts[h]).baddbmm_(scaled[h], afters[h]))
        dweight = douts[h].bmm(values[h].transpose(1, 2)).mul_(factors.intra[h])
        dquery = douts[h].bmm(befores[h].transpose(1, 2)).mul_(of_query)
        dqueries[h].copy_(dquery.baddbmm_(dweight, keys[h]))
        dkey = values[h].bmm(afters[h].transpose(1, 2)).mul_(of_key)
        dkeys[h].copy_(dkey.baddbmm_(dweight.transpose(1, 2), queries[h]))
    # d c_t = q_t . dq_t - k_t . dk_t, and log_decay_t enters every later c of its chunk; what flows
    # on is the inner product of the state after the chunk with its gradient (MATH.md 0).
    both = 2 * heads * dim
    slope = (z[..., :both] * dz[..., :both]) @ _slopes(heads, dim, z.dtype, z.device)  # [N, C, H]
    edge = torch.linalg.vecdot(through[:, :, 1:].flatten(3), adjoint[:, :, 1:].flatten(3))
    total = slope.sum(1, keepdim=True) + edge.permute(1, 2, 0).reshape(-1, 1, heads)
    dlog_decay = (total - slope.cumsum(1) + slope).view(batch, -1, heads)
    return dz, dlog_decay, adjoint[:, :, 0].transpose(0, 1)
