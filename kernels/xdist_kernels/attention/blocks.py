"""Which pairs of query and key blocks hold anything: the loop bounds of blockwise attention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

Spans = tuple[Tensor, Tensor, Tensor, Tensor]
_FAR = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class KeyBlock:
    """Keys `[start, stop)` of the local tensor, and whether every query of the block sees all."""

    start: int
    stop: int
    full: bool


@dataclass(frozen=True)
class QueryBlock:
    """Queries `[start, stop)` of the local tensor and the key blocks that any of them sees."""

    start: int
    stop: int
    keys: tuple[KeyBlock, ...]


def plan_blocks(
    spans: Spans, k_positions: Tensor, query_tokens: int, key_tokens: int
) -> Iterator[QueryBlock]:
    """Cuts queries and keys into blocks of at most the given sizes and pairs those that meet.

    `spans` four int64 `[n]`, `k_positions` int64 `[m]`. Blocks end where positions jump (another
    segment, another document), so that far-away runs do not blur what a block sees. A pair left
    out holds no visible key; a pair marked full needs no mask; the others may still be either.
    """
    lo, hi, prefix_lo, prefix_hi = (s.cpu() for s in spans)
    k_positions = k_positions.cpu()
    queries = _cut(len(lo), query_tokens, [lo, hi], 2 * key_tokens)
    keys = _cut(len(k_positions), key_tokens, [k_positions], key_tokens)
    first = _reduce(k_positions, keys, "amin").tolist()
    last = _reduce(k_positions, keys, "amax").tolist()
    own, prefix = lo < hi, prefix_lo < prefix_hi
    bounds = zip(
        queries,
        *(_reduce(x, queries, how).tolist() for x, how in ((lo, "amax"), (hi, "amin"))),
        *(
            _reduce(x, queries, how).tolist()
            for x, how in ((prefix_lo, "amax"), (prefix_hi, "amin"))
        ),
        _reduce(lo.where(own, _FAR), queries, "amin").tolist(),
        _reduce(hi.where(own, -_FAR), queries, "amax").tolist(),
        _reduce(prefix_lo.where(prefix, _FAR), queries, "amin").tolist(),
        _reduce(prefix_hi.where(prefix, -_FAR), queries, "amax").tolist(),
        strict=True,
    )
    for (start, stop), lo_in, hi_in, p_lo_in, p_hi_in, lo_out, hi_out, p_lo_out, p_hi_out in bounds:
        met = []
        for (k_start, k_stop), a, b in zip(keys, first, last, strict=True):
            if (lo_out <= b and a < hi_out) or (p_lo_out <= b and a < p_hi_out):
                full = (lo_in <= a and b < hi_in) or (p_lo_in <= a and b < p_hi_in)
                met.append(KeyBlock(k_start, k_stop, full))
        yield QueryBlock(start, stop, tuple(met))


def visible(spans: Spans, queries: slice, k_positions: Tensor) -> Tensor:
    """Bool `[queries, keys]`: which of the given keys each of the given queries sees."""
    lo, hi, prefix_lo, prefix_hi = (s[queries].unsqueeze(1) for s in spans)
    seen = (k_positions >= lo) & (k_positions < hi)
    if bool((prefix_lo < prefix_hi).any()):
        seen |= (k_positions >= prefix_lo) & (k_positions < prefix_hi)
    return seen


def _cut(tokens: int, most: int, values: list[Tensor], jump: int) -> list[tuple[int, int]]:
    """Runs of at most `most` tokens that also end where a value moves by more than `jump`."""
    if tokens == 0:
        return []
    cuts = {0, tokens}
    for value in values:
        moved = (value[1:] - value[:-1]).abs() > jump
        cuts.update((torch.nonzero(moved).flatten() + 1).tolist())
    ends = sorted(cuts)
    return [
        (start, min(start + most, stop))
        for begin, stop in pairwise(ends)
        for start in range(begin, stop, most)
    ]


def _reduce(values: Tensor, runs: list[tuple[int, int]], how: str) -> Tensor:
    """The least ("amin") or greatest ("amax") value of each run."""
    lengths = torch.tensor([stop - start for start, stop in runs], dtype=torch.int64)
    index = torch.repeat_interleave(torch.arange(len(runs)), lengths)
    result = values.new_zeros(len(runs))
    return result.scatter_reduce_(0, index, values, how, include_self=False)
