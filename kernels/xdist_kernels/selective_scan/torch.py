"""The selective scan of one tile of tokens (Mamba-1), forward and the gradient of its state.

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t,    y_t = <C_t, h_t>

    for channels in blocks:
        for i in 0 .. L-1:                 every chunk at once
            h = exp(delta_i A) h + (delta_i u_i) B_i          from h = 0: what a chunk makes of zero
        S = states before the chunks       a scan over chunks, M = exp(A * sum of delta)
        for i in 0 .. L-1:
            S = exp(delta_i A) S + (delta_i u_i) B_i;  y_i = C_i . S

Exponents are at most 0 for delta >= 0 and A <= 0, and nothing is divided. Source: Gu and Dao,
"Mamba: Linear-Time Sequence Modeling with Selective State Spaces" (2023), algorithm 2.
"""

from __future__ import annotations

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


def transition(p: Prepared) -> Tensor:
    """sum of delta, [B, C]: with A it gives log M = A * sum of delta."""
    batch, rows = p.u.shape[0], p.delta.shape[1]
    return p.delta.sum((0, 2)).unflatten(0, (batch, rows // batch)).sum(1)


def ahead(p: Prepared) -> Prepared:
    """With what every chunk makes of the zero state."""
    if p.ends is not None:
        return p
    ends = p.A.new_empty(p.delta.shape[1], *p.A.shape)
    for block in blocks(p):
        ends[..., block.at] = _ends(block)
    return p._replace(ends=ends)


def _ends(block: Block) -> Tensor:
    state = block.new_state()
    decay = torch.empty_like(state)
    for i, (x, b) in enumerate(zip(block.inputs, block.B, strict=True)):
        block.passes(state, i).mul_(block.decay(i, decay)).addcmul_(x, b)
    return state


def inner(state: Tensor) -> Tensor:
    """[B, C, N, 1] as [B, N, C]."""
    return state.squeeze(3).transpose(1, 2)


def outer(state: Tensor) -> Tensor:
    """[B, N, C] as [B, C, N, 1]."""
    return state.transpose(1, 2).unsqueeze(3)


def advance(p: Prepared, state: Tensor) -> Tensor:
    """The state [B,C,N,1] after the tile."""
    ends = ahead(p).ends
    assert ends is not None
    return outer(before_chunks(p, ends, chunk_decay(p), inner(state))[-1])


def run(p: Prepared, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B,T,C,1] in the dtype of u, and the state after the tile."""
    ends = ahead(p).ends
    assert ends is not None
    *through, after = before_chunks(p, ends, chunk_decay(p), inner(state))
    before = as_rows(through)
    out = torch.empty_like(p.delta, dtype=p.u.dtype, memory_format=torch.contiguous_format)
    for block in blocks(p):
        own = before[..., block.at].contiguous()
        decay = torch.empty_like(own)
        for i, (x, b) in enumerate(zip(block.inputs, block.B, strict=True)):
            block.passes(own, i).mul_(block.decay(i, decay)).addcmul_(x, b)
            out[i, :, :, block.at] = torch.bmm(block.C[i], own)
    return to_tokens(out.squeeze(2), *p.u.shape[:2]).unsqueeze(3), outer(after)


def adjoint(p: Prepared, dout: Tensor, dstate: Tensor) -> Tensor:
    """Gradient of the state before the tile, from those of outputs and of the state after."""
    steps = to_steps(dout.squeeze(3).to(p.delta.dtype), p.delta.shape[0]).unsqueeze(2)
    found = torch.empty_like(inner(dstate), memory_format=torch.contiguous_format)
    for block in blocks(p):
        asked, decays = _asked(block, steps[..., block.at])
        found[..., block.at] = after_chunks(p, asked, decays, inner(dstate)[..., block.at])[0]
    return outer(found)


def _asked(block: Block, dout: Tensor) -> tuple[Tensor, Tensor]:
    """What each chunk's outputs ask of the state before it, and the chunk's M."""
    asked = block.new_state()
    decay, term = torch.empty_like(asked), torch.empty_like(asked)
    through = torch.ones_like(asked)
    for i, (c, dy) in enumerate(zip(block.C, dout, strict=True)):
        block.passes(through, i).mul_(block.decay(i, decay))
        asked.addcmul_(torch.mul(c.mT, dy, out=term), through)
    return asked, through
