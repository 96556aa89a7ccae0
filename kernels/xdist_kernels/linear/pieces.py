"""The linear maps between a run of tokens and the state at its borders, one by one.

The output of a run is affine in the state it starts from, so a run whose incoming state is still
on its way can be computed from zero and completed later. With M = diag(exp(sum of log decays)),
c_t = cumulative log decay up to t and c_n that of the whole run:

    S_out = M S_in + E         E    = sum_t exp(c_n - c_t) k_t v_t^T         summary
    O    += scale exp(c) Q S_in                                              apply_state
    dS_in = M^T dS_out + dE    dE   = scale sum_t exp(c_t) q_t do_t^T        adjoint_summary
    dQ   += scale exp(c) dO S_in^T                                           apply_state_adjoint
    dK   += exp(c_n - c) V dS_out^T,  dV += exp(c_n - c) K dS_out            summary_adjoint

Shapes: q, k [B,n,Hk,K] (each key head shared by H/Hk value heads), v, dout [B,n,H,V], states
[B,H,K,V] float32 (float64 with float64 inputs); log_decay is canonical: None, [B,n,H,1] or
[B,n,H,K] (`canonical_decay`). Tokens of one document only: callers slice. Products run in the
states' dtype: these results are added across ranks. Work proceeds in tiles, so that memory
beyond inputs and outputs does not grow with n.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from xdist_kernels.linear.chunks import collect, group_size, spread, state_dtype

TILE_TOKENS = 4096


def canonical_decay(log_decay: Tensor | None, v: Tensor, key_dim: int) -> Tensor | None:
    """[H], [B,n,H] or [B,n,H,K] -> a [B,n,H,1] or [B,n,H,K] view; None stays None."""
    if log_decay is None or log_decay.dim() == 4:
        return log_decay
    if log_decay.dim() == 1:
        return log_decay.view(1, 1, -1, 1).expand(*v.shape[:3], 1)
    return log_decay[..., None]


def reduce_decay_gradient(dlog_decay: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Adjoint of `canonical_decay`: sums over batch and tokens for an [H] decay."""
    if dlog_decay is None or like is None:
        return None
    if like.dim() == 1:
        dlog_decay = dlog_decay.sum((0, 1, 3))
    return dlog_decay.view(like.shape).to(like.dtype)


def tiles(n: int, tile: int = TILE_TOKENS) -> Iterator[slice]:
    """Consecutive slices of at most `tile` tokens that cover n."""
    for start in range(0, n, tile):
        yield slice(start, min(start + tile, n))


def log_transition(log_decay: Tensor | None, wide: torch.dtype) -> Tensor | None:
    """Log of the diagonal of M: [B,H,1] or [B,H,K], summed in float64; None without decay."""
    return None if log_decay is None else log_decay.sum(1, dtype=torch.float64).to(wide)


def transition_times(log_m: Tensor | None, state: Tensor) -> Tensor:
    """M S (M is diagonal, so M^T S as well)."""
    return state if log_m is None else state * log_m.to(state.dtype).exp()[..., None]


def _cumulative(log_decay: Tensor, before: Tensor | float) -> Tensor:
    """Cumulative log decay of one tile in float64, on top of `before` [B,1,H,*]."""
    return log_decay.double().cumsum(1) + before


def _since_start(log_decay: Tensor | None, n: int, wide: torch.dtype) -> Iterator:
    """(slice, exp(c_t) or None) per tile."""
    before: Tensor | float = 0.0
    for at in tiles(n):
        if log_decay is None:
            yield at, None
            continue
        c = _cumulative(log_decay[:, at], before)
        before = c[:, -1:]
        yield at, c.to(wide).exp_()


def _until_end(log_decay: Tensor | None, n: int, wide: torch.dtype) -> Iterator:
    """(slice, exp(c_n - c_t) or None) per tile, from the last tile to the first."""
    after: Tensor | float = 0.0
    for at in reversed(list(tiles(n))):
        if log_decay is None:
            yield at, None
            continue
        c = _cumulative(log_decay[:, at], 0.0)
        total = c[:, -1:]
        yield at, (total - c + after).to(wide).exp_()
        after = after + total


def _times(x: Tensor, factor: Tensor | None, wide: torch.dtype) -> Tensor:
    x = x.to(wide)
    return x if factor is None else x * factor


def summary(k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """(log M, E): log M [B,H,1] or [B,H,K] (None without decay), E [B,H,K,V]."""
    wide = state_dtype(k)
    group = group_size(k, v)
    total = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=wide)
    for at, factor in _until_end(log_decay, k.shape[1], wide):
        keys = _times(spread(k[:, at], group), factor, wide)
        total += torch.einsum("bnhk,bnhv->bhkv", keys, v[:, at].to(wide))
    return log_transition(log_decay, wide), total


def adjoint_summary(q: Tensor, dout: Tensor, log_decay: Tensor | None, scale: float) -> Tensor:
    """dE [B,H,K,V]: what the run's outputs ask of the state it starts from."""
    wide = state_dtype(q)
    group = group_size(q, dout)
    total = q.new_zeros(q.shape[0], dout.shape[2], q.shape[3], dout.shape[3], dtype=wide)
    for at, factor in _since_start(log_decay, q.shape[1], wide):
        queries = _times(spread(q[:, at], group), factor, wide)
        total += torch.einsum("bnhk,bnhv->bhkv", queries, dout[:, at].to(wide))
    return total.mul_(scale)


def apply_state(
    out: Tensor, q: Tensor, log_decay: Tensor | None, state: Tensor, scale: float
) -> None:
    """Add to `out` [B,n,H,V] what the state at the run's start contributes."""
    wide = state_dtype(q)
    group = group_size(q, out)
    for at, factor in _since_start(log_decay, q.shape[1], wide):
        queries = _times(spread(q[:, at], group), factor, wide)
        part = torch.einsum("bnhk,bhkv->bnhv", queries, state).mul_(scale)
        out[:, at] += part.to(out.dtype)


def apply_state_adjoint(
    dq: Tensor,
    dlog_decay: Tensor | None,
    q: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    dout: Tensor,
    scale: float,
) -> None:
    """Add to dq and dlog_decay what comes through `apply_state` (its dstate: `adjoint_summary`).

    The decay of token t acts on every later output: a reverse cumulative sum of q.dq.
    """
    wide = state_dtype(q)
    group = group_size(q, dout)
    slopes = []
    for at, factor in _since_start(log_decay, q.shape[1], wide):
        part = torch.einsum("bnhv,bhkv->bnhk", dout[:, at].to(wide), state).mul_(scale)
        part = part if factor is None else part.mul_(factor)
        dq[:, at] += collect(part, group).to(dq.dtype)
        if log_decay is not None:
            slope = part * spread(q[:, at], group)
            slopes.append(slope if log_decay.shape[-1] > 1 else slope.sum(-1, keepdim=True))
    if dlog_decay is None or not slopes:
        return
    later: Tensor | float = 0.0
    for at, slope in zip(reversed(list(tiles(q.shape[1]))), reversed(slopes), strict=True):
        sums = slope.flip(1).cumsum(1).flip(1) + later
        later = sums[:, :1]
        dlog_decay[:, at] += sums


def summary_adjoint(
    dk: Tensor,
    dv: Tensor,
    dlog_decay: Tensor | None,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    dstate: Tensor,
) -> None:
    """Add to dk, dv and dlog_decay what comes through E, given the gradient of S_out.

    The decay of token t acts on every earlier key: an exclusive cumulative sum of k.dk.
    """
    wide = state_dtype(k)
    group = group_size(k, v)
    slopes = []
    for at, factor in _until_end(log_decay, k.shape[1], wide):
        part = torch.einsum("bnhv,bhkv->bnhk", v[:, at].to(wide), dstate)
        part = part if factor is None else part.mul_(factor)
        dk[:, at] += collect(part, group).to(dk.dtype)
        keys = spread(k[:, at], group)
        values = torch.einsum("bnhk,bhkv->bnhv", _times(keys, factor, wide), dstate)
        dv[:, at] += values.to(dv.dtype)
        if log_decay is not None:
            slope = part * keys
            slopes.append(slope if log_decay.shape[-1] > 1 else slope.sum(-1, keepdim=True))
    if dlog_decay is None or not slopes:
        return
    earlier: Tensor | float = 0.0
    for at, slope in zip(tiles(k.shape[1]), reversed(slopes), strict=True):
        sums = slope.cumsum(1) + earlier
        dlog_decay[:, at] += sums - slope
        earlier = sums[:, -1:]


def transition_adjoint(
    dlog_decay: Tensor | None, log_m: Tensor | None, state: Tensor, dstate: Tensor
) -> None:
    """Add to dlog_decay what comes through M S_in: the same <dS_out, M S_in> for every token."""
    if dlog_decay is None:
        return
    whole = (dstate * transition_times(log_m, state)).sum(-1)
    if dlog_decay.shape[-1] == 1:
        whole = whole.sum(-1, keepdim=True)
    dlog_decay += whole[:, None]
