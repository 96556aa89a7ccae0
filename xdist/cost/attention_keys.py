"""Which keys each rank's queries see, and who holds them. Pure integers, no process group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdist.documents import Documents
from xdist.layout import Layout, even_sizes
from xdist.mask import Mask, Spans

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Problem:
    """One call of attention, as every rank knows it.

    `key_layout` is `layout` itself, another one, or None when every rank holds all keys. `cross`
    says that keys have positions of their own. `element_bytes` is that of q, k and v, `ulysses` the
    inner degree of strategy 2d: rank r is number r % ulysses of ring row r // ulysses.
    """

    layout: Layout
    documents: Documents
    mask: Mask
    key_layout: Layout | None
    key_documents: Documents
    cross: bool
    batch: int
    heads: int
    groups: int
    dim: int
    value_dim: int
    element_bytes: int
    ulysses: int = 1

    @property
    def parts(self) -> int:
        """How many ranks share the sequence."""
        return self.layout.parts

    @property
    def key_length(self) -> int:
        """How many keys there are over all ranks."""
        return self.key_documents.length

    @property
    def sum_bytes(self) -> int:
        """Bytes of an element that is added across ranks: float32, float64 for float64."""
        return max(4, self.element_bytes)

    @cached_property
    def kept(self) -> dict[Any, Any]:
        """What follows from this problem alone and every call with it needs again."""
        return {}

    @cached_property
    def needs(self) -> Needs:
        """Who needs which keys of whom (`needs_of`), computed once."""
        return needs_of(self)

    @cached_property
    def pairs(self) -> NDArray[np.int64]:
        """Visible pairs of query and key by rank that holds the query and query head, int64
        `[P, H]`, computed once."""
        counted = np.zeros((self.parts, self.heads), dtype=np.int64)
        for rank in range(self.parts):
            positions = self.layout.positions(rank)
            spans = head_spans(self, positions, 0, self.heads)
            counted[rank] = [int(seen.seen(0, self.key_length).sum()) for seen in spans]
        return counted

    @cached_property
    def rows(self) -> Rows:
        """The rows of ranks of strategy 2d, computed once."""
        return Rows(self)

    def key_lengths(self) -> tuple[int, ...]:
        """Keys each rank holds."""
        if self.key_layout is None:
            return (self.key_length,) * self.parts
        return self.key_layout.local_lengths

    def query_heads(self, rank: int, ways: int | None = None) -> tuple[int, int]:
        """Query heads `[start, stop)` of number `rank` when heads are split `ways` ways.

        As `torch.tensor_split`; None is a share for each sequence rank.
        """
        sizes = even_sizes(self.heads, self.parts if ways is None else ways)
        return sum(sizes[:rank]), sum(sizes[: rank + 1])

    def key_heads(self, rank: int, ways: int | None = None) -> tuple[int, int]:
        """Key heads `[start, stop)` that those query heads read; several ranks may share one."""
        start, stop = self.query_heads(rank, ways)
        if start == stop:
            return 0, 0
        per_group = self.heads // self.groups
        return start // per_group, (stop - 1) // per_group + 1


def spans_of(problem: Problem, positions: NDArray[np.int64], head: int = 0) -> Spans:
    """What the queries at global `positions` see, in global positions of the keys."""
    if not problem.cross:
        return problem.mask.spans(positions, problem.documents, head)
    document = problem.documents.index(positions)
    cuts = np.asarray(problem.key_documents.cu_seqlens, dtype=np.int64)
    first, last = cuts[document], cuts[document + 1]
    chunk = problem.mask.chunk
    if chunk is not None:
        # A chunk counts from the start of its own document on either side.
        first = first + (positions - problem.documents.starts(positions)) // chunk * chunk
        last = np.minimum(last, first + chunk)
    return Spans(first, last, first, first)


def head_spans(
    problem: Problem, positions: NDArray[np.int64], start: int, stop: int
) -> list[Spans]:
    """The spans of query heads `[start, stop)`: one entry when all of them see the same."""
    if stop == start:  # no heads: any head's spans will do, and `start` may be past the last
        return [spans_of(problem, positions, 0)]
    if len(problem.mask.for_heads(start, stop).head_groups(stop - start)) == 1:
        return [spans_of(problem, positions, start)]
    return [spans_of(problem, positions, head) for head in range(start, stop)]


def seen_keys(problem: Problem, rank: int) -> Ranges:
    """Runs of global key positions that any query of `rank`, of any head, sees: sorted, apart."""
    positions = problem.layout.positions(rank)
    lows, highs = [], []
    for spans in head_spans(problem, positions, 0, problem.heads):
        lows += [spans.lo, spans.prefix_lo]
        highs += [spans.hi, spans.prefix_hi]
    low, high = np.concatenate(lows), np.concatenate(highs)
    some = low < high
    low, high = low[some], high[some]
    if low.size == 0:
        return ()
    order = np.argsort(low, kind="stable")
    low, high = low[order], np.maximum.accumulate(high[order])
    # A run ends where the next interval starts beyond everything seen so far.
    ends = np.flatnonzero(np.append(low[1:] > high[:-1], True))
    starts = np.append(0, ends[:-1] + 1)
    return tuple(zip(low[starts].tolist(), high[ends].tolist(), strict=True))


@dataclass(frozen=True)
class Needs:
    """`ranges[user][owner]`: runs of `owner`'s local tensor that `user`'s queries see, in order."""

    ranges: tuple[tuple[Ranges, ...], ...]

    def tokens(self, user: int, owner: int) -> int:
        """How many keys `user` needs of `owner`."""
        return sum(stop - start for start, stop in self.ranges[user][owner])

    def received(self, user: int) -> int:
        """Keys that reach `user` from other ranks."""
        return sum(self.tokens(user, owner) for owner in range(len(self.ranges)) if owner != user)

    def sent(self, owner: int) -> int:
        """Keys that leave `owner`, counted once for each rank they go to."""
        return sum(self.tokens(user, owner) for user in range(len(self.ranges)) if user != owner)


def needs_of(problem: Problem) -> Needs:
    """Who needs which keys of whom; with keys held whole by every rank nobody needs any."""
    parts = problem.parts
    if problem.key_layout is None:
        return Needs(tuple(tuple(() for _ in range(parts)) for _ in range(parts)))
    ranges = []
    for user in range(parts):
        found: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
        for start, stop in seen_keys(problem, user):
            for piece in problem.key_layout.owners(start, stop):
                run = (piece.offset, piece.offset + piece.stop - piece.start)
                found[piece.rank].append(run)
        ranges.append(tuple(_joined(runs) for runs in found))
    return Needs(tuple(ranges))


def all_keys(problem: Problem) -> Needs:
    """Every rank needs every key."""
    lengths = problem.key_lengths()
    row = tuple(((0, n),) if n else () for n in lengths)
    if problem.key_layout is None:
        row = tuple(() for _ in lengths)
    return Needs(tuple(row for _ in lengths))


@dataclass(frozen=True)
class Rows:
    """How strategy 2d sees a call: rows of `inner` neighbouring sequence ranks.

    Inside a row the sequence is switched for the heads: column j then holds the row's tokens of the
    j-th share of the heads, and blocks of keys travel between the rows of one column.
    """

    problem: Problem

    @property
    def inner(self) -> int:
        """Ranks a row."""
        return self.problem.ulysses

    @property
    def count(self) -> int:
        """Rows."""
        return self.problem.parts // self.inner

    def place(self, rank: int) -> tuple[int, int]:
        """(row, column) of a sequence rank."""
        return divmod(rank, self.inner)

    def members(self, row: int) -> range:
        """The sequence ranks of one row."""
        return range(row * self.inner, (row + 1) * self.inner)

    @cached_property
    def layout(self) -> Layout:
        """What each row holds of the queries: its ranks' segments one after another."""
        return self._merged(self.problem.layout)

    @cached_property
    def key_layout(self) -> Layout | None:
        """What each row holds of the keys; None when every rank holds all."""
        keys = self.problem.key_layout
        return None if keys is None else self._merged(keys)

    @cached_property
    def needs(self) -> tuple[Needs, ...]:
        """By column, the keys that each row's queries of that column's heads see of each row."""
        p = self.problem
        found: list[Needs] = []
        for column in range(self.inner):
            start, stop = p.query_heads(column, self.inner)
            if start == stop:
                found.append(Needs(tuple(((),) * self.count for _ in range(self.count))))
            elif p.mask.heads is None and found:
                found.append(found[0])
            else:
                mask, keys = p.mask.for_heads(start, stop), self.key_layout
                own = replace(
                    p, layout=self.layout, key_layout=keys, mask=mask, heads=stop - start, ulysses=1
                )
                found.append(needs_of(own))
        return tuple(found)

    def _merged(self, layout: Layout) -> Layout:
        rows = range(self.count)
        held = [[run for r in self.members(row) for run in layout.segments(r)] for row in rows]
        return Layout.from_segments(layout.length, held)


def _joined(runs: list[tuple[int, int]]) -> Ranges:
    """Runs in the order of the local tensor, those that touch made one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(runs):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)
