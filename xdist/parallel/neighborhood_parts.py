"""One call of attention over sets of a grid: which queries need keys of other ranks, and how those
are fetched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor

from xdist.comm.collectives import ProcessGroup, rank_of
from xdist.comm.pending import Pending
from xdist.comm.window import start_windows, start_windows_adjoint
from xdist.layout import Layout
from xdist_kernels.neighborhood.rules import Rule, span
from xdist_kernels.neighborhood.tiles import Run, rows_of, runs_of
from xdist_kernels.neighborhood.torch import Gradients

Bounds = tuple[int, int]


class Stretch(NamedTuple):
    """Neighbouring queries of a share and the keys that they see, in positions of the sharded dim.

    share: where this rank's share starts. window: where its window of keys starts. here: whether
    all those keys lie in the share.
    """

    queries: Bounds
    keys: Bounds
    share: int
    window: int
    here: bool

    def runs(self, rules: Sequence[Rule], dim: int) -> tuple[tuple[Run, ...], ...]:
        """The tiles of these queries along `dim`, and of whole dims."""
        found = []
        for number, (rule, most) in enumerate(zip(rules, rows_of(rules), strict=True)):
            start, stop = self.queries if number == dim else (0, rule.size)
            found.append(runs_of(rule, start, stop, self.keys[0] if number == dim else 0, most))
        return tuple(found)


@lru_cache(maxsize=64)
def stretches_of(rule: Rule, share: Bounds, window: Bounds) -> tuple[Stretch, ...]:
    """The queries of a share: those inside, which see only its keys, and those at either end."""
    start, stop = share
    inner, outer = start, stop
    for position in range(start, stop):
        first, count = rule.keys(position)
        if first < start:
            inner = position + 1
        if first + (count - 1) * rule.step >= stop:
            outer = min(outer, position)
    cuts = [(start, inner), (inner, outer), (outer, stop)] if inner < outer else [(start, stop)]
    found = []
    for queries in cuts:
        if queries[0] < queries[1]:
            keys = span(rule, *queries)
            here = start <= keys[0] and keys[1] <= stop
            found.append(Stretch(queries, keys, start, window[0], here))
    return tuple(found)


class Fetch(NamedTuple):
    """The window of keys of every rank along the sharded dim."""

    layout: Layout
    group: ProcessGroup | None
    dim: int
    windows: tuple[Bounds, ...]

    def start(self, tensors: Sequence[Tensor]) -> Pending[list[Tensor]]:
        """This rank's window of each tensor."""
        return start_windows(
            tensors, self.layout, self.group, dim=self.dim + 1, windows=self.windows
        )

    def start_back(self, found: Gradients, k: Tensor, v: Tensor) -> Pending[list[Tensor]]:
        """Gradients of k and v from those of the windows."""
        return start_windows_adjoint(
            [found.dk, found.dv],
            [k, v],
            self.layout,
            self.group,
            dim=self.dim + 1,
            windows=self.windows,
        )


class Call(NamedTuple):
    """What forward and backward know of a call besides its tensors."""

    fetch: Fetch | None
    stretches: tuple[Stretch, ...]
    runs: tuple[tuple[tuple[Run, ...], ...], ...]
    scale: float
    form: ModuleType

    def numbers(self, *, here: bool) -> list[int]:
        """The stretches whose keys lie in the share, or the others."""
        return [at for at, one in enumerate(self.stretches) if one.here == here]

    def options(self, at: int) -> dict[str, Any]:
        """What the kernel is told of stretch `at`."""
        return {"runs": self.runs[at], "scale": self.scale}

    def queries(self, at: int, x: Tensor) -> Tensor:
        """Stretch `at` of a tensor of the share's queries."""
        one = self.stretches[at]
        return self._cut(x, one.queries, one.share)

    def keys(self, at: int, x: Tensor) -> Tensor:
        """The keys of stretch `at`, from the share where they lie there, else from the window."""
        one = self.stretches[at]
        return self._cut(x, one.keys, one.share if one.here else one.window)

    def window_keys(self, at: int, x: Tensor) -> Tensor:
        """The keys of stretch `at` from the window."""
        one = self.stretches[at]
        return self._cut(x, one.keys, one.window)

    def window_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of this rank's window of x."""
        shape = list(x.shape)
        if self.fetch is not None:
            start, stop = self.fetch.windows[rank_of(self.fetch.group)]
            shape[self.fetch.dim + 1] = stop - start
        return tuple(shape)

    def _cut(self, x: Tensor, bounds: Bounds, origin: int) -> Tensor:
        dim = 1 if self.fetch is None else self.fetch.dim + 1
        return x.narrow(dim, bounds[0] - origin, bounds[1] - bounds[0])
