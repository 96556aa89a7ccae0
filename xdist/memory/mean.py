"""The global mean of values that live on many ranks, for losses other than cross entropy.

what is sharded   x, before and after along any of its dims
what moves        two numbers, the weighted sum and the sum of the weights (reduce); backward
                  moves nothing
kept for backward the weights and their global sum
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdist.comm.reduce import start_reduce
from xdist.errors import ShapeError


def mean(x: Tensor, shard: Any = None, *, weight: Tensor | None = None) -> Tensor:
    """`xdist.mean`: see there."""
    if weight is not None:
        try:
            weight = weight.expand_as(x)
        except RuntimeError as error:
            raise ShapeError(
                "mean: the weight does not fit x",
                f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}",
                "pass a weight that broadcasts to the shape of x",
            ) from error
    return _Mean.apply(x, weight, None if shard is None else shard.mesh.parameter_group)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, group: Any) -> Tensor:
        if weight is None:
            total = x.sum(dtype=torch.float64)
            own = torch.stack([total, total.new_tensor(float(x.numel()))])
        else:
            w, wide = weight.to(torch.float64), x.to(torch.float64)
            # A weight of zero leaves a term out, whatever its value: no NaN from 0 x inf.
            own = torch.stack([torch.where(w == 0, 0.0, wide * w).sum(), w.sum()])
        total, count = start_reduce(own, group).wait().unbind()
        ctx.count = float(count)
        ctx.shape, ctx.dtype, ctx.device = x.shape, x.dtype, x.device
        ctx.save_for_backward(weight)
        value = total / count if ctx.count else torch.zeros_like(total)
        return value.to(x.dtype if x.dtype.itemsize > 4 else torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (weight,) = ctx.saved_tensors
        each = (grad / ctx.count if ctx.count else torch.zeros_like(grad)).to(ctx.device)
        dx = each.expand(ctx.shape) if weight is None else weight * each
        return dx.to(ctx.dtype), None, None
