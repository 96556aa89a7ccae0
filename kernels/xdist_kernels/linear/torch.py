"""Chunked gated linear attention over a run of any length, forward and explicit backward.

    for each tile of a few thousand tokens:            forward keeps the state at its start
        out[tile], state = chunk_..._forward(q, k, v, log_decay, scale, state)
    for each tile, last to first:                      backward recomputes what is inside
        dq, dk, dv, dlog_decay [tile], dstate = chunk_..._backward(..., saved state, dout, dstate)

Memory beyond inputs, outputs and gradients: one [B,H,K,V] state per tile, and the temporaries of
one tile of one block of heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from xdist_kernels.errors import KernelError
from xdist_kernels.linear.chunks import collect, group_size, spread, state_dtype
from xdist_kernels.linear.diagonal import chunk_diagonal_backward, chunk_diagonal_forward
from xdist_kernels.linear.pieces import TILE_TOKENS, tiles
from xdist_kernels.linear.scalar import chunk_scalar_backward, chunk_scalar_forward

# Rows (batch x heads) computed at once: enough for the matrix products, small enough for a cache.
BLOCK_ROWS = 8


@dataclass(frozen=True)
class Saved:
    """What the backward pass needs: the inputs, and one state per tile [tiles,B,H,K,V]."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    scale: float
    states: Tensor
    resets: Tensor | None


def check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    """Raise KernelError unless shapes and dtypes are those of `linear_attention_forward`."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or q.shape != k.shape or v.dim() != 4 or v.shape[:2] != q.shape[:2]:
        raise KernelError(f"q and k must be [B,n,Hk,K] and v [B,n,H,V]; got {shapes}")
    if v.shape[2] % max(1, q.shape[2]) or bool(q.shape[2]) != bool(v.shape[2]):
        raise KernelError(f"value heads must be a multiple of key heads; got {shapes}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise KernelError(f"one floating dtype is needed; got {q.dtype}, {k.dtype}, {v.dtype}")
    if log_decay is None:
        return
    if tuple(log_decay.shape) not in (
        (v.shape[2],),
        tuple(v.shape[:3]),
        (*v.shape[:3], q.shape[3]),
    ):
        raise KernelError(
            f"log_decay must be [H], [B,n,H] or [B,n,H,K]; got {tuple(log_decay.shape)}, {shapes}"
        )
    if not log_decay.is_floating_point():
        raise KernelError(f"log_decay must be floating; got {log_decay.dtype}")


def head_blocks(batch: int, heads: int, group: int) -> list[tuple[slice, slice, slice]]:
    """(batch, value heads, key heads) slices of at most BLOCK_ROWS rows, or one group of heads."""
    width = max(group, min(heads, BLOCK_ROWS) // group * group)
    deep = max(1, BLOCK_ROWS // width)
    return [
        (
            slice(b, min(b + deep, batch)),
            slice(h, min(h + width, heads)),
            slice(h // group, min(h + width, heads) // group),
        )
        for b in range(0, batch, deep)
        for h in range(0, heads, width)
    ]


def _decay_of(log_decay: Tensor | None, rows: slice, at: slice, heads: slice) -> Tensor | None:
    """The tile kernels' form of a canonical decay: [B,n,H], [B,n,H,K] or None."""
    if log_decay is None:
        return None
    part = log_decay[rows, at, heads]
    return part.squeeze(-1) if part.shape[-1] == 1 else part


def linear_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    resets: Tensor | None = None,
    tile: int = TILE_TOKENS,
) -> tuple[Tensor, Tensor, Saved]:
    """out [B,n,H,V] in the dtype of v, the state after the last token [B,H,K,V], and what to save.

    q, k [B,n,Hk,K], v [B,n,H,V], H % Hk == 0, float64, float32 or bfloat16; log_decay None,
    [B,n,H,1] or [B,n,H,K] (`canonical_decay`), finite and at most 0; initial_state [B,H,K,V];
    resets bool [n], True at each document's first token, where the state starts from zero.
    States are float32, or float64 with float64 inputs.
    """
    batch, n, heads, width = v.shape
    group = group_size(k, v)
    wide = state_dtype(q)
    state = v.new_zeros(batch, heads, q.shape[3], width, dtype=wide)
    if initial_state is not None:
        state.copy_(initial_state)
    spans = list(tiles(n, tile))
    states = state.new_empty(len(spans), *state.shape)
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    for index, at in enumerate(spans):
        states[index] = state
        cuts = None if resets is None else resets[at]
        for rows, own, shared in head_blocks(batch, heads, group):
            inputs = (spread(x[rows, at, shared], group) for x in (q, k))
            decay = _decay_of(log_decay, rows, at, own)
            out[rows, at, own], state[rows, own] = _forward_kernel(decay)(
                *inputs, v[rows, at, own], decay, scale, states[index][rows, own], resets=cuts
            )
    return out, state, Saved(q, k, v, log_decay, scale, states, resets)


def linear_attention_backward(
    saved: Saved, dout: Tensor, dfinal: Tensor | None, *, tile: int = TILE_TOKENS
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """dq, dk, dv like the inputs, dlog_decay (canonical form, float32 or wider; None without
    decay) and dinitial [B,H,K,V], from dout [B,n,H,V] and dfinal [B,H,K,V] (None: zero)."""
    q, k, v, log_decay = saved.q, saved.k, saved.v, saved.log_decay
    batch, n, heads, _ = v.shape
    group = group_size(k, v)
    wide = state_dtype(q)
    dstate = saved.states.new_zeros(batch, heads, q.shape[3], v.shape[3])
    if dfinal is not None:
        dstate.copy_(dfinal)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    dlog = None
    if log_decay is not None:
        dlog = torch.empty(log_decay.shape, dtype=wide, device=log_decay.device)
    spans = list(tiles(n, tile))
    for index in range(len(spans) - 1, -1, -1):
        at = spans[index]
        cuts = None if saved.resets is None else saved.resets[at]
        for rows, own, shared in head_blocks(batch, heads, group):
            inputs = (spread(x[rows, at, shared], group) for x in (q, k))
            decay = _decay_of(log_decay, rows, at, own)
            grads = _backward_kernel(decay)(
                *inputs,
                v[rows, at, own],
                decay,
                saved.scale,
                saved.states[index][rows, own],
                dout[rows, at, own],
                dstate[rows, own],
                resets=cuts,
            )
            dq[rows, at, shared] = collect(grads[0], group)
            dk[rows, at, shared] = collect(grads[1], group)
            dv[rows, at, own] = grads[2]
            if dlog is not None:
                dlog[rows, at, own] = grads[3].view(dlog[rows, at, own].shape)
            dstate[rows, own] = grads[4]
    return dq, dk, dv, dlog, dstate


def _forward_kernel(decay: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
    diagonal = decay is not None and decay.dim() == 4
    return chunk_diagonal_forward if diagonal else chunk_scalar_forward


def _backward_kernel(decay: Tensor | None) -> Callable[..., tuple]:
    diagonal = decay is not None and decay.dim() == 4
    return chunk_diagonal_backward if diagonal else chunk_scalar_backward
