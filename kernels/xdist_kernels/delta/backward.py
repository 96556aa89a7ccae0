"""The chunked delta rule's backward pass, by hand; letters as in torch.py.

With N = b R what a chunk writes, dO the gradient of its outputs, dS that of the state after it:

    dN = A^T dO + K" dS                         for each chunk, last to first; the first product
    dS <- Q'^T dO + g dS - (b W)^T dN           of each line is batched before the loop
    dX = P^T (b dN)                             X = V - K' S, so dV = dX
    db = rowsum((dN - L^T dX) * R)
    [dA; dL] = [dO; -dX] N^T                    masked; queries and keys share each product
    [dQ; dK] = [dO; -dX] S^T decayed + ([dA; dL] * D) K
    dK      += N dS^T decayed        + ([dA; dL] * D)^T [Q; K]

Keys stand in two places: as rows that ask (first line of dK) and as what is seen (second). With
`asks` and `seen` for the two, the gradient of a log decay is, per key dim,

    dg_t = sum over i >= t of (q_i dq_i + k_i asks_i - k_i seen_i) + <dS, S> at the chunk's end

over tokens of t's document in the chunk, the last term where that document reaches its end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.delta.chunks import fused, to_chunks, to_tokens
from xdist_kernels.delta.products import scores_adjoint
from xdist_kernels.delta.torch import Chain, Prepared, by_chunk, chain, queries


class Asked(NamedTuple):
    """What a tile's outputs ask of it."""

    dout: Tensor  # [N, C, V] dO
    of_writes: Tensor  # [N, C, V] A^T dO
    of_state: Tensor  # [N, K, V] Q'^T dO


class Ready(NamedTuple):
    """What of the backward pass needs no gradient of the state after the tile."""

    tile: Prepared
    asked: Asked
    forward: Chain


class Gradients(NamedTuple):
    """Gradients of the inputs of `prepare`, in their shapes, float32 or wider: whoever adds up
    what several ranks have of one head rounds once, afterwards."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None


def _asked(p: Prepared, dout: Tensor) -> Asked:
    chunk = p.beta.shape[1]
    own = fused(to_chunks(dout, chunk), p.both.dtype)
    return Asked(own, torch.bmm(p.scores[:, :chunk].mT, own), torch.bmm(queries(p).mT, own))


def backward_ahead(p: Prepared, state: Tensor, dout: Tensor) -> Ready:
    """All of a tile's backward pass before the chain back; state: the one before the tile."""
    return Ready(p, _asked(p, dout), chain(p.links, state.flatten(0, 1)))


def _keys_to_end(p: Prepared) -> Tensor:
    """K" [N, C, K]."""
    keys = p.both[:, p.beta.shape[1] :]
    return keys if p.decays is None else keys * p.decays.until_end


def _chain_back(p: Prepared, asked: Asked, dstate: Tensor) -> Chain:
    """The chain from the tile's end: gradients of the states at all borders, and dN."""
    rows, _, width = dstate.shape
    weight, keys = by_chunk(p.links.weight * p.beta, rows), by_chunk(_keys_to_end(p), rows)
    of_writes, of_state = by_chunk(asked.of_writes, rows), by_chunk(asked.of_state, rows)
    count, _, chunk, _ = keys.shape
    dstates = dstate.new_empty(count + 1, *dstate.shape)
    dwrites = dstate.new_empty(count, rows, chunk, width)
    dstates[count] = dstate
    whole = None if p.links.whole is None else by_chunk(p.links.whole, rows)
    for i in range(count - 1, -1, -1):
        after = dstates[i + 1]
        torch.baddbmm(of_writes[i], keys[i], after, out=dwrites[i])
        kept = of_state[i] + after if whole is None else of_state[i].addcmul(after, whole[i])
        torch.baddbmm(kept, weight[i].mT, dwrites[i], alpha=-1, out=dstates[i])
    return Chain(dstates, dwrites.flatten(0, 1))


def adjoint(p: Prepared, dout: Tensor, dstate: Tensor) -> Tensor:
    """Gradient of the state before the tile, from those of its outputs [B,T,H,V] and of the state
    after it [B,H,K,V]."""
    back = _chain_back(p, _asked(p, dout), dstate.to(p.both.dtype).flatten(0, 1))
    return back.states[0].clone().view(dstate.shape)


def backward(
    tile: Prepared | Ready, state: Tensor, dout: Tensor, dstate: Tensor
) -> tuple[Gradients, Tensor]:
    """Gradients of a tile's inputs and of the state before it."""
    p, outputs, forward = tile if isinstance(tile, Ready) else backward_ahead(tile, state, dout)
    chunk, (states, lacks) = p.beta.shape[1], forward
    dstates, dwrites = _chain_back(p, outputs, dstate.to(p.both.dtype).flatten(0, 1))

    own = outputs.dout
    asked = own.new_empty(own.shape[0], 2 * chunk, own.shape[2])
    asked[:, :chunk] = own
    dv = torch.bmm(p.inverse.mT, dwrites * p.beta)
    torch.neg(dv, out=asked[:, chunk:])
    dbeta = torch.linalg.vecdot(torch.baddbmm(dwrites, p.scores[:, chunk:].mT, dv, alpha=-1), lacks)

    writes = lacks * p.beta
    dboth = torch.bmm(asked, states[:-1].flatten(0, 1).mT)
    dkeys = torch.bmm(writes, dstates[1:].flatten(0, 1).mT)
    if p.decays is not None:
        dboth.unflatten(1, (2, chunk)).mul_(p.decays.since_start[:, None])
        dkeys.mul_(p.decays.until_end)
    scores_adjoint(torch.bmm(asked, writes.mT), p.both, p.decays, dboth, dkeys)

    dlog = None
    if p.inputs.log_decay is not None:
        ends = (dstates[1:] * states[1:]).sum(-1).flatten(0, 1)
        dlog = _decay_gradient(p, dboth, dkeys, ends)
    dkeys += dboth[:, chunk:]
    dq = dboth[:, :chunk] * p.inputs.scale
    grads = _as_inputs(p, dq, dkeys, dv, dbeta[..., None], dlog)
    return grads, dstates[0].clone().view(state.shape)


def _decay_gradient(p: Prepared, dboth: Tensor, dkeys: Tensor, ends: Tensor) -> Tensor:
    """dg [N, C, Kd], summed inside chunks, so that rounding does not pile up over a sequence."""
    chunk, rows = dkeys.shape[1], p.inputs.v.shape[0] * p.inputs.v.shape[2]
    asks, keys = p.both * dboth, p.both[:, chunk:] * dkeys
    own = asks[:, :chunk] + asks[:, chunk:] - keys
    if p.decays is None or p.decays.token.shape[-1] == 1:
        own, ends = own.sum(-1, keepdim=True), ends.sum(-1, keepdim=True)
    own[:, -1] += ends
    later = torch.ones(chunk, chunk, dtype=own.dtype, device=own.device).triu()
    starts = p.inputs.starts
    if starts is None:
        return torch.matmul(later, own)
    starts = torch.nn.functional.pad(starts, (0, -starts.shape[0] % chunk)).view(-1, chunk)
    ids = starts.to(torch.int32).cumsum(1)
    later = later * (ids[:, :, None] == ids[:, None, :])
    sums = torch.matmul(later[:, None], by_chunk(own, rows)).view(own.shape)
    # A document's first decay acts on nothing.
    first = starts[:, None].expand(-1, rows, -1).reshape(-1, chunk, 1)
    return sums.masked_fill_(first, 0.0)


def _as_inputs(
    p: Prepared, dq: Tensor, dk: Tensor, dv: Tensor, dbeta: Tensor, dlog: Tensor | None
) -> Gradients:
    x = p.inputs
    batch, n, heads, _ = x.v.shape

    def tokens(grad: Tensor) -> Tensor:
        return to_tokens(grad, batch, heads, n)

    def shared(grad: Tensor, like: Tensor) -> Tensor:
        whole = tokens(grad)
        if like.shape[2] != heads:
            whole = whole.unflatten(2, (like.shape[2], -1)).sum(3)
        return whole

    return Gradients(
        shared(dq, x.q),
        shared(dk, x.k),
        tokens(dv),
        tokens(dbeta).squeeze(-1),
        None if dlog is None or x.log_decay is None else tokens(dlog).view(x.log_decay.shape),
    )
