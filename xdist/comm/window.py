"""Window: on each rank a run of positions of one dim, from whoever owns them.

Sharded before: `dim`, one run a rank; after: `dim`, in windows that may overlap, leave positions
out or lie elsewhere than the rank's share. Moves, per rank: forward receives what its window holds
of other ranks' shares; backward those gradients return, in float32 (float64 for float64), added to
its own in rank order. Saved for backward: nothing. Divides: nothing; a window may be empty, and
wider than a share.

A halo is as wide on every rank and lies beside the shares. The windows of a convolution with a
stride, of patches that straddle a border and of blocks of a grid do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup, check_member, rank_of, size_of, start_pairs
from xdist.comm.first_order import first_order
from xdist.comm.pending import Pending
from xdist.comm.summing import sum_dtype
from xdist.comm.switch import pack, packed_spec, sized, unpack
from xdist.cost.moves import window_parts
from xdist.errors import ShapeError
from xdist.layout import Layout

Window = tuple[int, int]
"""Positions `[start, stop)`."""


def start_windows(
    tensors: Sequence[Tensor],
    layout: Layout,
    group: ProcessGroup | None,
    *,
    dim: int,
    windows: Sequence[Window],
) -> Pending[list[Tensor]]:
    """This rank's window of each tensor; all tensors in one exchange. Dtypes are kept.

    layout: at most one segment a rank; windows: of every rank, inside the sequence.

    Raises:
        ShapeError: a tensor does not hold this rank's share, or windows that do not fit.
    """
    me, size = rank_of(group), size_of(group)
    _check(tensors, layout, group, dim, windows)
    tensors = [x.detach() for x in tensors]
    parts = [window_parts(layout, windows[r]) for r in range(size)]
    sends = {r: _narrowed(tensors, dim, *parts[r][me][1]) for r in range(size) if me in parts[r]}
    specs = {
        r: [(sized(x, dim, stop - start), x.dtype) for x in tensors]
        for r, ((start, stop), _) in parts[me].items()
        if r != me
    }
    own = sends.pop(me, None)
    pending = start_pairs(
        {r: pack(one) for r, one in sends.items()},
        {r: packed_spec(spec) for r, spec in specs.items()},
        group,
        move="halo",
        device=tensors[0].device,
    )

    def finish(got: dict[int, Tensor]) -> list[Tensor]:
        found = {r: unpack(got[r], specs[r]) for r in specs}
        if own is not None:
            found[me] = own
        # In position order, which for one segment a rank is not always that of ranks.
        order = sorted(found, key=lambda r: parts[me][r][0])
        return [
            torch.cat([found[r][i] for r in order], dim) if order else x.narrow(dim, 0, 0)
            for i, x in enumerate(tensors)
        ]

    return pending.then(finish)


def start_windows_adjoint(
    grads: Sequence[Tensor],
    likes: Sequence[Tensor],
    layout: Layout,
    group: ProcessGroup | None,
    *,
    dim: int,
    windows: Sequence[Window],
) -> Pending[list[Tensor]]:
    """Gradients of the shares from those of the windows: shaped as `likes`, float32 or float64."""
    me, size = rank_of(group), size_of(group)
    wide = [sum_dtype(like.dtype) for like in likes]
    parts = [window_parts(layout, windows[r]) for r in range(size)]
    sends = {
        r: [
            x.narrow(dim, start, stop - start).to(dtype)
            for x, dtype in zip(grads, wide, strict=True)
        ]
        for r, ((start, stop), _) in parts[me].items()
    }
    own = sends.pop(me, None)
    specs = {
        r: [
            (sized(like, dim, stop - start), dtype) for like, dtype in zip(likes, wide, strict=True)
        ]
        for r in range(size)
        if r != me and me in parts[r]
        for start, stop in [parts[r][me][1]]
    }
    pending = start_pairs(
        {r: pack(one) for r, one in sends.items()},
        {r: packed_spec(spec) for r, spec in specs.items()},
        group,
        move="halo",
        device=likes[0].device,
    )

    def finish(got: dict[int, Tensor]) -> list[Tensor]:
        found = {r: unpack(got[r], specs[r]) for r in specs}
        if own is not None:
            found[me] = own
        sums = [
            torch.zeros(like.shape, dtype=dtype, device=like.device)
            for like, dtype in zip(likes, wide, strict=True)
        ]
        for r in sorted(found):
            start, stop = parts[r][me][1]
            for total, part in zip(sums, found[r], strict=True):
                total.narrow(dim, start, stop - start).add_(part)
        return sums

    return pending.then(finish)


def window_many(
    tensors: Sequence[Tensor],
    layout: Layout,
    group: ProcessGroup | None,
    *,
    dim: int,
    windows: Sequence[Window],
) -> list[Tensor]:
    """Differentiable `start_windows`."""
    return list(_Window.apply(layout, group, dim, tuple(windows), *tensors))


def window(
    x: Tensor,
    layout: Layout,
    group: ProcessGroup | None,
    *,
    dim: int,
    windows: Sequence[Window],
) -> Tensor:
    """Differentiable `start_windows` of one tensor."""
    return window_many([x], layout, group, dim=dim, windows=windows)[0]


class _Window(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        group: ProcessGroup | None,
        dim: int,
        windows: tuple[Window, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.arguments = (layout, group)
        ctx.dim, ctx.windows = dim, windows
        ctx.likes = [(x.shape, x.dtype, x.device) for x in tensors]
        found = start_windows(tensors, layout, group, dim=dim, windows=windows).wait()
        return tuple(y.view_as(y) for y in found)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        layout, group = ctx.arguments
        likes = [torch.empty(shape, dtype=kind, device=at) for shape, kind, at in ctx.likes]
        found = start_windows_adjoint(
            grads, likes, layout, group, dim=ctx.dim, windows=ctx.windows
        ).wait()
        del likes
        back = [g.to(dtype) for g, (_, dtype, _) in zip(found, ctx.likes, strict=True)]
        return None, None, None, None, *back


def _narrowed(tensors: Sequence[Tensor], dim: int, start: int, stop: int) -> list[Tensor]:
    return [x.narrow(dim, start, stop - start) for x in tensors]


def _check(
    tensors: Sequence[Tensor],
    layout: Layout,
    group: ProcessGroup | None,
    dim: int,
    windows: Sequence[Window],
) -> None:
    check_member(group)
    me, size = rank_of(group), size_of(group)
    if layout.parts != size or len(windows) != size:
        raise ShapeError(
            "a share and a window for every rank are needed",
            f"{size} ranks; {layout.parts} shares, {len(windows)} windows",
        )
    for r in range(size):
        start, stop = windows[r]
        if len(layout.segments(r)) > 1 or not 0 <= start <= stop <= layout.length:
            raise ShapeError(
                "a window lies inside the sequence, and a rank holds one run of it",
                f"rank {r}: window {windows[r]} of {layout.length}, share {layout.segments(r)}",
            )
    for x in tensors:
        if x.shape[dim] != layout.local_length(me):
            raise ShapeError(
                f"x holds {x.shape[dim]} positions along dim {dim}",
                f"rank {me} holds {layout.local_length(me)} of {layout.length}",
                "pass this rank's share",
            )
