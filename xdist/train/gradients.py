"""Gradients of the global mean: the one sum over data x sequence ranks, and clipping after it.

After backward a rank holds its own part of each parameter's gradient (the terms of its own
tokens). Losses are already divided by the valid tokens of the whole global batch, so the parts
only have to be added.

What is sharded: nothing; parameters are whole on every rank, their gradients are partial before
and whole after. What moves: one reduce of all gradients over data x sequence; with even shares
each rank sends 2 (R-1)/R of them, in float32 (float64 for float64 parameters). What is saved: one
buffer of that size. What must divide what: nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from xdist.comm.reduce import start_reduce
from xdist.errors import ConfigError, DesyncError
from xdist.mesh import Mesh


def reduce_gradients(module: nn.Module, mesh: Mesh) -> None:
    """Replace each `parameter.grad` by its sum over all data x sequence ranks.

    Every rank sends every trained parameter, in the order of `module.parameters()`: a gradient
    that is None here counts as zeros, and is filled when the sum arrives. Only when there is one
    rank does a None stay None. float32 and narrower gradients are added in float32, float64 ones
    in float64; the result keeps the dtype of the parameter. One buffer, one reduce per dtype.
    """
    if mesh.parameter_group is None:
        return
    trained = [p for p in module.parameters() if p.requires_grad]
    wide = [p for p in trained if p.dtype == torch.float64]
    narrow = [p for p in trained if p.dtype != torch.float64]
    for parameters, dtype in ((narrow, torch.float32), (wide, torch.float64)):
        if parameters:
            _reduce_together(parameters, dtype, mesh)


def _reduce_together(parameters: list[nn.Parameter], dtype: torch.dtype, mesh: Mesh) -> None:
    buffer = torch.zeros(
        sum(p.numel() for p in parameters), dtype=dtype, device=parameters[0].device
    )
    pieces = buffer.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        if parameter.grad is not None:
            piece.copy_(parameter.grad.reshape(-1))
    summed = start_reduce(buffer, mesh.parameter_group).wait()
    for parameter, piece in zip(
        parameters, summed.split([p.numel() for p in parameters]), strict=True
    ):
        values = piece.view(parameter.shape)
        if parameter.grad is None:
            # A copy: views would keep the whole buffer alive, or share it between parameters.
            parameter.grad = values.to(parameter.dtype, copy=True)
        else:
            parameter.grad.copy_(values)


def clip_grad_norm(module: nn.Module, max_norm: float, mesh: Mesh) -> Tensor:
    """Scale gradients so that their global 2-norm is at most `max_norm`; return the norm before.

    To be called after `reduce_gradients`: every rank then holds the whole gradient, so its own
    norm is the global one, equal to the last bit on every rank, and nothing is sent. The norm is
    taken in float32 (float64 for float64 gradients), and the factor is that of
    `torch.nn.utils.clip_grad_norm_`, max_norm / (norm + 1e-6) where that is below 1. A norm that
    is not finite scales nothing: the caller sees it and decides.

    Raises ConfigError when max_norm is not positive, and DesyncError when a parameter has no
    gradient although several ranks train it (reduce_gradients fills all).
    """
    if not max_norm > 0:
        raise ConfigError(
            "clip_grad_norm needs a positive max_norm", f"max_norm is {max_norm}", "give one > 0"
        )
    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    empty = [name for name, p in trained if p.grad is None]
    if empty and mesh.parameter_group is not None:
        raise DesyncError(
            "clip_grad_norm was called before reduce_gradients",
            f"{len(empty)} of {len(trained)} parameters have no gradient here, first {empty[0]}",
            "call xdist.reduce_gradients(module, mesh) first: the norm is that of the sums",
        )
    gradients = [p.grad for _, p in trained if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(gradient_norms(gradients)))
    factor = max_norm / (norm + 1e-6)
    if torch.isfinite(norm) and factor < 1:
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.dtype))
    return norm


def clip_factor(norm: float, max_norm: float) -> float:
    """What `clip_grad_norm` multiplies gradients of this global norm with; 1 for one not finite."""
    factor = max_norm / (norm + 1e-6)
    return min(factor, 1.0) if math.isfinite(norm) else 1.0


def gradient_norms(gradients: Iterable[Tensor]) -> list[Tensor]:
    """The 2-norm of each gradient as a scalar, in float32 or wider."""
    return [
        torch.linalg.vector_norm(
            g, dtype=torch.float64 if g.dtype == torch.float64 else torch.float32
        )
        for g in gradients
    ]
