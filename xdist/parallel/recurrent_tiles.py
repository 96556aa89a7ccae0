"""One rank's share of a scan, cut into tiles: which documents enter, start inside and end.

A scan runs along positions, or against them (`reverse`): the mirrored sequence, whose position p
is N - 1 - p and whose document i is the last but i. A rank's segments keep their order and offsets;
inside a segment the tokens are then read backwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xdist.documents import Documents
from xdist.layout import Layout
from xdist.shard import may_keep


@dataclass(frozen=True, eq=False)
class Tile:
    """A run of tokens of one segment. Documents are counted as the caller counts them.

    at: of the local tensor. starts: bool [T], True where a document starts behind the tile's first
    token; None where none does. fresh: a document starts at the first token, `document`.
    closes: the document that ends with the last token, if one does.
    """

    at: slice
    reverse: bool
    starts: NDArray[np.bool_] | None
    fresh: bool
    document: int
    closes: int | None
    _marks: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def take(self, x: Tensor) -> Tensor:
        """The tile's tokens of a local tensor [B, n, ...], in the order of the scan."""
        part = x[:, self.at]
        return part.flip(1) if self.reverse else part

    def put(self, x: Tensor, part: Tensor) -> None:
        """Write the tile's tokens, given in the order of the scan."""
        x[:, self.at] = part.flip(1) if self.reverse else part

    def marks(self, device: torch.device) -> Tensor | None:
        """`starts` as a tensor, copied to a card once: calls of equal shares have their tiles in
        common."""
        if self.starts is None:
            return None
        # A tracing mode neither takes what real calls kept nor leaves anything to them.
        if not may_keep():
            return torch.from_numpy(self.starts).to(device)
        if device not in self._marks:
            # What is kept must serve calls outside inference mode too.
            with torch.inference_mode(False):
                self._marks[device] = torch.from_numpy(self.starts).to(device)
        return self._marks[device]


@dataclass(frozen=True, eq=False)
class Segment:
    """One non-empty segment in the order of the scan; `start` in positions of the scan.

    enters: its first tile continues a document of an earlier segment; leaves: its last document
    goes on in a later one; single: no document starts behind its first token.
    """

    start: int
    enters: bool
    leaves: bool
    tiles: tuple[Tile, ...]

    @property
    def single(self) -> bool:
        """Whether one document fills the segment."""
        return all(tile.starts is None for tile in self.tiles) and not any(
            tile.fresh for tile in self.tiles[1:]
        )

    @cached_property
    def waiting(self) -> int:
        """How many of the first tiles need the state that enters the segment, or come behind one
        that does in a document of its own."""
        if not self.enters:
            return 0
        fresh = [i for i, tile in enumerate(self.tiles) if tile.fresh]
        return fresh[0] if fresh else len(self.tiles)

    @cached_property
    def asked(self) -> int:
        """The first of the tiles that need the gradient of the state that leaves the segment."""
        if not self.leaves:
            return len(self.tiles)
        return max((i for i, tile in enumerate(self.tiles) if tile.fresh), default=0)

    @cached_property
    def reach(self) -> int:
        """How many of the first tiles the entering state has an effect on."""
        for number, tile in enumerate(self.tiles):
            if tile.fresh and number:
                return number
            if tile.starts is not None:
                return number + 1
        return len(self.tiles)

    @cached_property
    def origin(self) -> int:
        """The tile from which on the state that leaves the segment is made."""
        for number in range(len(self.tiles) - 1, -1, -1):
            if self.tiles[number].fresh or self.tiles[number].starts is not None:
                return number
        return 0


@dataclass(frozen=True)
class Share:
    """The share of `rank`; `layout` and `documents` as the caller has them."""

    layout: Layout
    documents: Documents
    rank: int
    reverse: bool = False

    @cached_property
    def scan_layout(self) -> Layout:
        """The layout in positions of the scan."""
        return self.layout.mirrored() if self.reverse else self.layout

    @cached_property
    def scan_documents(self) -> Documents:
        """The documents in positions of the scan."""
        return self.documents.mirrored() if self.reverse else self.documents

    def segments(self, tile_tokens: int, *, at_documents: bool) -> tuple[Segment, ...]:
        """The segments in the order of the local tensor, cut into tiles of at most `tile_tokens`,
        with `at_documents` also wherever a document starts."""
        return _segments(self, tile_tokens, at_documents)


@lru_cache(maxsize=64)
def _segments(share: Share, tile_tokens: int, at_documents: bool) -> tuple[Segment, ...]:
    documents = share.scan_documents
    cuts = np.unique(np.asarray(documents.cu_seqlens, dtype=np.int64))
    found = []
    for piece in share.scan_layout.pieces_of(share.rank):
        inner = cuts[(cuts > piece.start) & (cuts < piece.stop)]
        borders = {piece.start, piece.stop, *range(piece.start, piece.stop, tile_tokens)}
        if at_documents:
            borders.update(inner.tolist())
        ordered = sorted(borders)
        tiles = []
        for a, b in pairwise(ordered):
            first = piece.offset + (piece.stop - b if share.reverse else a - piece.start)
            tiles.append(_tile(share, slice(first, first + b - a), a, b, inner))
        found.append(
            Segment(
                piece.start,
                documents.continues(piece.start),
                documents.continues(piece.stop),
                tuple(tiles),
            )
        )
    return tuple(found)


def _tile(share: Share, at: slice, a: int, b: int, cuts: NDArray[np.int64]) -> Tile:
    documents = share.scan_documents
    first, last = (int(i) for i in documents.index([a, b - 1]))
    own = cuts[(cuts > a) & (cuts < b)]
    starts = None
    if own.size:
        starts = np.zeros(b - a, dtype=np.bool_)
        starts[own - a] = True
    last_index = documents.count - 1

    def named(index: int) -> int:
        return last_index - index if share.reverse else index

    return Tile(
        at=at,
        reverse=share.reverse,
        starts=starts,
        fresh=not documents.continues(a),
        document=named(first),
        closes=named(last) if documents.cu_seqlens[last + 1] == b else None,
    )


def final_owners(share: Share) -> list[int | None]:
    """The rank where each document's last token in the order of the scan is; None: it is empty."""
    documents, layout = share.documents, share.layout
    owners: list[int | None] = []
    for start, stop in pairwise(documents.cu_seqlens):
        last = start if share.reverse else stop - 1
        owners.append(layout.owners(last, last + 1)[0].rank if stop > start else None)
    return owners
