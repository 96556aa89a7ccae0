"""Relayout: one dim from one layout to another.

Sharded before: `dim`, by `source`; after: `dim`, by `target`. Moves, per rank: the tokens that
change owner, once each way; backward the same tokens back. Saved for backward: nothing; the
adjoint is the relayout with the layouts swapped. Divides: nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup, check_member, rank_of, size_of, start_pairs
from xdist.comm.first_order import first_order
from xdist.comm.pending import Pending
from xdist.errors import ShapeError
from xdist.layout import Layout, Piece


def start_relayout(
    x: Tensor, group: ProcessGroup | None, *, dim: int, source: Layout, target: Layout
) -> Pending[Tensor]:
    """This rank's tokens under `target`, given those under `source`. The dtype is kept.

    Raises:
        ShapeError: the layouts are of other lengths or ranks, or x does not fit `source`.
    """
    check_member(group)
    me, size = rank_of(group), size_of(group)
    if source.length != target.length or not source.parts == target.parts == size:
        raise ShapeError(
            "relayout needs two layouts of the same sequence over the ranks of the group",
            f"lengths {source.length} and {target.length}, ranks {source.parts} and "
            f"{target.parts}, group of {size}",
        )
    if x.shape[dim] != source.local_length(me):
        raise ShapeError(
            f"x holds {x.shape[dim]} tokens along dim {dim}",
            f"rank {me} holds {source.local_length(me)} in the source layout",
        )
    sends = {
        r: _joined([x.narrow(dim, here.offset, here.stop - here.start) for here, _ in pairs], dim)
        for r in range(size)
        if (pairs := moving(source, target, me, r))
    }
    arriving = {r: pairs for r in range(size) if (pairs := moving(source, target, r, me))}
    shape = list(x.shape)
    specs = {}
    for rank, pairs in arriving.items():
        shape[dim] = sum(there.stop - there.start for _, there in pairs)
        specs[rank] = (tuple(shape), x.dtype)
    shape[dim] = target.local_length(me)

    def finish(got: dict[int, Tensor]) -> Tensor:
        out = x.new_empty(shape)
        for rank, pairs in arriving.items():
            offset = 0
            for _, there in pairs:
                length = there.stop - there.start
                out.narrow(dim, there.offset, length).copy_(got[rank].narrow(dim, offset, length))
                offset += length
        return out

    return start_pairs(sends, specs, group, move="relayout", device=x.device).then(finish)


def relayout(
    x: Tensor, group: ProcessGroup | None, *, dim: int, source: Layout, target: Layout
) -> Tensor:
    """Differentiable `start_relayout`."""
    return _Relayout.apply(x, group, dim, source, target)


class _Relayout(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        group: ProcessGroup | None,
        dim: int,
        source: Layout,
        target: Layout,
    ) -> Tensor:
        ctx.group, ctx.dim, ctx.source, ctx.target = group, dim, source, target
        return start_relayout(x, group, dim=dim, source=source, target=target).wait()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        back = start_relayout(grad, ctx.group, dim=ctx.dim, source=ctx.target, target=ctx.source)
        return back.wait(), None, None, None, None


def moving(source: Layout, target: Layout, giver: int, taker: int) -> list[tuple[Piece, Piece]]:
    """The runs `giver` hands to `taker`, in position order: where they lie before and after."""
    return [
        (piece, there)
        for mine in sorted(source.pieces_of(giver))
        for there in target.owners(mine.start, mine.stop)
        if there.rank == taker
        for piece in [mine.clip(there.start, there.stop)]
    ]


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0].detach() if len(parts) == 1 else torch.cat(parts, dim).detach()
