"""Shares of one row with equal tokens and equal attention work, in few segments. Pure integers.

The row is closed to a circle. Somewhere on it lies an arc of 1/P of the tokens with 1/P of the
work, since such arcs have the mean work on average and their work changes by little from one start
to the next. That arc is one rank's share; it is taken out, the circle closed again, and the rest
shared among P - 1 ranks (necklace splitting by two measures, Goldberg and West 1985). Each arc
makes two cuts at most, so a layout has at most 2 P - 1 segments; one causal document gives zigzag.

Of the arcs near enough to the mean the one is taken whose ends cost least: a cut between two
documents moves no key.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xdist.documents import Documents
from xdist.mask import Mask

# What a key that has to travel costs, in visible pairs of query and key: 512 FLOPs a byte
# (cost/attention_choice.py), 16 D bytes a key sent and received in bf16 forward and backward,
# 14 D FLOPs a pair and query head, four query heads a key head; rounded to a power of two.
PAIRS_PER_KEY = 128

Ints = NDArray[np.int64]


class _Row(NamedTuple):
    """Per token, int64 `[N]`: the keys it sees, over all heads of the mask; the keys that travel
    when the row is cut just before it."""

    work: Ints
    cut: Ints


class _Bounds(NamedTuple):
    """What one share may hold: tokens and work from least to most, and the exact shares."""

    tokens: tuple[int, int]
    work: tuple[int, int]
    mean_tokens: float
    mean_work: float


class _Arcs(NamedTuple):
    """Arcs `[start, stop)` of the doubled circle, int64 `[m]` each."""

    start: Ints
    stop: Ints


def balanced_segments(
    documents: Documents, parts: int, mask: Mask, slack: float
) -> list[list[tuple[int, int]]]:
    """Segments of each of `parts` ranks (at least 1), ranks by their first position.

    No rank holds more than 1 + `slack` times the mean of tokens, or of visible pairs, beyond what
    single tokens force.
    """
    row = _measured(documents, mask)
    left = np.arange(documents.length, dtype=np.int64)
    most = (1 + slack) * documents.length / parts, (1 + slack) * int(row.work.sum()) / parts
    shares = []
    for ranks in range(parts, 0, -1):
        taken = np.ones(left.size, dtype=np.bool_)
        if ranks > 1 and left.size:
            taken = _share(row, left, ranks, most)
        shares.append(_runs(left[taken]))
        left = left[~taken]
    return sorted(shares, key=lambda runs: runs[0] if runs else (documents.length, 0))


def _measured(documents: Documents, mask: Mask) -> _Row:
    n = documents.length
    positions = np.arange(n, dtype=np.int64)
    work, cut = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)
    for start, stop in mask.head_groups(mask.heads or 1):
        spans = mask.spans(positions, documents, start)
        work += (stop - start) * spans.seen(0, n)
        # Keys before a cut that queries after it see, and keys after it that queries before see.
        first = np.minimum.accumulate(np.minimum(spans.lo, positions)[::-1])[::-1]
        last = np.maximum.accumulate(np.maximum(spans.hi, positions))
        before = positions - first + (spans.prefix_hi - spans.prefix_lo)
        after = np.append(0, last[:-1])[:n] - positions
        cut = np.maximum(cut, before + np.maximum(after, 0))
    return _Row(work, cut)


def _share(row: _Row, left: Ints, ranks: int, most: tuple[float, float]) -> NDArray[np.bool_]:
    """Which of the tokens `left` one of `ranks` ranks takes, bool `[left]`."""
    size = left.size
    sums = np.append(0, np.cumsum(np.tile(row.work[left], 2)))
    # Where the circle is cut already, another cut costs nothing.
    fresh = np.append(False, left[1:] == left[:-1] + 1)
    cut = np.tile(np.where(fresh, row.cut[left], 0), 2)
    whole = int(sums[size])
    bounds = _Bounds(
        _between(size, ranks, most[0]), _between(whole, ranks, most[1]), size / ranks, whole / ranks
    )
    arcs, cost = _within(_candidates(sums, cut, bounds), sums, bounds)
    cost = cost + PAIRS_PER_KEY * (cut[arcs.start] + cut[arcs.stop])
    # Of arcs that cost the same, the one that makes the fewest new cuts, then the first.
    cheapest = np.flatnonzero(cost == cost.min())
    new = np.tile(fresh, 2).astype(np.int64)
    cuts = new[arcs.start[cheapest]] + new[arcs.stop[cheapest]]
    best = cheapest[np.lexsort((arcs.start[cheapest], cuts))[0]]
    taken = np.zeros(size, dtype=np.bool_)
    taken[np.arange(arcs.start[best], arcs.stop[best]) % size] = True
    return taken


def _between(whole: int, ranks: int, most: float) -> tuple[int, int]:
    """The least one rank may take so that the others fit, and the most."""
    share = max(int(most), -(-whole // ranks))
    return max(0, whole - (ranks - 1) * share), share


def _candidates(sums: Ints, cut: Ints, bounds: _Bounds) -> _Arcs:
    """Arcs with the mean of tokens from every start, and those with an end that costs nothing."""
    size = cut.size // 2
    every = np.arange(size, dtype=np.int64)
    shares = {int(bounds.mean_tokens), -int(-bounds.mean_tokens // 1)}
    starts, stops = [every] * len(shares), [every + share for share in sorted(shares)]
    free = np.flatnonzero(cut == 0)
    forth = free[free < size]
    for stop in _ends(forth, sums, free, bounds):
        starts.append(forth)
        stops.append(stop)
    # The same from the other side: the circle read backwards.
    back = 2 * size - free[free >= size]
    mirrored = sums[-1] - sums[::-1]
    for stop in _ends(back, mirrored, np.sort(2 * size - free), bounds):
        starts.append(2 * size - stop)
        stops.append(2 * size - back)
    start, stop = np.concatenate(starts), np.concatenate(stops)
    wrapped = start - start % size
    return _Arcs(start - wrapped, stop - wrapped)


def _ends(start: Ints, sums: Ints, free: Ints, bounds: _Bounds) -> list[Ints]:
    """Ends for arcs from each `start`: the free places about the mean, and some within bounds."""
    (few, many), (little, much) = bounds.tokens, bounds.work
    low = np.maximum(start + few, np.searchsorted(sums, sums[start] + little, side="left"))
    high = np.minimum(start + many, np.searchsorted(sums, sums[start] + much, side="right") - 1)
    low, high = np.minimum(low, sums.size - 2), np.clip(high, 0, sums.size - 2)
    ends = [low + (high - low) * part // 4 for part in range(5)]
    for near in (low, (low + high) // 2, high):
        place = np.searchsorted(free, near)
        ends += [free[np.clip(place + step, 0, free.size - 1)] for step in (-1, 0)]
    return [np.clip(end, start, start + (sums.size - 1) // 2) for end in ends]


def _within(arcs: _Arcs, sums: Ints, bounds: _Bounds) -> tuple[_Arcs, NDArray[np.float64]]:
    """The arcs within the bounds, and how far from the means each is, in pairs; the arc nearest to
    the means where single tokens are too coarse for the bounds."""
    work, tokens = sums[arcs.stop] - sums[arcs.start], arcs.stop - arcs.start
    away = np.abs(work - bounds.mean_work)
    away += np.abs(tokens - bounds.mean_tokens) * (bounds.mean_work / bounds.mean_tokens)
    good = (tokens >= bounds.tokens[0]) & (tokens <= bounds.tokens[1])
    good &= (work >= bounds.work[0]) & (work <= bounds.work[1])
    if not good.any():
        good[away.argmin()] = True
    return _Arcs(arcs.start[good], arcs.stop[good]), away[good]


def _runs(positions: Ints) -> list[tuple[int, int]]:
    """Ascending positions as runs `[start, stop)`."""
    if not positions.size:
        return []
    breaks = np.flatnonzero(np.diff(positions) != 1)
    first = positions[np.append(0, breaks + 1)]
    last = positions[np.append(breaks, positions.size - 1)]
    return list(zip(first.tolist(), (last + 1).tolist(), strict=True))
