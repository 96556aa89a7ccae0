"""Gather: every rank's share of one dim, whole on every rank; its adjoint is reduce-scatter.

Sharded before: `dim`; after: nothing. Moves, per rank: forward sends (P-1) times its own share and
receives the others'; backward the reverse, in float32 (float64 for float64), added in rank order.
Saved for backward: nothing. Divides: nothing; shares may be uneven or empty, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup, check_member, rank_of, size_of, start_pairs
from xdist.comm.first_order import first_order
from xdist.comm.pending import Pending
from xdist.comm.summing import add_in_rank_order, offsets, sum_dtype
from xdist.errors import ShapeError


def start_gather(
    x: Tensor, group: ProcessGroup | None, *, dim: int, sizes: Sequence[int] | None = None
) -> Pending[Tensor]:
    """All shares of `dim` in rank order. `sizes` is each rank's share (None: all as this one).

    Raises:
        ShapeError: `x` does not hold its share.
    """
    check_member(group)
    if group is None:
        return Pending.done(x)
    size, me = size_of(group), rank_of(group)
    sizes = [x.shape[dim]] * size if sizes is None else list(sizes)
    if len(sizes) != size or x.shape[dim] != sizes[me]:
        raise ShapeError(
            f"x holds {x.shape[dim]} along dim {dim}",
            f"rank {me} of shares {sizes} on {size} ranks",
        )
    shapes = {
        r: (*x.shape[: dim % x.dim()], sizes[r], *x.shape[dim % x.dim() + 1 :]) for r in range(size)
    }
    own = x.detach().contiguous()
    pending = start_pairs(
        dict.fromkeys(range(size), own),
        {r: (shape, x.dtype) for r, shape in shapes.items()},
        group,
        move="gather",
    )
    return pending.then(lambda got: torch.cat([got[r] for r in range(size)], dim=dim))


def start_reduce_scatter(
    x: Tensor,
    group: ProcessGroup | None,
    *,
    dim: int,
    sizes: Sequence[int] | None = None,
    move: str = "gather",
) -> Pending[Tensor]:
    """This rank's share of `dim` of the sum over ranks of `x`, in float32 (float64 for float64).

    `sizes` is each rank's share (None: as torch.tensor_split would).

    Raises:
        ShapeError: the shares do not add up to the dim.
    """
    check_member(group)
    summed = x.detach().to(sum_dtype(x.dtype))
    if group is None:
        return Pending.done(summed)
    size, me = size_of(group), rank_of(group)
    parts = list(summed.tensor_split(size, dim)) if sizes is None else []
    if sizes is not None:
        if len(sizes) != size or sum(sizes) != x.shape[dim]:
            raise ShapeError(
                f"dim {dim} of x is {x.shape[dim]} long", f"shares {list(sizes)} on {size} ranks"
            )
        starts = offsets(list(sizes))
        parts = [summed.narrow(dim, starts[r], sizes[r]) for r in range(size)]
    spec = (tuple(parts[me].shape), summed.dtype)
    pending = start_pairs(
        dict(enumerate(parts)), dict.fromkeys(range(size), spec), group, move=move
    )
    return pending.then(add_in_rank_order)


def gather(
    x: Tensor, group: ProcessGroup | None, *, dim: int, sizes: Sequence[int] | None = None
) -> Tensor:
    """Differentiable `start_gather`; backward is reduce-scatter (sum)."""
    sizes = [x.shape[dim]] * size_of(group) if sizes is None else list(sizes)
    return _Gather.apply(x, group, dim, sizes)


def reduce_scatter(
    x: Tensor, group: ProcessGroup | None, *, dim: int, sizes: Sequence[int]
) -> Tensor:
    """Differentiable `start_reduce_scatter`, in x's dtype; backward is gather."""
    return _ReduceScatter.apply(x, group, dim, list(sizes))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: ProcessGroup | None, dim: int, sizes: list[int]
    ) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes, ctx.dtype = group, dim, sizes, x.dtype
        whole = start_gather(x, group, dim=dim, sizes=sizes).wait()
        return whole.view_as(whole)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        share = start_reduce_scatter(grad, ctx.group, dim=ctx.dim, sizes=ctx.sizes).wait()
        return share.to(ctx.dtype), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, group: ProcessGroup | None, dim: int, sizes: list[int]
    ) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes = group, dim, sizes
        share = start_reduce_scatter(x, group, dim=dim, sizes=sizes).wait().to(x.dtype)
        return share.view_as(share)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        whole = start_gather(grad, ctx.group, dim=ctx.dim, sizes=ctx.sizes).wait()
        return whole, None, None, None
