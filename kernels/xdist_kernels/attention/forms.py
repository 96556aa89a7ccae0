"""Which form of attention serves which heads and queries of a call, and why."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.attention import flash
from xdist_kernels.attention.band import Band, find_bands
from xdist_kernels.attention.blocks import Spans
from xdist_kernels.attention.checks import check_spans
from xdist_kernels.attention.pieces import Piece, cut_into_pieces
from xdist_kernels.errors import KernelError

FORMS = ("flash", "window", "blockwise")


@dataclass(frozen=True)
class Served:
    """Query heads `heads`, which share the key heads `groups` and one visibility, of queries
    `[start, stop)`, are served by `form`, because of `why`. `pieces` are flash's, `band` is the
    window's, `spans`, those of the queries, blockwise's."""

    form: str
    heads: slice
    groups: slice
    start: int
    stop: int
    why: str
    pieces: tuple[Piece, ...] = ()
    band: Band | None = None
    spans: Spans | None = None


class Parts(NamedTuple):
    """The parts of a call, and the positions of its keys where one of them reads them."""

    served: tuple[Served, ...]
    k_positions: Tensor | None


class Cut:
    """How calls that see alike are cut into parts, found out once for each kind of call.

    `tables` gives (spans, k_positions); what it gives is not kept but where a part is blockwise,
    which alone reads it: pieces and bands say in a few numbers what 40 bytes a token did. `known`
    is what calls share.
    """

    def __init__(
        self,
        tables: Callable[[], tuple[Spans, Tensor]],
        known: dict[Hashable, Parts] | None = None,
    ) -> None:
        self._tables = tables
        self._known = {} if known is None else known

    def parts(
        self, q: Tensor, k: Tensor, v: Tensor, softcap: float | None, drops: bool, form: str | None
    ) -> Parts:
        """As `forms_of`, of a call whose tensors are checked; KernelError where tables do not fit
        them."""
        refused = flash.refusal(q, k, v, softcap, drops)
        kind = (q.shape[1:3], k.shape[1:3], refused, softcap is None, drops, form)
        if kind not in self._known:
            # What is kept may outlive the inference mode of this call.
            with torch.inference_mode(False):
                spans, k_positions = self._tables()
                check_spans(q, k, spans, k_positions)
                served = tuple(forms_of(q, k, v, spans, k_positions, softcap, drops, form))
            read = any(part.spans is not None for part in served)
            self._known[kind] = Parts(served, k_positions if read else None)
        return self._known[kind]


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
            own = _own_spans(group_spans, start, stop) if name == "blockwise" else None
            yield Served(name, hs, gs, start, stop, why, pieces, band, own)


def _own_spans(spans: Spans, start: int, stop: int) -> Spans:
    """The spans of some queries, which do not keep those of the others alive."""
    if stop - start == len(spans[0]):
        return spans
    lo, hi, prefix_lo, prefix_hi = (s[start:stop].clone() for s in spans)
    return lo, hi, prefix_lo, prefix_hi


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
