"""RMS norm and output gate of a mixer as one function, in tiles of tokens.

    after:   out = norm(y) * weight * gate(z)          [a gate on what was normed]
    before:  out = norm(y * gate(z)) * weight          [Mamba-2]
    unit:    out = x / sqrt(sum(x^2) + eps)

Written out, these save five or six tensors of the outputs' size for backward; here only the inputs
are kept, and one scale a row. Everything runs in float32 or wider, in tiles that stay in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xdist.nn.decay import wide
from xdist_kernels.autocast import in_given_dtypes

TILE_TOKENS = 1024

GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


def _gate_backward(gate: str, grad: Tensor, z: Tensor, opened: Tensor) -> Tensor:
    """The gradient of z from that of gate(z) = opened."""
    if gate == "silu":
        return torch.ops.aten.silu_backward(grad, z)
    return torch.ops.aten.sigmoid_backward(grad, opened)


def _tiles(x: Tensor) -> Iterator[slice]:
    for start in range(0, x.shape[1], TILE_TOKENS):
        yield slice(start, start + TILE_TOKENS)


def _scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), [..., 1]."""
    return torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)


def _norm_backward(dnormed: Tensor, normed: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x from that of normed = x * scale(x)."""
    slope = torch.linalg.vecdot(dnormed, normed).div_(-normed.shape[-1]).unsqueeze(-1)
    return torch.addcmul(dnormed, normed, slope).mul_(scale)


class NormThenGate(torch.autograd.Function):
    """(y, z or None, weight or None, gate, eps) -> norm(y) * weight * gate(z), [B, n, ..., V]."""

    @staticmethod
    @in_given_dtypes
    def forward(
        ctx: Any, y: Tensor, z: Tensor | None, weight: Tensor | None, gate: str, eps: float
    ) -> Tensor:
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        for at in _tiles(y):
            own = wide(y[:, at])
            made = own * _scale(own, eps)
            if weight is not None:
                made.mul_(wide(weight))
            if z is not None:
                made.mul_(GATES[gate](wide(z[:, at])))
            out[:, at] = made
        ctx.save_for_backward(y, z, weight)
        ctx.gate, ctx.eps = gate, eps
        return out

    @staticmethod
    @in_given_dtypes
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        dy, dz = torch.empty_like(y), None if z is None else torch.empty_like(z)
        dweight = None if weight is None else torch.zeros_like(wide(weight))
        for at in _tiles(y):
            own, grad = wide(y[:, at]), wide(dout[:, at])
            scale = _scale(own, ctx.eps)
            normed = own * scale
            if z is not None and dz is not None:
                shut = wide(z[:, at])
                opened = GATES[ctx.gate](shut)
                through = grad * normed
                grad = grad * opened
                if weight is not None:
                    through = through * wide(weight)
                dz[:, at] = _gate_backward(ctx.gate, through, shut, opened)
            if weight is not None and dweight is not None:
                dweight += (grad * normed).flatten(0, -2).sum(0)
                grad = grad * wide(weight)
            dy[:, at] = _norm_backward(grad, normed, scale)
        return dy, dz, None if dweight is None else dweight.to(weight.dtype), None, None


class GateThenNorm(torch.autograd.Function):
    """(y, z, weight [E], groups, eps) -> norm(y * silu(z)) * weight, [B, n, E], group by group."""

    @staticmethod
    @in_given_dtypes
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        for at in _tiles(y):
            gated = (wide(y[:, at]) * F.silu(wide(z[:, at]))).unflatten(-1, (groups, -1))
            out[:, at] = (gated * _scale(gated, eps)).flatten(-2).mul_(wide(weight))
        ctx.save_for_backward(y, z, weight)
        ctx.groups, ctx.eps = groups, eps
        return out

    @staticmethod
    @in_given_dtypes
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        shape = (ctx.groups, -1)
        dy, dz, dweight = torch.empty_like(y), torch.empty_like(z), torch.zeros_like(wide(weight))
        for at in _tiles(y):
            own, shut, grad = wide(y[:, at]), wide(z[:, at]), wide(dout[:, at])
            opened = F.silu(shut)
            gated = (own * opened).unflatten(-1, shape)
            scale = _scale(gated, ctx.eps)
            normed = gated.mul_(scale)
            dweight += (grad * normed.flatten(-2)).flatten(0, -2).sum(0)
            dnormed = (grad * wide(weight)).unflatten(-1, shape)
            dgated = _norm_backward(dnormed, normed, scale).flatten(-2)
            dz[:, at] = torch.ops.aten.silu_backward(dgated * own, shut)
            dy[:, at] = dgated.mul_(opened)
        return dy, dz, dweight.to(weight.dtype), None, None


class Unit(torch.autograd.Function):
    """(x, eps) -> x / sqrt(sum(x^2) + eps) over the last dim, [B, n, ..., K]."""

    @staticmethod
    @in_given_dtypes
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for at in _tiles(x):
            own = wide(x[:, at])
            out[:, at] = own * _length(own, eps)
        ctx.save_for_backward(x)
        ctx.eps = eps
        return out

    @staticmethod
    @in_given_dtypes
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        for at in _tiles(x):
            own, grad = wide(x[:, at]), wide(dout[:, at])
            scale = _length(own, ctx.eps)
            made = own * scale
            slope = torch.linalg.vecdot(grad, made).neg_().unsqueeze(-1)
            dx[:, at] = torch.addcmul(grad, made, slope).mul_(scale)
        return dx, None


def _length(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(sum(x^2) + eps), [..., 1]."""
    return torch.linalg.vecdot(x, x).add_(eps).rsqrt_().unsqueeze(-1)
