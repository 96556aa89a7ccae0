"""Which runs of queries see rectangles of keys: what a fused kernel can serve without a mask.

A run of queries is cut where what a query sees changes otherwise than by one more key at its end.
Inside a run every query sees the same keys (pieces that are full), or query t sees t more keys
than the first: then the last keys form a square whose lower triangle, diagonal included, is seen.

    keys    0 1 2 3 4 5 6 7         queries 4..7 of a causal sequence: keys 0..3 are a full piece,
    query 4 x x x x x . . .         keys 4..7 a causal one. Documents, zigzag segments, prefixes
    query 5 x x x x x x . .         and chunks give more pieces of the same two kinds; windows
    query 6 x x x x x x x .         whose left edge moves give none.
    query 7 x x x x x x x x
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xdist_kernels.attention.blocks import Spans

# Fewer queries than this are not worth a call of their own.
MIN_ROWS = 16
# A run that sees its keys in more pieces than one in so many keys is not worth their merging.
MIN_KEYS = 128


@dataclass(frozen=True)
class Piece:
    """Keys `[start, stop)` of the local tensor: seen by the whole run, or causal on the diagonal
    (then as many as the run has queries)."""

    start: int
    stop: int
    causal: bool


@dataclass(frozen=True)
class QueryRun:
    """Queries `[start, stop)` of the local tensor and the pieces of keys they see; None where
    what they see is not made of such pieces."""

    start: int
    stop: int
    pieces: tuple[Piece, ...] | None


@dataclass(frozen=True)
class KeyRun:
    """Keys of consecutive positions `[first, last)` from local index `start`."""

    first: int
    last: int
    start: int


def cut_into_pieces(spans: Spans, k_positions: Tensor) -> list[QueryRun]:
    """The queries in runs, in order, none left out.

    `spans` four int64 `[n]`, `k_positions` int64 `[m]`, any device, keys in any order.
    """
    lo, hi, prefix_lo, prefix_hi = (s.cpu() for s in spans)
    keys = key_runs(k_positions.cpu())
    ends = sorted({x for run in keys for x in (run.first, run.last)})
    edges = torch.tensor(ends, dtype=torch.int64)
    starts = _run_starts(lo, hi, prefix_lo, prefix_hi, edges)
    stops = torch.cat([starts[1:], starts.new_tensor([len(lo)])])
    long = stops - starts >= MIN_ROWS
    runs: list[QueryRun] = []
    at = 0
    for start, stop in zip(starts[long].tolist(), stops[long].tolist(), strict=True):
        if at < start:
            runs.append(QueryRun(at, start, None))
        grows = bool(hi[start] != hi[stop - 1])
        own, prefix = (
            (int(lo[start]), int(hi[start])),
            (int(prefix_lo[start]), int(prefix_hi[start])),
        )
        pieces = _pieces(own, prefix, stop - start, grows, keys)
        runs.append(QueryRun(start, stop, _worthwhile(pieces)))
        at = stop
    if at < len(lo):
        runs.append(QueryRun(at, len(lo), None))
    return _joined(runs)


def _run_starts(
    lo: Tensor, hi: Tensor, prefix_lo: Tensor, prefix_hi: Tensor, edges: Tensor
) -> Tensor:
    """The first query of each run."""
    if len(lo) == 0:
        return lo.new_empty(0)
    grown = hi.diff()
    cut = (lo.diff() != 0) | (prefix_lo.diff() != 0) | (prefix_hi.diff() != 0)
    cut |= ((lo < hi).long().diff() != 0) | ((grown != 0) & (grown != 1))
    # The key a growing run gains must stay in one run of keys, or between the same two.
    cut |= torch.searchsorted(edges, hi - 1, right=True).diff() != 0
    turns = torch.zeros_like(cut)
    turns[1:] = (grown[1:] != grown[:-1]) & ~cut[:-1]
    starts = torch.nonzero(cut | turns).flatten() + 1
    return torch.cat([starts.new_zeros(1), starts])


def key_runs(positions: Tensor) -> list[KeyRun]:
    if len(positions) == 0:
        return []
    cuts = (torch.nonzero(positions.diff() != 1).flatten() + 1).tolist()
    starts = [0, *cuts]
    stops = [*cuts, len(positions)]
    firsts = positions[starts].tolist()
    return [KeyRun(p, p + b - a, a) for p, a, b in zip(firsts, starts, stops, strict=True)]


def _pieces(
    own: tuple[int, int], prefix: tuple[int, int], rows: int, grows: bool, keys: list[KeyRun]
) -> list[Piece]:
    """What a run of `rows` queries sees, from the two spans that its first query does."""
    lo, hi = own
    full = [prefix]
    causal = []
    if lo < hi:
        full.append((lo, hi - 1 if grows else hi))
        causal = [
            Piece(key.start + hi - 1 - key.first, key.start + hi - 1 - key.first + rows, True)
            for key in keys
            if grows and key.first <= hi - 1 < key.last
        ]
    found = sorted(
        (key.start + max(a, key.first) - key.first, key.start + min(b, key.last) - key.first)
        for a, b in full
        for key in keys
        if max(a, key.first) < min(b, key.last)
    )
    joined: list[tuple[int, int]] = []
    for start, stop in found:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return [Piece(start, stop, False) for start, stop in joined] + causal


def _worthwhile(pieces: list[Piece]) -> tuple[Piece, ...] | None:
    tokens = sum(piece.stop - piece.start for piece in pieces)
    return tuple(pieces) if len(pieces) <= 1 + tokens // MIN_KEYS else None


def _joined(runs: list[QueryRun]) -> list[QueryRun]:
    """Neighbouring runs without pieces as one."""
    found: list[QueryRun] = []
    for run in runs:
        if found and run.pieces is None and found[-1].pieces is None:
            found[-1] = QueryRun(found[-1].start, run.stop, None)
        else:
            found.append(run)
    return found
