"""A recurrence's tile by its token loop in float64, gradients by autograd: `backend="reference"`.

Every family's reference.py defines its op as a loop over tokens of whole sequences. Here such a
loop serves one tile, from the state before it to the state after it, so that whatever moves states
between tiles and ranks can be checked with the definition inside. Slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Inputs = tuple[Tensor | None, ...]
# (inputs, states before each document [B, documents, ...], cu_seqlens) -> outputs [B, T, ...] and
# the states after each document
Loop = Callable[[Inputs, Tensor, tuple[int, ...]], tuple[Tensor, Tensor]]


class Tile(NamedTuple):
    """A tile as it was given. starts: bool [T], True where a document starts behind its first
    token; None where none does."""

    inputs: Inputs
    starts: Tensor | None
    scale: float = 1.0


def cu_seqlens(starts: Tensor | None, tokens: int) -> tuple[int, ...]:
    """The tile's documents."""
    inner = [] if starts is None else starts.nonzero().flatten().tolist()
    return (0, *inner, tokens)


def run(loop: Loop, tile: Tile, tokens: int, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and the state after the tile [B, ...], float64 and differentiable."""
    cuts = cu_seqlens(tile.starts, tokens)
    first = state.double()
    fresh = [torch.zeros_like(first)] * (len(cuts) - 2)
    out, after = loop(tile.inputs, torch.stack([first, *fresh], 1), cuts)
    return out, after[:, -1]


def gradients(
    loop: Loop, tile: Tile, tokens: int, state: Tensor, dout: Tensor, dstate: Tensor
) -> tuple[Inputs, Tensor]:
    """Gradients of the inputs and of the state before the tile, float64."""
    with torch.enable_grad():
        before = state.detach().double().requires_grad_()
        given = tuple(
            None if x is None else x.detach().double().requires_grad_() for x in tile.inputs
        )
        results = run(loop, tile._replace(inputs=given), tokens, before)
        wanted = [before, *(x for x in given if x is not None)]
        found = torch.autograd.grad(
            results, wanted, (dout.double(), dstate.double()), allow_unused=True
        )
    own = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
    rest = iter(own[1:])
    return tuple(None if x is None else next(rest) for x in given), own[0]
