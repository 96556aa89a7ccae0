"""Halo: the tokens before and after each segment, in position order, from whoever owns them.

Sharded before and after: `dim`. Moves, per rank: forward receives the tokens of other ranks within
`before` of a segment's start or `after` of its end, each once; backward their gradients return, in
float32 (float64 for float64), added in rank order. Saved for backward: nothing. Divides: nothing;
a halo may be wider than a share and then has several owners.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup, check_member, rank_of, size_of, start_pairs
from xdist.comm.first_order import first_order
from xdist.comm.pending import Pending
from xdist.comm.summing import sum_dtype
from xdist.comm.switch import sized
from xdist.cost.moves import halo_pieces
from xdist.errors import ShapeError
from xdist.layout import Layout, Piece


class Halo(NamedTuple):
    """The neighbourhood of one segment `[start, stop)`.

    `before` holds the positions `[before_start, start)`, `after` those of `[stop, after_stop)`;
    both are cut at the ends of the sequence.
    """

    before: Tensor
    after: Tensor
    before_start: int
    start: int
    stop: int
    after_stop: int


def start_halo(
    x: Tensor,
    layout: Layout,
    group: ProcessGroup | None,
    *,
    dim: int,
    before: int,
    after: int = 0,
) -> Pending[list[Halo]]:
    """A `Halo` for each of this rank's segments, in their order. The dtype is kept.

    Raises:
        ShapeError: x does not hold this rank's tokens, or a width is negative.
    """
    check_member(group)
    me = rank_of(group)
    _check(x, layout, group, dim, before, after)
    x = x.detach()
    pieces = {r: halo_pieces(layout, r, before, after) for r in range(size_of(group))}
    sends = {r: _take(x, own, dim) for r in pieces if r != me and (own := _of(pieces[r], me))}
    runs = {r: own for r in pieces if r != me and (own := _of(pieces[me], r))}
    specs = {r: (sized(x, dim, _tokens(own)), x.dtype) for r, own in runs.items()}

    def finish(got: dict[int, Tensor]) -> list[Halo]:
        return [
            Halo(
                _window(x, got, runs, layout, me, dim, low, start),
                _window(x, got, runs, layout, me, dim, stop, high),
                low,
                start,
                stop,
                high,
            )
            for low, start, stop, high in _bounds(layout, me, before, after)
        ]

    return start_pairs(sends, specs, group, move="halo", device=x.device).then(finish)


def start_halo_adjoint(
    grads: Sequence[tuple[Tensor, Tensor]],
    like: Tensor,
    layout: Layout,
    group: ProcessGroup | None,
    *,
    dim: int,
    before: int,
    after: int = 0,
    into: Tensor | None = None,
) -> Pending[Tensor]:
    """What the halos' gradients add to the gradient of x: shaped as `like`, float32 or float64.

    `grads` holds, for each of this rank's segments, the gradients of its `before` and `after`.
    `into`: add to this tensor, shaped as the result, instead of to a new one of zeros.
    """
    me = rank_of(group)
    wide = sum_dtype(like.dtype)
    pieces = {r: halo_pieces(layout, r, before, after) for r in range(size_of(group))}
    back = {
        r: torch.zeros(sized(like, dim, _tokens(own)), dtype=wide, device=like.device)
        for r in pieces
        if r != me and (own := _of(pieces[me], r))
    }
    mine = torch.zeros(like.shape, dtype=wide, device=like.device) if into is None else into
    runs = {r: _of(pieces[me], r) for r in back}
    for (low, start, stop, high), pair in zip(
        _bounds(layout, me, before, after), grads, strict=True
    ):
        for (first, last), grad in zip(((low, start), (stop, high)), pair, strict=True):
            for piece, here in _places(layout, first, last):
                part = grad.narrow(dim, here, piece.stop - piece.start)
                into, offset = (
                    (mine, piece.offset)
                    if piece.rank == me
                    else (back[piece.rank], _offset(runs[piece.rank], piece.start))
                )
                into.narrow(dim, offset, piece.stop - piece.start).add_(part)
    owed = {r: own for r in pieces if r != me and (own := _of(pieces[r], me))}
    specs = {r: (sized(like, dim, _tokens(own)), wide) for r, own in owed.items()}

    def finish(got: dict[int, Tensor]) -> Tensor:
        got = {r: t for r, t in got.items() if r != me}
        for rank in sorted({*got, me}):
            if rank == me:
                continue
            _put(mine, got[rank], owed[rank], dim)
        return mine

    return start_pairs(back, specs, group, move="halo", device=like.device).then(finish)


def halo(
    x: Tensor,
    layout: Layout,
    group: ProcessGroup | None,
    *,
    dim: int,
    before: int,
    after: int = 0,
) -> list[Halo]:
    """Differentiable `start_halo`."""
    bounds = _bounds(layout, rank_of(group), before, after)
    found = _Halo.apply(x, layout, group, dim % x.dim(), before, after)
    return [
        Halo(found[2 * number], found[2 * number + 1], *bound)
        for number, bound in enumerate(bounds)
    ]


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layout: Layout,
        group: ProcessGroup | None,
        dim: int,
        before: int,
        after: int,
    ) -> tuple[Tensor, ...]:
        ctx.arguments = (layout, group, dim, before, after)
        ctx.shape, ctx.options = x.shape, {"dtype": x.dtype, "device": x.device}
        found = start_halo(x, layout, group, dim=dim, before=before, after=after).wait()
        tensors = [t for one in found for t in (one.before, one.after)]
        # A rank without segments still owes its neighbours nothing and gets nothing, but an
        # output keeps it attached.
        return tuple(tensors) or (x.new_zeros(sized(x, dim, 0)),)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        layout, group, dim, before, after = ctx.arguments
        count = len(layout.segments(rank_of(group)))
        pairs = [(grads[2 * i], grads[2 * i + 1]) for i in range(count)]
        like = torch.empty(ctx.shape, **ctx.options)
        total = start_halo_adjoint(
            pairs, like, layout, group, dim=dim, before=before, after=after
        ).wait()
        return total.to(like.dtype), None, None, None, None, None


def _check(
    x: Tensor, layout: Layout, group: ProcessGroup | None, dim: int, before: int, after: int
) -> None:
    if before < 0 or after < 0:
        raise ShapeError("a halo's widths must not be negative", f"before {before}, after {after}")
    if layout.parts != size_of(group):
        raise ShapeError(
            "the layout is for another number of ranks", f"{layout.parts} and {size_of(group)}"
        )
    if x.shape[dim] != layout.local_length(rank_of(group)):
        raise ShapeError(
            f"x holds {x.shape[dim]} tokens along dim {dim}",
            f"rank {rank_of(group)} holds {layout.local_length(rank_of(group))}",
        )


def _bounds(layout: Layout, rank: int, before: int, after: int) -> list[tuple[int, int, int, int]]:
    return [
        (max(0, start - before), start, stop, min(layout.length, stop + after))
        for start, stop in layout.segments(rank)
    ]


def _of(pieces: Sequence[Piece], rank: int) -> list[Piece]:
    return [piece for piece in pieces if piece.rank == rank]


def _tokens(pieces: Sequence[Piece]) -> int:
    return sum(piece.stop - piece.start for piece in pieces)


def _take(x: Tensor, pieces: Sequence[Piece], dim: int) -> Tensor:
    return torch.cat([x.narrow(dim, p.offset, p.stop - p.start) for p in pieces], dim)


def _put(x: Tensor, grads: Tensor, pieces: Sequence[Piece], dim: int) -> None:
    offset = 0
    for piece in pieces:
        length = piece.stop - piece.start
        x.narrow(dim, piece.offset, length).add_(grads.narrow(dim, offset, length))
        offset += length


def _places(layout: Layout, start: int, stop: int) -> list[tuple[Piece, int]]:
    """The pieces of `[start, stop)` with their place inside that window."""
    return [(piece, piece.start - start) for piece in layout.owners(start, stop)]


def _offset(pieces: Sequence[Piece], position: int) -> int:
    """Where `position` lies in the tensor that carries `pieces` one after another."""
    offset = 0
    for piece in pieces:
        if piece.start <= position < piece.stop:
            return offset + position - piece.start
        offset += piece.stop - piece.start
    raise AssertionError(f"position {position} does not travel")


def _window(
    x: Tensor,
    got: dict[int, Tensor],
    runs: dict[int, list[Piece]],
    layout: Layout,
    me: int,
    dim: int,
    start: int,
    stop: int,
) -> Tensor:
    parts = [
        x.narrow(dim, piece.offset, piece.stop - piece.start)
        if piece.rank == me
        else got[piece.rank].narrow(
            dim, _offset(runs[piece.rank], piece.start), piece.stop - piece.start
        )
        for piece in layout.owners(start, stop)
    ]
    return torch.cat(parts, dim) if parts else x.new_empty(sized(x, dim, 0))
