"""A causal convolution's share as stretches of tokens, each with the history it reads. Integers.

Positions are those of the walk: with `reverse` layout and documents are mirrored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup
from xdist.documents import Documents
from xdist.layout import Layout, Piece


class Stretch(NamedTuple):
    """A run of local tokens and what lies before it: `initial` tokens of the initial state of
    `document` (its last ones), then `halo` tokens of the halo of `segment`, zeros in front of them;
    or, with `follows`, the tokens that stand before it in the local tensor."""

    at: slice  # of the local tensor
    into_document: Tensor | None  # [tokens]; None where every tap counts
    follows: bool = False
    segment: int = 0
    document: int = 0
    initial: tuple[int, int] = (0, 0)  # slots of the state
    halo: int = 0

    @property
    def tokens(self) -> int:
        return int(self.at.stop - self.at.start)


@dataclass(frozen=True)
class Walk:
    """Everything about one call that is no tensor; `reach` is W - 1."""

    layout: Layout
    documents: Documents
    rank: int
    group: ProcessGroup | None
    reach: int
    activation: str | None
    has_state: bool
    inside: Tensor | None  # [n] position of each local token in its document; None with one
    backend: str = "torch"

    def stretches(self) -> list[Stretch]:
        """All of this rank's tokens; one that follows another stands right behind it."""
        found: list[Stretch] = []
        for number, piece in enumerate(self.layout.pieces_of(self.rank)):
            if self.has_state:
                for start, stop, document in self.documents.runs(piece.start, piece.stop):
                    offset = piece.offset + start - piece.start
                    before = start - self.documents.cu_seqlens[document]
                    # A document's state lies before its first token, its own tokens in between.
                    halo = min(before, self.reach)
                    head = Stretch(
                        slice(offset, offset), None, False, number, document,
                        (halo, self.reach), halo,
                    )  # fmt: skip
                    found.extend(self._cut(head, stop - start))
            else:
                halo = min(piece.start, self.reach)
                head = Stretch(slice(piece.offset, piece.offset), None, segment=number, halo=halo)
                found.extend(self._cut(head, piece.stop - piece.start))
        return found

    def _cut(self, head: Stretch, tokens: int) -> Iterator[Stretch]:
        """The first W - 1 tokens, which read the history, and the rest, which read the tensor."""
        start = head.at.start
        middle = start + min(self.reach, tokens)
        yield head._replace(at=slice(start, middle), into_document=self._into(start, middle))
        if middle < start + tokens:
            rest = slice(middle, start + tokens)
            yield Stretch(rest, self._into(middle, start + tokens), follows=True)

    def _into(self, start: int, stop: int) -> Tensor | None:
        return None if self.inside is None or self.has_state else self.inside[start:stop]

    def final_slots(self, owned: list[list[Piece]]) -> Tensor:
        """Where each slot of the final states [documents, W - 1] comes from: an index into the
        initial states' slots, all documents', followed by the gathered tokens `owned`."""
        order = (p for pieces in owned for piece in pieces for p in range(piece.start, piece.stop))
        place = {position: number for number, position in enumerate(order)}
        slots = np.empty((self.documents.count, self.reach), dtype=np.int64)
        offset = self.documents.count * self.reach
        for document in range(self.documents.count):
            start, stop = self.documents.cu_seqlens[document : document + 2]
            for slot in range(self.reach):
                position = stop - self.reach + slot
                inside = position >= start
                # Before the document's start: the state, moved up by the document's length.
                earlier = document * self.reach + slot + stop - start
                slots[document, slot] = offset + place[position] if inside else earlier
        return torch.from_numpy(slots).flatten()
