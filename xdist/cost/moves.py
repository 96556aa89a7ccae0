"""Bytes of each move, as formulas over integers: what one rank sends and receives.

`itemsize` is bytes an element; moved data keep their dtype, sums travel in float32 or float64
(`sum_itemsize`). `other` is the number of elements in one index of the moved dim. No torch, no
process group: a plan for 64 ranks is computed on one.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from xdist.layout import Layout, Piece, even_sizes


class Moved(NamedTuple):
    """Bytes one rank sends to and receives from other ranks."""

    sent_bytes: int = 0
    received_bytes: int = 0

    def __add__(self, other: object) -> Moved:
        """Both moves, one after the other."""
        if not isinstance(other, Moved):
            return NotImplemented
        return Moved(self.sent_bytes + other.sent_bytes, self.received_bytes + other.received_bytes)

    def back(self, itemsize: int = 1, sum_itemsize: int = 1) -> Moved:
        """The adjoint: the same elements the other way, in the dtype of sums."""
        return Moved(
            self.received_bytes * sum_itemsize // itemsize,
            self.sent_bytes * sum_itemsize // itemsize,
        )


def sum_itemsize(itemsize: int) -> int:
    """Bytes an element of a sum over ranks takes: 8 for float64, else 4."""
    return 8 if itemsize == 8 else 4


def switch_bytes(
    from_sizes: Sequence[int], to_sizes: Sequence[int], rank: int, other: int, itemsize: int
) -> Moved:
    """`from_sizes[rank]` x (to - own share) sent, (from - own share) x `to_sizes[rank]` received.

    `other` is the product of the remaining dims. The adjoint swaps the two lists.
    """
    sent = from_sizes[rank] * (sum(to_sizes) - to_sizes[rank])
    received = (sum(from_sizes) - from_sizes[rank]) * to_sizes[rank]
    return Moved(sent * other * itemsize, received * other * itemsize)


def gather_bytes(sizes: Sequence[int], rank: int, other: int, itemsize: int) -> Moved:
    """(P-1) x own share sent, the other shares received."""
    own = sizes[rank]
    return Moved((len(sizes) - 1) * own * other * itemsize, (sum(sizes) - own) * other * itemsize)


def reduce_scatter_bytes(sizes: Sequence[int], rank: int, other: int, itemsize: int) -> Moved:
    """Gather's adjoint: the other shares sent, (P-1) x own share received, in the sums' dtype."""
    return gather_bytes(sizes, rank, other, itemsize).back(itemsize, sum_itemsize(itemsize))


def reduce_bytes(elements: int, ranks: int, rank: int, itemsize: int) -> Moved:
    """A reduce-scatter and a gather of even shares, both in the sums' dtype (`itemsize` bytes)."""
    sizes = even_sizes(elements, ranks)
    there = gather_bytes(sizes, rank, 1, itemsize)
    return there + there.back()


def broadcast_bytes(elements: int, ranks: int, rank: int, root: int, itemsize: int) -> Moved:
    """P-1 copies sent by the root, one received by each other rank."""
    size = elements * itemsize
    return Moved((ranks - 1) * size, 0) if rank == root else Moved(0, size)


def ring_bytes(
    sizes: Sequence[int], needs: Sequence[Sequence[int]], rank: int, other: int, itemsize: int
) -> Moved:
    """Own block once to each other rank that needs it; each needed block of others received."""
    users = sum(rank in owners for user, owners in enumerate(needs) if user != rank)
    received = sum(sizes[owner] for owner in {*needs[rank]} - {rank})
    return Moved(users * sizes[rank] * other * itemsize, received * other * itemsize)


def halo_pieces(layout: Layout, rank: int, before: int, after: int) -> list[Piece]:
    """What `rank` needs from others around its segments: runs in position order, each once."""
    windows: list[list[int]] = []
    for start, stop in sorted(layout.segments(rank)):
        for low, high in (
            (max(0, start - before), start),
            (stop, min(layout.length, stop + after)),
        ):
            if low >= high:
                continue
            windows.append([low, high])
    merged: list[list[int]] = []
    for low, high in sorted(windows):
        if merged and low <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], high)
        else:
            merged.append([low, high])
    return [
        piece for low, high in merged for piece in layout.owners(low, high) if piece.rank != rank
    ]


def halo_bytes(
    layout: Layout, rank: int, before: int, after: int, other: int, itemsize: int
) -> Moved:
    """Each token another rank owns and this one's segments look at, once."""
    received = sum(p.stop - p.start for p in halo_pieces(layout, rank, before, after))
    sent = sum(
        piece.stop - piece.start
        for user in range(layout.parts)
        if user != rank
        for piece in halo_pieces(layout, user, before, after)
        if piece.rank == rank
    )
    return Moved(sent * other * itemsize, received * other * itemsize)


def window_parts(
    layout: Layout, window: tuple[int, int]
) -> dict[int, tuple[tuple[int, int], tuple[int, int]]]:
    """Who holds what of a window: by rank, the places `[start, stop)` in the window and in that
    rank's share. For layouts of at most one segment a rank."""
    return {
        piece.rank: (
            (piece.start - window[0], piece.stop - window[0]),
            (piece.offset, piece.offset + piece.stop - piece.start),
        )
        for piece in layout.owners(*window)
    }


def window_bytes(
    layout: Layout,
    windows: Sequence[tuple[int, int]],
    rank: int,
    other: int,
    itemsize: int,
) -> Moved:
    """Forward bytes of a window move; the adjoint is `.back(itemsize, sum_itemsize(itemsize))`.

    windows: of every rank; other: elements in one position of the moved dim.
    """

    def taken(by: int, of: int) -> int:
        start, stop = window_parts(layout, windows[by]).get(of, ((0, 0), (0, 0)))[1]
        return stop - start

    others = [r for r in range(layout.parts) if r != rank]
    size = other * itemsize
    return Moved(
        sum(taken(r, rank) for r in others) * size, sum(taken(rank, r) for r in others) * size
    )


def relayout_bytes(source: Layout, target: Layout, rank: int, other: int, itemsize: int) -> Moved:
    """Tokens held before and not after are sent; tokens held after and not before received."""
    kept = sum(
        piece.stop - piece.start
        for start, stop in source.segments(rank)
        for piece in target.owners(start, stop)
        if piece.rank == rank
    )
    return Moved(
        (source.local_length(rank) - kept) * other * itemsize,
        (target.local_length(rank) - kept) * other * itemsize,
    )


TRANSITIONS = ("none", "scalar", "diagonal", "matrix", "logsumexp")


def transition_elements(kind: str, key_dim: int) -> int:
    """Elements of one segment's transition for one state of `key_dim` rows."""
    moving = {"scalar": 1, "diagonal": key_dim, "matrix": key_dim * key_dim}
    return {"none": 0, "logsumexp": 0, **moving}[kind]


class ScanRoute(NamedTuple):
    """Who needs what of one segment, of any rank, for a scan; the same on every rank.

    `passes`: one document fills the segment and reaches beyond both ends, so its transition
    counts. `users` need its state (forward), `back_users` its adjoint state (backward),
    `transition_users` its transition.
    """

    piece: Piece
    enters: bool
    leaves: bool
    passes: bool
    users: tuple[int, ...]
    back_users: tuple[int, ...]
    transition_users: tuple[int, ...]


def scan_routes(layout: Layout, cu_seqlens: Sequence[int]) -> list[ScanRoute]:
    """The routes of every segment in position order; states start afresh at each document."""
    cuts = set(cu_seqlens[1:-1])
    pieces = layout.pieces
    inner = sorted(cuts)
    enters = [p.start > 0 and p.start not in cuts for p in pieces]
    leaves = [p.stop < layout.length and p.stop not in cuts for p in pieces]
    single = [bisect_right(inner, p.start) == bisect_left(inner, p.stop) for p in pieces]
    passes = [a and b and c for a, b, c in zip(enters, leaves, single, strict=True)]
    later: list[set[int]] = [set() for _ in pieces]
    earlier: list[set[int]] = [set() for _ in pieces]
    for i in range(len(pieces) - 2, -1, -1):
        if leaves[i]:
            later[i] = {pieces[i + 1].rank} | (later[i + 1] if passes[i + 1] else set())
    for i in range(1, len(pieces)):
        if enters[i]:
            earlier[i] = {pieces[i - 1].rank} | (earlier[i - 1] if passes[i - 1] else set())
    return [
        ScanRoute(
            piece,
            enters[i],
            leaves[i],
            passes[i],
            tuple(sorted(later[i])),
            tuple(sorted(earlier[i])),
            tuple(sorted(later[i] | earlier[i])) if passes[i] else (),
        )
        for i, piece in enumerate(pieces)
    ]


def scan_bytes(
    layout: Layout,
    cu_seqlens: Sequence[int],
    rank: int,
    state_shape: Sequence[int],
    transition: str,
    itemsize: int,
    *,
    backward: bool = False,
) -> Moved:
    """Gather-and-fold: states to the ranks that follow in the same document, transitions both ways.

    `state_shape` is `[..., K, V]` of one segment; `itemsize` that of sums. Backward sends adjoint
    states to the ranks before, and no transition again.
    """
    state = prod(state_shape)
    extra = prod(state_shape[:-2]) * transition_elements(transition, state_shape[-2])
    sent = received = 0
    for route in scan_routes(layout, cu_seqlens):
        users = route.back_users if backward else route.users
        loads = [(users, state)]
        if not backward:
            loads.append((route.transition_users, extra))
        for ranks, elements in loads:
            if route.piece.rank == rank:
                sent += elements * len(set(ranks) - {rank})
            elif rank in ranks:
                received += elements
    return Moved(sent * itemsize, received * itemsize)
