"""Edges of a window: what of a rank's window lies in front of and behind its own share.

Sharded before: `dim`, one run a rank; after: the same, with the edges beside it. Moves, per rank,
what `comm.window` moves, in one exchange; but this rank's own positions are neither copied nor
waited for, so that what needs only them is computed meanwhile. Backward the edges' gradients
return in float32 (float64 for float64), added in rank order. Saved for backward: nothing. Divides:
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xdist.comm.collectives import (
    ProcessGroup,
    check_member,
    rank_of,
    size_of,
    start_pairs,
)
from xdist.comm.pending import Pending
from xdist.comm.summing import sum_dtype
from xdist.comm.switch import sized
from xdist.comm.window import Window
from xdist.cost.moves import window_parts
from xdist.layout import Layout


def edge_bounds(layout: Layout, window: Window, rank: int) -> tuple[Window, Window]:
    """Positions in front of and behind the share of `rank`; of a rank without one all are in
    front."""
    start, stop = window
    held = layout.segments(rank)
    if not held:
        return window, (stop, stop)
    low, high = held[0]
    before = (start, min(stop, low)) if start < low else (low, low)
    after = (max(start, high), stop) if stop > high else (high, high)
    return before, after


def start_edges(
    x: Tensor,
    layout: Layout,
    group: ProcessGroup | None,
    *,
    dim: int,
    windows: Sequence[Window],
) -> Pending[tuple[Tensor, Tensor]]:
    """The positions of this rank's window in front of its share and behind it, in x's dtype.

    x: this rank's share; layout: at most one segment a rank; windows: of every rank, inside the
    sequence.
    """
    check_member(group)
    me, size = rank_of(group), size_of(group)
    assert x.shape[dim] == layout.local_length(me)
    assert layout.parts == len(windows) == size
    x = x.detach()
    parts = [window_parts(layout, windows[r]) for r in range(size)]
    sends = {r: _part(x, dim, *parts[r][me][1]) for r in range(size) if r != me and me in parts[r]}
    mine = {r: part for r, (part, _) in parts[me].items() if r != me}
    specs = {r: (sized(x, dim, stop - start), x.dtype) for r, (start, stop) in mine.items()}
    pending = start_pairs(sends, specs, group, move="halo", device=x.device)
    # Where the positions in front end, counted from the window's start.
    cut = edge_bounds(layout, windows[me], me)[0][1] - windows[me][0]

    def finish(got: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        order = sorted(mine, key=lambda r: mine[r][0])
        none = [x.narrow(dim, 0, 0)]
        before = [got[r] for r in order if mine[r][0] < cut]
        after = [got[r] for r in order if mine[r][0] >= cut]
        return torch.cat(none + before, dim), torch.cat(none + after, dim)

    return pending.then(finish)


def start_edges_adjoint(
    before: Tensor,
    after: Tensor,
    into: Tensor,
    layout: Layout,
    group: ProcessGroup | None,
    *,
    dim: int,
    windows: Sequence[Window],
) -> Pending[Tensor]:
    """Adds to `into`, shaped as the share, the gradients of what other ranks' edges hold of it.

    before, after: gradients of this rank's edges. They travel in the dtype of `into`, which is
    that of sums.
    """
    assert into.dtype == sum_dtype(into.dtype), "what is added across ranks is float32 or wider"
    me, size = rank_of(group), size_of(group)
    edges = torch.cat([before, after], dim).to(into.dtype)
    (first, middle), (second, _) = edge_bounds(layout, windows[me], me)

    def place(start: int) -> int:
        position = windows[me][0] + start
        return position - (first if position < middle else second - (middle - first))

    sends = {
        r: edges.narrow(dim, place(start), stop - start)
        for r, ((start, stop), _) in window_parts(layout, windows[me]).items()
        if r != me
    }
    owed = {
        r: part[me][1]
        for r in range(size)
        for part in [window_parts(layout, windows[r])]
        if r != me and me in part
    }
    specs = {r: (sized(into, dim, b - a), into.dtype) for r, (a, b) in owed.items()}
    pending = start_pairs(sends, specs, group, move="halo", device=into.device)

    def finish(got: dict[int, Tensor]) -> Tensor:
        for r in sorted(owed):
            _part(into, dim, *owed[r]).add_(got[r])
        return into

    return pending.then(finish)


def _part(x: Tensor, dim: int, start: int, stop: int) -> Tensor:
    return x.narrow(dim, start, stop - start)
