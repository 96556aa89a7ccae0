"""One tile of gated linear attention by the token loop of reference.py: the functions of torch.py.

In float64 whatever the inputs are; outputs and states are rounded once, at the end of the tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xdist_kernels import by_tokens
from xdist_kernels.by_tokens import Inputs, Tile
from xdist_kernels.linear.chunks import state_dtype
from xdist_kernels.linear.reference import linear_attention_reference


def _loop(scale: float) -> by_tokens.Loop:
    def loop(inputs: Inputs, before: Tensor, cuts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay = inputs
        assert q is not None
        assert k is not None
        assert v is not None
        return linear_attention_reference(
            q, k, v, log_decay, scale=scale, initial_state=before, cu_seqlens=cuts
        )

    return loop


def _values(p: Tile) -> Tensor:
    v = p.inputs[2]
    assert v is not None
    return v


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    starts: Tensor | None = None,
) -> Tile:
    """The tile as it is given; shapes in torch.py."""
    return Tile((q, k, v, log_decay), starts, scale)


def transition(p: Tile) -> Tensor | None:
    """Log M of a tile without `starts`: [B,H,1] or [B,H,K]; None: no decay."""
    log_decay = p.inputs[3]
    if log_decay is None:
        return None
    return log_decay.sum(1, dtype=torch.float64).to(state_dtype(_values(p)))


def ahead(p: Tile) -> Tile:
    """The tile: a loop has nothing to make ahead."""
    return p


def run(p: Tile, state: Tensor) -> tuple[Tensor, Tensor]:
    """out [B,T,H,V] in the dtype of v, and the state after the tile."""
    v = _values(p)
    with torch.no_grad():
        out, after = by_tokens.run(_loop(p.scale), p, v.shape[1], state)
    return out.to(v.dtype), after.to(state.dtype)


def advance(p: Tile, state: Tensor) -> Tensor:
    """The state after the tile [B,H,K,V]."""
    return run(p, state)[1]


def adjoint(p: Tile, dout: Tensor, dstate: Tensor) -> Tensor:
    """Gradient of the state before the tile from those of outputs and of the state after it."""
    # It does not depend on the state itself: the tile is linear in it.
    return backward(p, torch.zeros_like(dstate), dout, dstate)[1]


def backward_ahead(p: Tile, state: Tensor, dout: Tensor) -> Tile:
    """The tile: a loop has nothing to make ahead."""
    return p


def backward(p: Tile, state: Tensor, dout: Tensor, dstate: Tensor) -> tuple[Inputs, Tensor]:
    """(dq, dk, dv, dlog_decay) in float64, and the gradient of the state before the tile."""
    found, before = by_tokens.gradients(_loop(p.scale), p, _values(p).shape[1], state, dout, dstate)
    return found, before.to(dstate.dtype)
