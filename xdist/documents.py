"""Packed documents: where one ends and the next begins. Pure integers, no process group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import index
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xdist.errors import DocumentsError


@dataclass(frozen=True)
class Documents:
    """Documents packed in a row: document i is the positions `[cu_seqlens[i], cu_seqlens[i + 1])`.

    `cu_seqlens` is global, starts at 0, ends at the sequence's length and never decreases; empty
    documents are allowed.
    """

    cu_seqlens: tuple[int, ...]

    @classmethod
    def of(cls, documents: Any, length: int) -> Documents:
        """`documents` (None, a sequence or integer tensor of cu_seqlens, Documents), checked.

        None is one document as long as the sequence.

        Raises:
            DocumentsError: not integers, not from 0 to `length`, or decreasing.
        """
        if documents is None:
            return cls((0, length))
        given = isinstance(documents, Documents)
        cuts = documents.cu_seqlens if given else _integers(documents)
        _check(cuts, length)
        return cls(cuts)

    @classmethod
    def whole(cls, documents: Any) -> Documents:
        """The documents of a sequence that ends with the last of them; else as `of`."""
        given = isinstance(documents, Documents)
        cuts = documents.cu_seqlens if given else _integers(documents)
        return cls.of(cuts, cuts[-1] if cuts else 0)

    def mirrored(self) -> Documents:
        """The same documents seen from the end: the last one first, position p is N - 1 - p."""
        return Documents(tuple(self.length - cut for cut in reversed(self.cu_seqlens)))

    @property
    def length(self) -> int:
        """Length of the sequence in tokens."""
        return self.cu_seqlens[-1]

    @property
    def count(self) -> int:
        """How many documents, empty ones included."""
        return len(self.cu_seqlens) - 1

    @cached_property
    def _cuts(self) -> NDArray[np.int64]:
        return np.asarray(self.cu_seqlens, dtype=np.int64)

    def index(self, positions: ArrayLike) -> NDArray[np.int64]:
        """The document each global position lies in, int64 of the same shape."""
        found = np.searchsorted(self._cuts, np.asarray(positions, dtype=np.int64), side="right")
        return np.asarray(found - 1, dtype=np.int64)

    def starts(self, positions: ArrayLike) -> NDArray[np.int64]:
        """The first position of each position's document."""
        return self._cuts[self.index(positions)]

    def stops(self, positions: ArrayLike) -> NDArray[np.int64]:
        """One past the last position of each position's document."""
        return self._cuts[self.index(positions) + 1]

    def continues(self, position: int) -> bool:
        """Whether `position - 1` exists and lies in the same document as `position`."""
        if not 0 < position < self.length:
            return False
        return bool(self.starts(position) < position)

    def runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The non-empty parts `(start, stop, document)` of `[start, stop)`, one per document."""
        found = []
        position = start
        while position < stop:
            document = int(self.index(position))
            end = min(stop, self.cu_seqlens[document + 1])
            found.append((position, end, document))
            position = end
        return found


def _integers(documents: Any) -> tuple[int, ...]:
    values = documents.tolist() if hasattr(documents, "tolist") else documents
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError("booleans given")
        return tuple(index(value) for value in values)
    except TypeError as error:
        raise DocumentsError(
            "documents must be a list or one-dimensional integer tensor of cu_seqlens", str(error)
        ) from error


def _check(cuts: tuple[int, ...], length: int) -> None:
    remedy = f"give cumulative lengths from 0 to {length}, for example [0, {length}]"
    if len(cuts) < 2:
        raise DocumentsError("cu_seqlens needs at least two entries", f"got {list(cuts)}", remedy)
    if cuts[0] != 0 or cuts[-1] != length:
        raise DocumentsError(
            f"cu_seqlens must start at 0 and end at the sequence's length {length}",
            f"it starts at {cuts[0]} and ends at {cuts[-1]}",
            remedy,
        )
    for number, (first, second) in enumerate(pairwise(cuts)):
        if second < first:
            raise DocumentsError(
                "cu_seqlens must not decrease",
                f"entry {number} is {first}, entry {number + 1} is {second}",
                remedy,
            )
