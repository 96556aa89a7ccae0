"""Sweeps of layers over a rank's share, chunk by chunk: a cell is one chunk in some layers.

A forward sweep makes no graph and keeps the states before each chunk. A backward sweep goes from
the last chunk to the first: it computes a cell again from its input and states, with its graph,
and hands the gradient of the states on to the chunk before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from xdist.documents import Documents
from xdist.memory.carry import Carry
from xdist.memory.grid_chunks import Chunk, Segment

States = list[Tensor | None]
"""Of one layer, one a call; None where it is the state before a document, or no gradient."""
Seed = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(output of a cell, its local tokens) -> a result made of it, and the gradient of that result."""
Sink = Callable[[Tensor, slice], None]
"""(output of a cell, its local tokens)."""


class Sums:
    """Gradients of parameters, added up in float32 (float64 for float64)."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        unique = {id(p): p for p in parameters if p.requires_grad}
        self.parameters = list(unique.values())
        self._sums: dict[int, Tensor] = {}

    def add(self, grads: Iterable[Tensor | None]) -> None:
        """One gradient a parameter; None counts nothing."""
        for p, grad in zip(self.parameters, grads, strict=True):
            if grad is None:
                continue
            if id(p) not in self._sums:
                wide = torch.promote_types(p.dtype, torch.float32)
                self._sums[id(p)] = torch.zeros(p.shape, dtype=wide, device=p.device)
            self._sums[id(p)] += grad

    def of(self, p: Tensor, *, of_nothing: bool = False) -> Tensor | None:
        """The sum for one parameter in its dtype; where nothing came None, or zeros."""
        found = self._sums.get(id(p))
        if found is None:
            return torch.zeros_like(p) if of_nothing else None
        return found.to(p.dtype)


def owned(x: Tensor) -> Tensor:
    """x, copied where it would keep more memory alive than its own."""
    x = x.detach()
    return x.clone() if x.untyped_storage().nbytes() > x.nbytes else x


class Room:
    """One block for the states that a call leaves behind each of `chunks` chunks.

    Made one by one they would come to lie between the buffers of the cells, and the heap could
    neither use nor give back what is free between them: 4 layers of Mamba-2 over 8 Mi tokens held
    0.4 GiB of states and 8 GiB of such holes.
    """

    def __init__(self, chunks: int) -> None:
        self.chunks = chunks
        self._used = 0
        self._blocks: dict[tuple[int, int], Tensor] = {}

    def put(self, states: Sequence[States]) -> list[States]:
        """The states, one list a layer, copied to where they stay."""
        place, self._used = self._used, self._used + 1
        return [
            [None if s is None else self._copied(s, place, (layer, call)) for call, s in calls]
            for layer, calls in ((layer, enumerate(own)) for layer, own in enumerate(states))
        ]

    def _copied(self, state: Tensor, place: int, key: tuple[int, int]) -> Tensor:
        state = state.detach()
        if key not in self._blocks:
            self._blocks[key] = state.new_empty((self.chunks, *state.shape))
        block = self._blocks[key]
        if (block.shape[1:], block.dtype) != (state.shape, state.dtype):
            return owned(state)  # a convolution's, after a chunk shorter than its reach
        return block[place].copy_(state)


@dataclass
class Sweep:
    """One pass of `layers` over the segments; an empty list of layers hands x on."""

    layers: Sequence[nn.Module]
    segments: Sequence[Segment]
    documents: Documents
    # [segment][chunk][layer]: the states before each chunk.
    kept: list[list[list[States]]] = field(default_factory=list)

    def run(self, x: Tensor, chunk: Chunk, states: list[States]) -> tuple[Tensor, list[States]]:
        """Output of a cell and the states behind it, one list a layer."""
        after: list[States] = []
        for layer, own in zip(self.layers, states, strict=True):
            carry = Carry(chunk.start, chunk.stop, self.documents, x.device, own or None)
            x = layer(x, carry)
            after.append(list(carry.outgoing))
        return x, after

    def forward(self, x: Tensor, sink: Sink, entering: Sequence[list[States]]) -> None:
        """entering: for each segment the states before it, one list a layer ([]: none)."""
        self.kept = []
        for segment, states in zip(self.segments, entering, strict=True):
            kept = []
            room = Room(sum(not chunk.fresh for chunk in segment.chunks[1:]))
            for chunk, following in pairwise((*segment.chunks, None)):
                assert chunk is not None
                if chunk.fresh:
                    states = [[] for _ in self.layers]
                kept.append(states)
                y, found = self.run(x[:, chunk.at], chunk, states)
                sink(y, chunk.at)
                del y
                goes_on = following is not None and not following.fresh
                states = room.put(found) if goes_on else []
            self.kept.append(kept)

    def again(self, x: Tensor, sink: Sink) -> None:
        """The outputs once more, from the kept states."""
        for segment, kept in zip(self.segments, self.kept, strict=True):
            for chunk, states in zip(segment.chunks, kept, strict=True):
                sink(self.run(x[:, chunk.at], chunk, states)[0], chunk.at)

    def backward(
        self,
        x: Tensor,
        seed: Seed,
        dx: Tensor | None,
        leaving: Sequence[list[States]],
        sums: Sums,
    ) -> list[list[States]]:
        """Gradients of the states before each segment, from those behind it (`leaving`).

        dx: where the gradient of x goes, None if nobody wants it; it may be what `seed` reads.
        """
        starts = []
        for number, segment in enumerate(self.segments):
            dstates = leaving[number]
            for chunk, states in zip(
                reversed(segment.chunks), reversed(self.kept[number]), strict=True
            ):
                cell = self._cell(x[:, chunk.at], chunk, states, seed, dstates, x.requires_grad)
                own, dstates, grads = cell.gradients(sums.parameters)
                sums.add(grads)
                if dx is not None and own is not None:
                    dx[:, chunk.at] = own
            starts.append(dstates)
        return starts

    def adjoint(self, x: Tensor, seed: Seed, number: int, dstates: list[States]) -> list[States]:
        """Gradient of the state before segment `number` alone, over the chunks that it reaches."""
        segment = self.segments[number]
        if segment.reach < len(segment.chunks) or not segment.single:
            dstates = [[] for _ in self.layers]
        for place in reversed(range(segment.reach)):
            chunk = segment.chunks[place]
            states = self.kept[number][place]
            cell = self._cell(x[:, chunk.at], chunk, states, seed, dstates, False)
            _, dstates, _ = cell.gradients([])
        return dstates

    def _cell(
        self,
        x: Tensor,
        chunk: Chunk,
        states: list[States],
        seed: Seed,
        dstates: list[States],
        want_x: bool,
    ) -> _Cell:
        with torch.enable_grad():
            own = x.detach().requires_grad_(want_x)
            before = [
                [s if s is None else s.detach().requires_grad_() for s in layer] for layer in states
            ]
            y, after = self.run(own, chunk, before)
            results = [seed(y, chunk.at)]
        for made, wanted in zip(after, dstates, strict=True):
            # The gradients of the states behind are known for the calls that the next chunk made.
            pairs = zip(made, wanted or [None] * len(made), strict=True)
            results += [(s, d.to(s.dtype)) for s, d in pairs if s is not None and d is not None]
        return _Cell(own, before, [pair for pair in results if pair[0].requires_grad])


@dataclass
class _Cell:
    """A recomputed cell with its graph: results and their gradients."""

    x: Tensor
    states: list[States]
    results: list[tuple[Tensor, Tensor]]

    def gradients(
        self, parameters: Sequence[Tensor]
    ) -> tuple[Tensor | None, list[States], tuple[Tensor | None, ...]]:
        """Of x, of the states before, and of the parameters; None where nothing comes through."""
        held: list[Tensor] = [s for layer in self.states for s in layer if s is not None]
        wanted = [*([self.x] if self.x.requires_grad else []), *held, *parameters]
        found: tuple[Any, ...] = (None,) * len(wanted)
        if self.results and wanted:
            outputs, grads = zip(*self.results, strict=True)
            found = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
        rest = iter(found)
        dx = next(rest) if self.x.requires_grad else None
        dstates = [[None if s is None else next(rest) for s in layer] for layer in self.states]
        return dx, dstates, tuple(rest)
