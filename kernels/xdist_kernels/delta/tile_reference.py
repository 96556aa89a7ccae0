"""One tile of the delta rule by the token loop of reference.py: the functions of tile.py.

In float64 whatever the inputs are; outputs and states are rounded once, at the end of the tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xdist_kernels import by_tokens
from xdist_kernels.by_tokens import Inputs, Tile
from xdist_kernels.delta.backward import Gradients
from xdist_kernels.delta.reference import delta_rule_reference
from xdist_kernels.delta.torch import wide_dtype


def _loop(scale: float) -> by_tokens.Loop:
    def loop(inputs: Inputs, before: Tensor, cuts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        q, k, v, beta, log_decay = inputs
        assert q is not None
        assert k is not None
        assert v is not None
        assert beta is not None
        return delta_rule_reference(
            q, k, v, beta, log_decay, scale=scale, initial_state=before, cu_seqlens=cuts
        )

    return loop


def _keys_values(p: Tile) -> tuple[Tensor, Tensor]:
    _, k, v, *_ = p.inputs
    assert k is not None
    assert v is not None
    return k, v


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    starts: Tensor | None = None,
) -> Tile:
    """The tile as it is given; shapes in torch.py."""
    return Tile((q, k, v, beta, log_decay), starts, scale)


def transition(p: Tile) -> Tensor:
    """M [B,H,K,K] of a tile in which no document starts: what becomes of the identity where no
    value enters."""
    k, v = _keys_values(p)
    q, _, _, beta, log_decay = p.inputs
    nothing = v.new_zeros(*v.shape[:3], k.shape[3])
    one = torch.eye(k.shape[3], dtype=wide_dtype(v), device=v.device)
    one = one.expand(v.shape[0], v.shape[2], -1, -1)
    return run(Tile((q, k, nothing, beta, log_decay), None, p.scale), one)[1]


def ahead(p: Tile) -> Tile:
    """The tile: a loop has nothing to make ahead."""
    return p


def run(p: Tile, state: Tensor) -> tuple[Tensor, Tensor]:
    """out [B,T,H,V] in the dtype of v, and the state after the tile."""
    v = _keys_values(p)[1]
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


def backward(p: Tile, state: Tensor, dout: Tensor, dstate: Tensor) -> tuple[Gradients, Tensor]:
    """Gradients of a tile's inputs in float64, and of the state before it."""
    tokens = _keys_values(p)[1].shape[1]
    found, before = by_tokens.gradients(_loop(p.scale), p, tokens, state, dout, dstate)
    dq, dk, dv, dbeta, dlog = found
    assert dq is not None
    assert dk is not None
    assert dv is not None
    assert dbeta is not None
    return Gradients(dq, dk, dv, dbeta, dlog), before.to(dstate.dtype)
