"""Every gradient of one tile of the selective scan, by hand.

With g_t the gradient of h_t, w_t = g_t * exp(delta_t A) * h_{t-1} that of the exponent delta_t A:

    for i in L-1 .. 0:                     every chunk at once, some channels at a time
        g += C_i dy_i;      dC_i = <h_i, dy_i>;     dB_i = <g, delta_i u_i>;    dx_i = <B_i, g>
        g = exp(delta_i A) g;    w = g h_{i-1};     ddelta_i = <w, A>;          dA += w delta_i
    du = dx * delta;  ddelta += dx * u

The states of one block of channels are computed again and held, [L, rows, N, channels].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.selective_scan.blocks import (
    Block,
    Prepared,
    after_chunks,
    as_rows,
    before_chunks,
    blocks,
    chunk_decay,
    to_steps,
    to_tokens,
)
from xdist_kernels.selective_scan.torch import inner, outer


class _Gradients(NamedTuple):
    """As the tile's steps lie; A and the state are per block."""

    inputs: Tensor  # [L, rows, 1, C]
    exponents: Tensor  # [L, rows, 1, C] of delta, through exp(delta A)
    A: Tensor  # [N, C]
    B: Tensor  # [L, rows, N, 1]
    C: Tensor  # [L, rows, N, 1]


def backward(
    p: Prepared, state: Tensor, dout: Tensor, dstate: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Gradients of u, delta, A (this tile's part), B, C, and of the state before the tile.

    All are float32, or float64 with float64 inputs.
    """
    wide, (batch, tokens) = p.delta.dtype, p.u.shape[:2]
    douts = to_steps(dout.squeeze(3).to(wide), p.delta.shape[0]).unsqueeze(2)
    made = _Gradients(
        torch.empty_like(p.inputs, memory_format=torch.contiguous_format),
        torch.empty_like(p.inputs, memory_format=torch.contiguous_format),
        torch.empty_like(p.A),
        torch.zeros_like(p.B, memory_format=torch.contiguous_format),
        torch.zeros_like(p.B, memory_format=torch.contiguous_format),
    )
    p = backward_ahead(p, dout)
    assert p.ends is not None
    assert p.asked is not None
    decays = chunk_decay(p)
    before = as_rows(before_chunks(p, p.ends, decays, inner(state))[:-1])
    dbefore, *after = after_chunks(p, p.asked, decays, inner(dstate))
    dafter = as_rows(after)
    for block in blocks(p):
        states = _states(block, before[..., block.at])
        dy = douts[..., block.at].contiguous()
        _walk_back(block, states, dy, dafter[..., block.at].contiguous(), made)
    ddelta = made.exponents.squeeze(2)
    u = to_steps(p.u.squeeze(3).to(wide), p.delta.shape[0])
    ddelta.addcmul_(made.inputs.squeeze(2), u)
    du = made.inputs.mul_(p.delta).squeeze(2)

    def tokens_of(x: Tensor, dim: int) -> Tensor:
        return to_tokens(x, batch, tokens).unsqueeze(dim)

    grads = (
        tokens_of(du, 3),
        tokens_of(ddelta, 3),
        made.A.t(),
        tokens_of(made.B.squeeze(3), 2),
        tokens_of(made.C.squeeze(3), 2),
    )
    return grads, outer(dbefore)


def backward_ahead(p: Prepared, dout: Tensor) -> Prepared:
    """With what every chunk makes of zero and what its outputs ask of the state before it."""
    if p.ends is not None and p.asked is not None:
        return p
    douts = to_steps(dout.squeeze(3).to(p.delta.dtype), p.delta.shape[0]).unsqueeze(2)
    rows = p.delta.shape[1]
    ends, asked = p.A.new_empty(rows, *p.A.shape), p.A.new_empty(rows, *p.A.shape)
    for block in blocks(p):
        ends[..., block.at], asked[..., block.at] = _chunk_ends(block, douts[..., block.at])
    return p._replace(ends=ends, asked=asked)


def _chunk_ends(block: Block, dout: Tensor) -> tuple[Tensor, Tensor]:
    ends, asked = block.new_state(), block.new_state()
    decay, term = torch.empty_like(ends), torch.empty_like(ends)
    through = torch.ones_like(ends)
    for i, (x, b) in enumerate(zip(block.inputs, block.B, strict=True)):
        block.decay(i, decay)
        block.passes(ends, i).mul_(decay).addcmul_(x, b)
        block.passes(through, i).mul_(decay)
        asked.addcmul_(torch.mul(block.C[i].mT, dout[i], out=term), through)
    return ends, asked


def _states(block: Block, before: Tensor) -> Tensor:
    """The states before each chunk's first token and after each token,
    [L + 1, rows, N, channels]."""
    found = before.new_empty(len(block.delta) + 1, *before.shape)
    found[0] = before
    decay = torch.empty_like(before)
    for i, (x, b) in enumerate(zip(block.inputs, block.B, strict=True)):
        begins = block.starts[i]
        last = found[i] if begins is None else found[i].masked_fill(begins, 0)
        torch.mul(last, block.decay(i, decay), out=found[i + 1]).addcmul_(x, b)
    return found


def _walk_back(block: Block, states: Tensor, dout: Tensor, g: Tensor, made: _Gradients) -> None:
    """Writes the block's part of `made`; g [rows, N, channels] is overwritten."""
    at = block.at
    decay, w = torch.empty_like(g), torch.empty_like(g)
    dA = torch.zeros_like(g)
    for i in range(len(block.delta) - 1, -1, -1):
        dy, x, d = dout[i], block.inputs[i], block.delta[i]
        g.addcmul_(block.C[i].mT, dy)
        made.C[i] += torch.bmm(states[i + 1], dy.mT)
        made.B[i] += torch.bmm(g, x.mT)
        made.inputs[i, :, :, at] = torch.bmm(block.B[i].mT, g)
        block.passes(g.mul_(block.decay(i, decay)), i)
        torch.mul(g, states[i], out=w)
        dA.addcmul_(w, d)
        made.exponents[i, :, :, at] = w.mul_(block.A).sum(1, keepdim=True)
    made.A[:, at] = dA.sum(0)
