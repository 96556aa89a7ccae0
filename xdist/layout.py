"""Layouts: which segments of global positions each rank holds. Pure integers, no process group."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import index
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from xdist.balance import balanced_segments
from xdist.documents import Documents
from xdist.errors import LayoutError, MaskError
from xdist.mask import Mask


class Piece(NamedTuple):
    """A run `[start, stop)` of global positions and where it lies.

    `rank` holds it, `offset` is its first token's index in that rank's local tensor, `number` the
    segment's place among the rank's segments.
    """

    start: int
    stop: int
    rank: int
    offset: int
    number: int

    def clip(self, start: int, stop: int) -> Piece:
        """The part of this piece inside `[start, stop)`, its offset moved along."""
        low, high = max(self.start, start), min(self.stop, stop)
        return self._replace(start=low, stop=high, offset=self.offset + low - self.start)


def even_sizes(n: int, parts: int) -> list[int]:
    """Sizes of `parts` shares of `n`: the first `n mod parts` hold one more (as tensor_split)."""
    quotient, rest = divmod(n, parts)
    return [quotient + (part < rest) for part in range(parts)]


@dataclass(frozen=True)
class Layout:
    """Which segments of a sequence of `length` tokens each of `parts` ranks holds, in which order.

    Make one by `contiguous`, `zigzag`, `balanced` or `from_segments`. A rank may hold no segment at
    all; empty segments are dropped. Two layouts that hold the same segments in the same order are
    equal.

    Raises:
        LayoutError: the segments do not cover `[0, length)` exactly once.
    """

    length: int
    _held: tuple[tuple[tuple[int, int], ...], ...]

    def __post_init__(self) -> None:
        if not self._held:
            raise LayoutError("a layout needs at least one rank", "parts = 0", "pass parts >= 1")
        _check_cover(self.length, self._held)

    @classmethod
    def contiguous(cls, n: int, parts: int) -> Layout:
        """Rank r holds the r-th of `parts` even shares of `n` tokens."""
        cuts = _cuts(n, parts, pieces=parts)
        return cls(n, tuple(_filled([(cuts[r], cuts[r + 1])]) for r in range(parts)))

    @classmethod
    def zigzag(cls, n: int, parts: int) -> Layout:
        """Rank r holds the r-th and the (2 parts - 1 - r)-th of 2 parts even shares.

        Under a causal mask each rank then has about the same work.
        """
        cuts = _cuts(n, parts, pieces=2 * parts)
        runs = list(pairwise(cuts))
        return cls(n, tuple(_filled([runs[r], runs[2 * parts - 1 - r]]) for r in range(parts)))

    @classmethod
    def balanced(
        cls, documents: Any, parts: int, mask: Mask | None = None, *, slack: float = 0.02
    ) -> Layout:
        """Equal tokens and equal attention work for packed documents, in at most 2 parts - 1 runs.

        One causal document gives zigzag. Cuts lie between documents where `slack` allows it, since
        a document that one rank holds whole moves no keys.

        Args:
            documents: cu_seqlens of the row, as a list or integer tensor, or Documents.
            parts: sequence ranks.
            mask: what attention sees; None is `Mask()`, causal. Work is the visible pairs, windows
                of their heads added up.
            slack: how far a rank's tokens, and its work, may exceed their means, in exchange for
                fewer keys that travel. Single tokens may force more.

        Raises:
            LayoutError: parts below 1, or a slack that is negative or not finite.
            MaskError: a mask that is no Mask.
            DocumentsError: no cu_seqlens, or such as start elsewhere than at 0, or decrease.
        """
        packed = Documents.whole(documents)
        _cuts(packed.length, parts, pieces=parts)
        if not 0 <= slack < math.inf:
            raise LayoutError("slack must be finite and not negative", f"got {slack}")
        if mask is not None and not isinstance(mask, Mask):
            raise MaskError(
                "mask must be an xdist.Mask or None",
                f"got {type(mask).__name__}",
                "describe what is visible by xdist.Mask(causal=, window=, prefix=, chunk=)",
            )
        found = balanced_segments(packed, parts, mask or Mask(), slack)
        return cls(packed.length, tuple(tuple(runs) for runs in found))

    @classmethod
    def from_segments(cls, n: int, segments: Iterable[Iterable[Sequence[int]]]) -> Layout:
        """The given segments `[[(start, stop), ...] per rank]`, in the given order.

        A rank's segments may be out of position order, adjacent, or none.
        """
        try:
            length = index(n)
            held = tuple(
                tuple((index(start), index(stop)) for start, stop in rank) for rank in segments
            )
        except (TypeError, ValueError) as error:
            raise LayoutError(
                "segments must be pairs of integers (start, stop), one list per rank", str(error)
            ) from error
        for rank, runs in enumerate(held):
            for start, stop in runs:
                if not 0 <= start <= stop <= length:
                    raise LayoutError(
                        f"segment ({start}, {stop}) of rank {rank} does not lie in the sequence",
                        f"needed: 0 <= start <= stop <= {length}",
                    )
        return cls(length, tuple(_filled(runs) for runs in held))

    def mirrored(self) -> Layout:
        """The same segments in the same local order, seen from the end: position p is N - 1 - p."""
        n = self.length
        held = tuple(tuple((n - stop, n - start) for start, stop in runs) for runs in self._held)
        return Layout(n, held)

    @property
    def parts(self) -> int:
        """How many ranks share the sequence."""
        return len(self._held)

    def segments(self, rank: int) -> list[tuple[int, int]]:
        """The runs `(start, stop)` that `rank` holds, in the order of its local tensor."""
        return list(self._held[self._checked(rank)])

    def local_length(self, rank: int) -> int:
        """How many tokens `rank` holds."""
        return self.local_lengths[self._checked(rank)]

    @cached_property
    def local_lengths(self) -> tuple[int, ...]:
        """Tokens held by each rank."""
        return tuple(sum(stop - start for start, stop in runs) for runs in self._held)

    def positions(self, rank: int) -> NDArray[np.int64]:
        """Global position of each of `rank`'s tokens, int64 `[n]`."""
        runs = [np.arange(start, stop, dtype=np.int64) for start, stop in self.segments(rank)]
        return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Every segment of every rank, in position order."""
        found = []
        for rank, runs in enumerate(self._held):
            offset = 0
            for number, (start, stop) in enumerate(runs):
                found.append(Piece(start, stop, rank, offset, number))
                offset += stop - start
        return tuple(sorted(found))

    def pieces_of(self, rank: int) -> list[Piece]:
        """`rank`'s segments as pieces, in the order of its local tensor."""
        wanted = self._checked(rank)
        return sorted((p for p in self.pieces if p.rank == wanted), key=lambda p: p.number)

    def owners(self, start: int, stop: int) -> list[Piece]:
        """Who holds `[start, stop)`: clipped pieces in position order (outside positions: none)."""
        first = max(0, bisect_right(self._starts, start) - 1)
        found = []
        for piece in self.pieces[first:]:
            if piece.start >= stop:
                break
            clipped = piece.clip(start, stop)
            if clipped.start < clipped.stop:
                found.append(clipped)
        return found

    @cached_property
    def _starts(self) -> list[int]:
        return [piece.start for piece in self.pieces]

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.parts:
            raise LayoutError(f"rank {rank} is not in a layout of {self.parts} ranks")
        return rank


def _filled(runs: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple((start, stop) for start, stop in runs if stop > start)


def _cuts(n: int, parts: int, *, pieces: int) -> list[int]:
    try:
        n, parts = index(n), index(parts)
    except TypeError as error:
        raise LayoutError("length and parts must be integers", f"{n!r} and {parts!r}") from error
    if n < 0 or parts < 1:
        raise LayoutError("a layout needs length >= 0 and parts >= 1", f"{n} and {parts}")
    cuts = [0]
    for size in even_sizes(n, pieces):
        cuts.append(cuts[-1] + size)
    return cuts


def _check_cover(length: int, held: tuple[tuple[tuple[int, int], ...], ...]) -> None:
    covered = 0
    for start, stop, rank in sorted((a, b, r) for r, runs in enumerate(held) for a, b in runs):
        if start != covered:
            problem = f"positions [{covered}, {start}) are held by nobody"
            if start < covered:
                problem = f"position {start} of rank {rank} is held twice"
            raise LayoutError(
                f"the segments do not cover [0, {length}) exactly once",
                problem,
                "give every position to exactly one rank",
            )
        covered = stop
    if covered != length:
        raise LayoutError(
            f"the segments do not cover [0, {length}) exactly once",
            f"positions [{covered}, {length}) are held by nobody",
            "give every position to exactly one rank",
        )
