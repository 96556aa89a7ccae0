"""One tile of the selective scan by the token loop of reference.py: the functions of torch.py.

In float64 whatever the inputs are; outputs and states are rounded once, at the end of the tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xdist_kernels import by_tokens
from xdist_kernels.by_tokens import Inputs, Tile
from xdist_kernels.selective_scan.blocks import wide_dtype
from xdist_kernels.selective_scan.reference import selective_scan_reference


def _loop(inputs: Inputs, before: Tensor, cuts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    u, delta, A, B, C = (x for x in inputs if x is not None)
    out, after = selective_scan_reference(
        u.squeeze(3),
        delta.squeeze(3),
        A,
        B.squeeze(2),
        C.squeeze(2),
        before.squeeze(-1),
        cu_seqlens=cuts,
    )
    return out.unsqueeze(3), after.unsqueeze(-1)


def _tokens(p: Tile) -> Tensor:
    u = p.inputs[0]
    assert u is not None
    return u


def prepare(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor | None = None
) -> Tile:
    """The tile as it is given; shapes in blocks.py."""
    return Tile((u, delta, A, B, C), starts)


def transition(p: Tile) -> Tensor:
    """sum of delta, [B, C]: with A it gives log M = A * sum of delta."""
    delta = p.inputs[1]
    assert delta is not None
    return delta.sum(1, dtype=torch.float64).squeeze(-1).to(wide_dtype(_tokens(p)))


def ahead(p: Tile) -> Tile:
    """The tile: a loop has nothing to make ahead."""
    return p


def run(p: Tile, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B,T,C,1] in the dtype of u, and the state after the tile."""
    u = _tokens(p)
    with torch.no_grad():
        out, after = by_tokens.run(_loop, p, u.shape[1], state)
    return out.to(u.dtype), after.to(state.dtype)


def advance(p: Tile, state: Tensor) -> Tensor:
    """The state [B,C,N,1] after the tile."""
    return run(p, state)[1]


def adjoint(p: Tile, dout: Tensor, dstate: Tensor) -> Tensor:
    """Gradient of the state before the tile from those of outputs and of the state after it."""
    # It does not depend on the state itself: the tile is linear in it.
    return backward(p, torch.zeros_like(dstate), dout, dstate)[1]


def backward_ahead(p: Tile, dout: Tensor) -> Tile:
    """The tile: a loop has nothing to make ahead."""
    return p


def backward(p: Tile, state: Tensor, dout: Tensor, dstate: Tensor) -> tuple[Inputs, Tensor]:
    """Gradients of u, delta, A (this tile's part), B and C in float64, and of the state before."""
    found, before = by_tokens.gradients(_loop, p, _tokens(p).shape[1], state, dout, dstate)
    return found, before.to(dstate.dtype)
