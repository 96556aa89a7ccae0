"""What one rank's segments mean to a recurrence: which documents enter, pass through and leave.

Pure integers. A *run* is the part of one document inside one segment. Only the first run of a
segment can depend on an earlier segment and only the last can reach a later one; everything
between is local.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from xdist.documents import Documents
from xdist.layout import Layout


@dataclass(frozen=True)
class Segment:
    """One non-empty segment `[start, stop)` of global positions at `offset` of the local tensor.

    first_stop: tokens of the first run; last_start: tokens before the last run (0 when there is
    one run). enters: the first run continues a document of an earlier segment. leaves: the last
    run's document goes on in a later segment. first_document, last_document: their indices.
    """

    start: int
    stop: int
    offset: int
    first_stop: int
    last_start: int
    enters: bool
    leaves: bool
    first_document: int
    last_document: int

    @property
    def tokens(self) -> slice:
        """Where the segment lies in the rank's local tensor."""
        return slice(self.offset, self.offset + self.stop - self.start)

    @property
    def single(self) -> bool:
        """Whether one document fills the segment."""
        return self.last_start == 0

    @property
    def first(self) -> slice:
        """The first run, relative to the segment."""
        return slice(0, self.first_stop)

    @property
    def last(self) -> slice:
        """The last run, relative to the segment."""
        return slice(self.last_start, self.stop - self.start)


@dataclass(frozen=True)
class Segments:
    """The segments of `rank`, in the order of its local tensor."""

    layout: Layout
    documents: Documents
    rank: int

    @cached_property
    def items(self) -> tuple[Segment, ...]:
        """The segments."""
        own = self.layout.pieces_of(self.rank)
        return tuple(self._describe(p.start, p.stop, p.offset) for p in own)

    def _describe(self, start: int, stop: int, offset: int) -> Segment:
        ends = np.array([start, stop - 1])
        first, last = (int(i) for i in self.documents.index(ends))
        return Segment(
            start=start,
            stop=stop,
            offset=offset,
            first_stop=min(stop, self.documents.cu_seqlens[first + 1]) - start,
            last_start=max(start, self.documents.cu_seqlens[last]) - start,
            enters=self.documents.continues(start),
            leaves=self.documents.continues(stop),
            first_document=first,
            last_document=last,
        )

    def starts(self, segment: Segment) -> NDArray[np.bool_] | None:
        """True at the first token of each document but the segment's own first token, bool [n].

        None when one document fills the segment. What enters at the segment's first token is
        given to the recurrence as its state.
        """
        if segment.single:
            return None
        cuts = np.asarray(self.documents.cu_seqlens, dtype=np.int64)
        inside = cuts[(cuts > segment.start) & (cuts < segment.stop)]
        found = np.zeros(segment.stop - segment.start, dtype=np.bool_)
        found[inside - segment.start] = True
        return found

    def runs(self, segment: Segment) -> list[tuple[slice, int]]:
        """(tokens relative to the segment, document) of each run."""
        found = self.documents.runs(segment.start, segment.stop)
        return [(slice(a - segment.start, b - segment.start), d) for a, b, d in found]


def final_owners(layout: Layout, documents: Documents) -> list[int | None]:
    """The rank that holds each document's last token; None for an empty document."""
    owners: list[int | None] = []
    for start, stop in zip(documents.cu_seqlens[:-1], documents.cu_seqlens[1:], strict=True):
        owners.append(layout.owners(stop - 1, stop)[0].rank if stop > start else None)
    return owners
