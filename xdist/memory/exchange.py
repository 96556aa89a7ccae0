"""The exchanges of a streamed layer over one shard: the halo of its input, the scan of its state.

halo   the `width` tokens before each segment, from whichever ranks hold them; backward sends
       their gradients back. Received: width x C a segment, less where the sequence starts
scan   every segment's summary (E [B, H, K, V] and total log decay [B, H]) to the ranks that
       hold a later segment; each folds what precedes its own segments. Backward sends the
       adjoint summaries to the ranks of earlier segments; totals are kept, not sent again
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xdist.comm.collectives import start_pairs
from xdist.documents import Documents
from xdist.errors import ShapeError
from xdist.layout import Layout, Piece


class Exchange:
    """What crosses segments and ranks for the layers of one batch.

    layout, documents: of the whole sequence; rank, group: this rank among the sequence ranks
    (group None: one rank, every exchange stays local).
    """

    def __init__(
        self, layout: Layout, documents: Documents, rank: int = 0, group: Any = None
    ) -> None:
        self.layout = layout
        self.documents = documents
        self.rank = rank
        self.group = group
        self.segments = tuple(layout.segments(rank))
        self.pieces = layout.pieces
        self._others = [r for r in range(layout.parts) if r != rank]
        # The place of each non-empty local segment among all pieces, by its index.
        self._place = {p.number: i for i, p in enumerate(self.pieces) if p.rank == rank}

    @property
    def scans(self) -> bool:
        """Whether a state crosses from one piece of the sequence to another."""
        return len(self.pieces) > 1

    def followed(self, index: int) -> bool:
        """Whether another piece comes after local segment `index`."""
        return self._place.get(index, len(self.pieces)) + 1 < len(self.pieces)

    # --- halo ----------------------------------------------------------------------------------

    def _wanted(self, piece: Piece, width: int) -> list[Piece]:
        return self.layout.owners(max(0, piece.start - width), piece.start) if width else []

    def _edges(self, width: int, source: int, target: int) -> list[Piece]:
        """Tokens `source` sends to `target`, in the order of the target's segments."""
        return [
            part
            for piece in self.layout.pieces_of(target)
            for part in self._wanted(piece, width)
            if part.rank == source
        ]

    def halo(self, x: Tensor, width: int) -> list[Tensor]:
        """The tokens before each local segment, [B, m, ...] with m <= width, of x [B, n, ...]."""
        sends, receives = {}, {}
        for other in range(self.layout.parts):
            own = self._edges(width, self.rank, other)
            if own:
                sends[other] = torch.cat([_part(x, p) for p in own], 1)
            tokens = sum(p.stop - p.start for p in self._edges(width, other, self.rank))
            if tokens:
                receives[other] = ((x.shape[0], tokens, *x.shape[2:]), x.dtype)
        got = start_pairs(sends, receives, self.group, move="halo", device=x.device).wait()
        used = dict.fromkeys(got, 0)
        halos = [x[:, :0]] * len(self.segments)
        for piece in self.layout.pieces_of(self.rank):
            parts = []
            for part in self._wanted(piece, width):
                first = used[part.rank]
                used[part.rank] = first + part.stop - part.start
                parts.append(got[part.rank][:, first : used[part.rank]])
            if parts:
                halos[piece.number] = torch.cat(parts, 1)
        return halos

    def halo_adjoint(self, dx: Tensor, dhalo: Sequence[Tensor], width: int) -> None:
        """Adds the gradients of all ranks' halos to the dx [B, n, ...] of the tokens' owners."""
        pieces: dict[int, list[Tensor]] = {}
        for piece in self.layout.pieces_of(self.rank):
            first = 0
            for part in self._wanted(piece, width):
                stop = first + part.stop - part.start
                pieces.setdefault(part.rank, []).append(dhalo[piece.number][:, first:stop])
                first = stop
        sends = {rank: torch.cat(parts, 1) for rank, parts in pieces.items()}
        edges = {other: self._edges(width, self.rank, other) for other in range(self.layout.parts)}
        receives = {
            other: ((dx.shape[0], sum(p.stop - p.start for p in own), *dx.shape[2:]), dx.dtype)
            for other, own in edges.items()
            if own
        }
        got = start_pairs(sends, receives, self.group, move="halo", device=dx.device).wait()
        for other in sorted(got):
            first = 0
            for part in edges[other]:
                stop = first + part.stop - part.start
                _part(dx, part).add_(got[other][:, first:stop])
                first = stop

    # --- scan ----------------------------------------------------------------------------------

    def scan(
        self, zero: Tensor, ends: Sequence[Tensor], totals: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The state before each local segment, and every piece's total log decay.

        zero: a state of zeros [B, H, K, V]; ends: each segment's state after it from a zero state
        before it; totals: its summed log decay [B, H].
        """
        states, decays = self._gather(zero, ends, totals)
        incoming = [zero] * len(self.segments)
        state = zero
        for place, piece in enumerate(self.pieces):
            if not self.documents.continues(piece.start):
                state = zero
            if piece.rank == self.rank:
                incoming[piece.number] = state
            if states[place] is None:
                break
            state = states[place] + self._carried(piece, decays[place], state)
        return incoming, decays

    def scan_adjoint(
        self, zero: Tensor, starts: Sequence[Tensor], decays: Sequence[Tensor]
    ) -> list[Tensor]:
        """The gradient of the state after each local segment.

        starts: gradient of the state before each segment from that segment alone; decays: as
        `scan` returned them.
        """
        gradients, _ = self._gather(zero, starts, None)
        outgoing = [zero] * len(self.segments)
        after = zero
        for place in range(len(self.pieces) - 1, -1, -1):
            piece = self.pieces[place]
            if piece.rank == self.rank:
                outgoing[piece.number] = after
            if gradients[place] is None:
                break
            before = gradients[place] + self._carried(piece, decays[place], after)
            after = before if self.documents.continues(piece.start) else zero
        return outgoing

    def _carried(self, piece: Piece, decay: Tensor, state: Tensor) -> Tensor | float:
        """What is left of a state after a piece: nothing where a document starts inside it."""
        if int(self.documents.starts(piece.stop - 1)) > piece.start:
            return 0.0
        return decay.exp()[..., None, None] * state

    def _travels(self, place: int, target: int, forward: bool) -> bool:
        """Whether rank `target` holds a piece after (adjoint: before) piece `place`."""
        rest = self.pieces[place + 1 :] if forward else self.pieces[:place]
        return any(piece.rank == target for piece in rest)

    def _gather(
        self, zero: Tensor, own: Sequence[Tensor], totals: Sequence[Tensor] | None
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """The summaries this rank needs, by place (None: not needed), and every total."""
        forward = totals is not None
        sends = {}
        for other in self._others:
            parts = []
            for place, piece in enumerate(self.pieces):
                if piece.rank != self.rank:
                    continue
                if self._travels(place, other, forward):
                    parts.append(own[piece.number].flatten())
                if totals is not None:
                    parts.append(totals[piece.number].flatten())
            if parts:
                sends[other] = torch.cat(parts)
        receives = {}
        for other in self._others:
            count = self._numbers(other, self.rank, zero, forward)
            if count:
                receives[other] = ((count,), zero.dtype)
        got = start_pairs(sends, receives, self.group, move="scan", device=zero.device).wait()
        used = dict.fromkeys(got, 0)

        def take(rank: int, shape: Sequence[int]) -> Tensor:
            first = used[rank]
            used[rank] = first + math.prod(shape)
            return got[rank][first : used[rank]].view(*shape)

        states: list[Tensor | None] = []
        decays: list[Tensor] = []
        for place, piece in enumerate(self.pieces):
            mine = piece.rank == self.rank
            needed = self._travels(place, self.rank, forward)
            if mine:
                states.append(own[piece.number])
            else:
                states.append(take(piece.rank, zero.shape) if needed else None)
            if totals is not None:
                total = totals[piece.number] if mine else take(piece.rank, zero.shape[:2])
                decays.append(total)
        return states, decays

    def _numbers(self, source: int, target: int, zero: Tensor, forward: bool) -> int:
        """Elements of one scan message."""
        total = zero.shape[0] * zero.shape[1] if forward else 0
        return sum(
            zero.numel() * self._travels(place, target, forward) + total
            for place, piece in enumerate(self.pieces)
            if piece.rank == source
        )


def _part(x: Tensor, piece: Piece) -> Tensor:
    return x[:, piece.offset : piece.offset + piece.stop - piece.start]


def exchange_of(shard: Any, tokens: Tensor) -> Exchange:
    """The exchange of a batch of tokens [B, n] under a shard (None: one rank holds it all).

    Raises:
        ShapeError: the tokens are not this rank's share.
    """
    if shard is None:
        n = tokens.shape[1]
        return Exchange(Layout.contiguous(n, 1), Documents.of(None, n))
    if tokens.shape[1] != shard.local_length:
        raise ShapeError(
            "tokens are not this rank's share of the sequence",
            f"{tokens.shape[1]} tokens were given, the shard holds {shard.local_length} of "
            f"{shard.layout.length}",
            "pass shard.scatter(tokens), or the slice of shard.positions",
        )
    return Exchange(shard.layout, shard.documents, shard.rank, shard.group)
