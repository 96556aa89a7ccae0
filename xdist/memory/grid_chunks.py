"""A rank's share in chunks: which documents enter, pass through and leave. Pure integers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from xdist.documents import Documents
from xdist.layout import Layout


class Chunk(NamedTuple):
    """Local tokens `at`, positions `[start, stop)`; fresh: a document starts with the chunk."""

    at: slice
    start: int
    stop: int
    fresh: bool


@dataclass(frozen=True)
class Segment:
    """One segment in chunks; tokens: where it lies in the local tensor.

    enters, leaves: its first, last document goes on in another segment; single: no document starts
    behind its first token. reach: how many of the first chunks the entering state has an effect
    on; origin: the chunk from which on the leaving state is made.
    """

    chunks: tuple[Chunk, ...]
    enters: bool
    leaves: bool
    single: bool
    reach: int
    origin: int

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.chunks[0].start


@lru_cache(maxsize=64)
def segments_of(
    layout: Layout, rank: int, documents: Documents, chunk_tokens: int
) -> tuple[Segment, ...]:
    """The segments of `rank`, in the order of its local tensor."""
    found = []
    for piece in layout.pieces_of(rank):
        chunks = []
        for start in range(piece.start, piece.stop, chunk_tokens):
            stop = min(start + chunk_tokens, piece.stop)
            at = piece.offset + start - piece.start
            fresh = not documents.continues(start)
            chunks.append(Chunk(slice(at, at + stop - start), start, stop, fresh))
        first_stop = int(documents.stops(piece.start))
        last_start = max(piece.start, int(documents.starts(piece.stop - 1)))
        found.append(
            Segment(
                chunks=tuple(chunks),
                enters=documents.continues(piece.start),
                leaves=documents.continues(piece.stop),
                single=last_start == piece.start,
                reach=-(-(min(first_stop, piece.stop) - piece.start) // chunk_tokens),
                origin=(last_start - piece.start) // chunk_tokens,
            )
        )
    return tuple(found)
