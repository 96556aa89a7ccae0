"""Runs of queries whose keys are a band: the last key moves by one a query, the first follows.

Windows of one or two sides are such bands over each run of consecutive positions, whatever
documents cut out of them. They are served by the sliding-window path (window.py), which reads the
last key a query may see as the query's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from xdist_kernels.attention.blocks import Spans
from xdist_kernels.attention.pieces import KeyRun, key_runs
from xdist_kernels.attention.window import backward_into, factor_of, forward_into

# Fewer queries than one block of the window path are left to others.
MIN_ROWS = 64
# Wider bands lose to blocks with an online softmax: measured on Zen 4, one thread.
_WIDEST = 1024
# Queries whose copies in the dtype of sums live at once.
_TILE_TOKENS = 4096


@dataclass(frozen=True)
class Band:
    """Queries `[start, stop)`; query `start + i` sees the keys of local index
    `max(last + i - left, first[i]) .. last + i`; `first` None means no such limit."""

    start: int
    stop: int
    last: int
    left: int
    first: Tensor | None

    def tiles(self) -> Iterator[tuple[slice, slice, Tensor | None]]:
        """Queries, their keys, and the first visible of those keys, of a few tokens at a time."""
        for start in range(self.start, self.stop, _TILE_TOKENS):
            stop = min(self.stop, start + _TILE_TOKENS)
            last = self.last + start - self.start
            key = max(0, last - self.left)
            first = None
            if self.first is not None:
                first = self.first[start - self.start : stop - self.start] - key
                first = first if bool((first > 0).any()) else None
            yield slice(start, stop), slice(key, last + stop - start), first


def find_bands(spans: Spans, k_positions: Tensor) -> list[Band]:
    """The bands worth the window path, in order of queries, not overlapping."""
    lo, hi, prefix_lo, prefix_hi = (s.cpu() for s in spans)
    found: list[Band] = []
    if len(lo) < MIN_ROWS:
        return found
    keys = key_runs(k_positions.cpu())
    cut = (hi.diff() != 1) | ((lo < hi).long().diff() != 0)
    plain = bool((prefix_lo >= prefix_hi).all())
    inner = torch.nonzero(cut).flatten() + 1
    starts, stops = (
        torch.cat([inner.new_zeros(1), inner]),
        torch.cat([inner, inner.new_tensor([len(lo)])]),
    )
    long = (stops - starts >= MIN_ROWS) & (lo[starts] < hi[starts]) & plain
    for start, stop in zip(starts[long].tolist(), stops[long].tolist(), strict=True):
        for key in keys:
            # The queries of this run whose last key is one of these.
            a = max(start, start + key.first - int(hi[start]) + 1)
            b = min(stop, start + key.last - int(hi[start]) + 1)
            a = _after_other_keys(lo, a, b, key, keys)
            if b - a >= MIN_ROWS:
                band = _band(lo[a:b], hi[a:b], a, key.first, key.start)
                found += [band] if band is not None else []
    return sorted(found, key=lambda band: band.start)


def _after_other_keys(lo: Tensor, start: int, stop: int, own: KeyRun, keys: list[KeyRun]) -> int:
    """The first query of `[start, stop)` from which on all keys seen lie in the run `own`."""
    if stop <= start:
        return stop
    reach = max((key.last for key in keys if key.first < own.first), default=None)
    if reach is None:
        return start
    early = torch.nonzero(lo[start:stop] < reach).flatten()
    return start + int(early[-1]) + 1 if len(early) else start


def _band(lo: Tensor, hi: Tensor, start: int, position: int, index: int) -> Band | None:
    """The band of queries from `start`, where their keys' run begins; None where it is no gain."""
    moved = int((lo.diff() > 0).sum())
    lo = lo.clamp(min=position)
    widths = hi - 1 - lo
    left = int(widths.max())
    dense = 2 * int(widths.sum() + len(lo)) >= len(lo) * (left + 1)
    if left > _WIDEST or not dense or 4 * moved < len(lo):
        return None
    limits = lo + (index - position)
    first = limits if bool((widths < left).any()) else None
    last = int(hi[0]) - 1 - position + index
    return Band(start, start + len(lo), last, left, first)


def forward_band(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, band: Band, scale: float
) -> None:
    """Fills the band's rows of `out` `[B,n,H,E]` and `lse` `[B,n,H]`."""
    wide = out.dtype
    for rows, keys, first in band.tiles():
        q_, k_, v_ = (x.to(wide) for x in (q[:, rows], k[:, keys], v[:, keys]))
        factor, safe, _ = factor_of(q_, k_, scale)
        first = None if first is None else first.to(q.device)
        forward_into(q_, k_, v_, out[:, rows], lse[:, rows], band.left, factor, safe, first)


def backward_band(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dout: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, band: Band, scale: float,
) -> None:  # fmt: skip
    """Fills the band's rows of `dq` and adds to `dk` `[B,G,m,D]` and `dv` `[B,G,m,E]`."""
    wide = dq.dtype
    for rows, keys, first in band.tiles():
        q_, k_, v_ = (x.to(wide) for x in (q[:, rows], k[:, keys], v[:, keys]))
        factor, safe, _ = factor_of(q_, k_, scale)
        first = None if first is None else first.to(q.device)
        backward_into(
            q_, k_, v_, lse[:, rows], delta[:, rows], dout[:, rows].to(wide), dq[:, rows],
            dk[:, :, keys].transpose(1, 2), dv[:, :, keys].transpose(1, 2),
            band.left, factor, safe, first,
        )  # fmt: skip
