"""Reduce: the sum over ranks of a small tensor, the same bits on every rank.

Sharded before and after: nothing. Moves, per rank: a reduce-scatter and a gather of even shares,
2 (P-1)/P of the tensor sent and received, in float32 (float64 for float64); backward the same.
Saved for backward: nothing. Divides: nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup, check_member, rank_of, size_of, start_pairs
from xdist.comm.first_order import first_order
from xdist.comm.gather import start_reduce_scatter
from xdist.comm.pending import Pending
from xdist.comm.summing import sum_dtype
from xdist.layout import even_sizes


def start_reduce(x: Tensor, group: ProcessGroup | None, *, move: str = "reduce") -> Pending[Tensor]:
    """The sum over ranks of `x`, in float32 (float64 for float64, int64 for integers).

    Its second half is sent by `wait()`, so ranks wait for several sums in the same order.
    """
    check_member(group)
    if group is None:
        return Pending.done(x.detach().to(sum_dtype(x.dtype)))
    size, me = size_of(group), rank_of(group)
    sizes = even_sizes(x.numel(), size)
    first = start_reduce_scatter(x.reshape(-1), group, dim=0, sizes=sizes, move=move)

    def finish(own: Tensor) -> Tensor:
        got = start_pairs(
            dict.fromkeys(range(size), own),
            {r: ((sizes[r],), own.dtype) for r in range(size)},
            group,
            move=move,
        ).wait()
        assert got[me] is own
        return torch.cat([got[r] for r in range(size)]).view(x.shape)

    return first.then(finish)


def reduce(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Differentiable `start_reduce`, in x's dtype. Each rank's copy of the sum has its own loss,
    so the gradient of a term is the sum of the copies' gradients."""
    return _Reduce.apply(x, group)


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = start_reduce(x, group).wait().to(x.dtype)
        return total.view_as(total)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return start_reduce(grad, ctx.group).wait().to(grad.dtype), None
