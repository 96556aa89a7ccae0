"""Which form of attention serves which heads and queries of a call, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from xdist_kernels.attention import flash
from xdist_kernels.attention.band import Band, find_bands
from xdist_kernels.attention.blocks import Spans
from xdist_kernels.attention.pieces import Piece, cut_into_pieces
from xdist_kernels.errors import KernelError

FORMS = ("flash", "window", "blockwise")


@dataclass(frozen=True)
class Served:
    """Query heads `heads`, which share the key heads `groups` and the visibility `spans` `[n]`, of
    queries `[start, stop)`, are served by `form`, because of `why`. `pieces` are flash's, `band`
    is the window's."""

    form: str
    heads: slice
    groups: slice
    spans: Spans
    start: int
    stop: int
    why: str
    pieces: tuple[Piece, ...] = ()
    band: Band | None = None


def forms_of(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, k_positions: Tensor,
    softcap: float | None, drops: bool, form: str | None,
) -> Iterator[Served]:  # fmt: skip
    """The parts of a call, each query of each head once. A `form` that is forced and cannot serve
    all of it raises KernelError."""
    if form is not None and form not in FORMS:
        raise KernelError(f"attention has no form {form!r}: it is one of {', '.join(FORMS)}")
    for hs, gs, group_spans in head_groups(q, k, spans):
        parts = _cut(q, k, v, group_spans, k_positions, softcap, drops, form)
        for name, start, stop, why, pieces, band in parts:
            if form is not None and name != form:
                raise KernelError(
                    f"attention was to be served by {form!r}, which cannot serve queries "
                    f"[{start}, {stop}) of heads [{hs.start}, {hs.stop})\n{why}\n"
                    "force 'blockwise', which serves everything, or none"
                )
            yield Served(name, hs, gs, group_spans, start, stop, why, pieces, band)


_Part = tuple[str, int, int, str, tuple[Piece, ...], Band | None]


def _cut(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, k_positions: Tensor,
    softcap: float | None, drops: bool, form: str | None,
) -> Iterator[_Part]:  # fmt: skip
    """One group of heads in runs of queries, in order."""
    n = q.shape[1]
    if form == "blockwise":
        yield "blockwise", 0, n, "it is forced", (), None
        return
    plain = _plain(softcap, drops)
    bands = find_bands(spans, k_positions) if plain is None and form != "flash" else []
    at = 0
    for band in bands:
        yield from _between(q, k, v, spans, k_positions, softcap, drops, at, band.start)
        yield "window", band.start, band.stop, "its keys are a narrow band", (), band
        at = band.stop
    yield from _between(q, k, v, spans, k_positions, softcap, drops, at, n)


def _between(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, k_positions: Tensor,
    softcap: float | None, drops: bool, start: int, stop: int,
) -> Iterator[_Part]:  # fmt: skip
    """Queries `[start, stop)`, no band among them."""
    if start == stop:
        return
    refused = flash.refusal(q, k, v, softcap, drops)
    if refused is not None:
        yield "blockwise", start, stop, refused, (), None
        return
    lo, hi, prefix_lo, prefix_hi = (s[start:stop] for s in spans)
    for run in cut_into_pieces((lo, hi, prefix_lo, prefix_hi), k_positions):
        a, b = start + run.start, start + run.stop
        if run.pieces is None:
            yield "blockwise", a, b, "what they see is no few pieces free of masks", (), None
        else:
            yield "flash", a, b, f"{len(run.pieces)} pieces of keys", run.pieces, None


def _plain(softcap: float | None, drops: bool) -> str | None:
    """Why the window path, which knows neither, cannot serve."""
    if softcap is not None:
        return "there is a softcap"
    return "there is dropout" if drops else None


def head_groups(q: Tensor, k: Tensor, spans: Spans) -> Iterator[tuple[slice, slice, Spans]]:
    """Runs of query heads, their key heads and their `[n]` spans: visibility is equal in a run."""
    heads, groups = q.shape[2], k.shape[2]
    if heads == 0:
        return
    if spans[0].dim() == 1:
        yield slice(0, heads), slice(0, groups), spans
        return
    per_group = heads // groups
    for g in range(groups):
        start = g * per_group
        while start < (g + 1) * per_group:
            stop = start + 1
            while stop < (g + 1) * per_group and all(torch.equal(s[start], s[stop]) for s in spans):
                stop += 1
            lo, hi, prefix_lo, prefix_hi = (s[start] for s in spans)
            yield slice(start, stop), slice(g, g + 1), (lo, hi, prefix_lo, prefix_hi)
            start = stop
