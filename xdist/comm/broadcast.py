"""Broadcast: one rank's tensor on every rank; its adjoint is the sum over ranks to that rank.

Sharded before: held by the root; after: nothing. Moves: the root sends P-1 copies, the others
receive one; backward they send their gradient in float32 (float64 for float64) and the root adds
in rank order. Saved for backward: nothing. Divides: nothing. The ledger counts it as `reduce`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup, check_member, rank_of, size_of, start_pairs
from xdist.comm.first_order import first_order
from xdist.comm.pending import Pending
from xdist.comm.summing import add_in_rank_order, sum_dtype


def start_broadcast(
    x: Tensor, group: ProcessGroup | None, *, root: int, move: str = "reduce"
) -> Pending[Tensor]:
    """The root's `x`. Other ranks pass a tensor of the same shape and dtype; only these matter."""
    check_member(group)
    if group is None:
        return Pending.done(x)
    me, size = rank_of(group), size_of(group)
    sends = dict.fromkeys(range(size), x.detach().contiguous()) if me == root else {}
    receives = {root: (tuple(x.shape), x.dtype)}
    pending = start_pairs(sends, receives, group, move=move, device=x.device)
    return pending.then(lambda got: got[root])


def start_sum_to(
    x: Tensor, group: ProcessGroup | None, *, root: int, move: str = "reduce"
) -> Pending[Tensor]:
    """The sum over ranks of `x` on the root, zeros elsewhere; float32 (float64 for float64)."""
    check_member(group)
    mine = x.detach().to(sum_dtype(x.dtype)).contiguous()
    if group is None:
        return Pending.done(mine)
    me, size = rank_of(group), size_of(group)
    spec = (tuple(x.shape), mine.dtype)
    receives = dict.fromkeys(range(size), spec) if me == root else {}
    pending = start_pairs({root: mine}, receives, group, move=move, device=x.device)
    return pending.then(
        lambda got: add_in_rank_order(got) if me == root else torch.zeros_like(mine)
    )


def broadcast(x: Tensor, group: ProcessGroup | None, *, root: int) -> Tensor:
    """Differentiable `start_broadcast`; backward sums the gradient to the root."""
    return _Broadcast.apply(x, group, root)


class _Broadcast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None, root: int) -> Tensor:
        ctx.group, ctx.root = group, root
        found = start_broadcast(x, group, root=root).wait()
        return found.view_as(found)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        total = start_sum_to(grad, ctx.group, root=ctx.root).wait()
        return total.to(grad.dtype), None, None
