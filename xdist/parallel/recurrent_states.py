"""The states between segments: which summaries travel, and how they are folded.

Forward, each segment whose document goes on sends E to every other rank, with M where one document
passes through the whole segment; all ranks then fold the maps in position order. A document's
first segment starts the fold afresh, so nothing of M is needed there. Backward, each segment whose
document began earlier sends dE, and the fold runs from the last segment to the first with the M
that forward gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup, start_pairs
from xdist.comm.pending import Pending
from xdist.parallel.recurrent_local import Part
from xdist.parallel.recurrent_op import Local, RecurrentOp
from xdist.parallel.recurrent_segments import Segment, Segments
from xdist_kernels.linear import state_dtype


class _Place(NamedTuple):
    """One segment of any rank; `number` counts that rank's segments."""

    segment: Segment
    rank: int
    number: int

    @property
    def passes(self) -> bool:
        """Whether one document fills the segment and reaches beyond both ends."""
        return self.segment.single and self.segment.enters and self.segment.leaves


class StateExchange:
    """The two folds of one call, forward first. `local` lends shapes, dtype and device."""

    def __init__(self, op: RecurrentOp, plan: Segments, group: ProcessGroup, local: Local) -> None:
        self._op, self._plan, self._group = op, plan, group
        self._places = [
            _Place(segment, rank, number)
            for rank in range(plan.layout.parts)
            for number, segment in enumerate(Segments(plan.layout, plan.documents, rank).items)
        ]
        self._state, self._transition = op.state_shape(local), op.transition_shape(local)
        self._like = op.out_like(local).new_empty(0, dtype=state_dtype(op.out_like(local)))
        self._kept: dict[tuple[int, int], Tensor] = {}

    def _shapes(self, place: _Place, backward: bool) -> list[tuple[int, ...]]:
        """What a segment sends: nothing, its state, or its state and its transition."""
        segment = place.segment
        if not (segment.enters if backward else segment.leaves):
            return []
        if backward or not place.passes or self._transition is None:
            return [self._state]
        return [self._state, self._transition]

    def _gather(self, sent: list[Tensor], backward: bool) -> Pending[dict]:
        """Every rank's tensors, {(rank, number): [state, transition?]}, from this rank's own."""
        me, ranks = self._plan.rank, range(self._plan.layout.parts)
        own = torch.cat([self._like, *(x.reshape(-1) for x in sent)])
        sizes = dict.fromkeys(ranks, 0)
        for place in self._places:
            sizes[place.rank] += sum(prod(s) for s in self._shapes(place, backward))
        pending = start_pairs(
            {r: own for r in ranks if sizes[me]},
            {r: ((size,), own.dtype) for r, size in sizes.items() if size},
            self._group,
            move="scan",
            device=own.device,
        )

        def unpack(received: dict[int, Tensor]) -> dict[tuple[int, int], list[Tensor]]:
            found: dict[tuple[int, int], list[Tensor]] = {}
            offsets = dict.fromkeys(ranks, 0)
            for place in self._places:
                for shape in self._shapes(place, backward):
                    start = offsets[place.rank]
                    stop = offsets[place.rank] = start + prod(shape)
                    part = received[place.rank][start:stop].view(shape)
                    found.setdefault((place.rank, place.number), []).append(part)
            return found

        return pending.then(unpack)

    def start(self, parts: list[Part]) -> Pending[list[Tensor | None]]:
        """The state entering each of this rank's segments; None where a document starts there."""
        sent: list[Tensor] = []
        for part in parts:
            if part.segment.leaves:
                sent += self._summary(part)
        pending = self._gather(sent, backward=False)

        def fold(maps: dict[tuple[int, int], list[Tensor]]) -> list[Tensor | None]:
            entering: dict[int, Tensor | None] = {}
            state: Tensor | None = None
            for place in sorted(self._places, key=lambda p: p.segment.start):
                if place.rank == self._plan.rank:
                    entering[place.number] = state if place.segment.enters else None
                if not place.segment.leaves:
                    state = None
                    continue
                entry, *transition = maps[place.rank, place.number]
                if place.passes:
                    assert state is not None
                    if transition:
                        self._kept[place.rank, place.number] = transition[0].clone()
                    entry = entry + self._op.carry(transition[0] if transition else None, state)
                state = entry
            return [entering[number] for number in range(len(parts))]

        return pending.then(fold)

    def _summary(self, part: Part) -> Iterator[Tensor]:
        run = part.runs[-1]
        transition, entry = self._op.summary(part.tokens(run))
        if run.state is not None:
            entry = entry + self._op.carry(transition, run.state)
        yield entry
        if transition is not None and part.segment.single and part.segment.enters:
            yield transition

    def start_back(self, parts: list[Part], dout: Tensor) -> Pending[list[Tensor | None]]:
        """The gradient of the state leaving each of this rank's segments; None where none leaves.

        The runs' `dstate` hold the gradients of final states that are known here.
        """
        op = self._op
        sent: list[Tensor] = []
        for part in parts:
            if not part.segment.enters:
                continue
            run, own = part.runs[0], dout[:, part.segment.tokens]
            asked = op.adjoint_summary(part.tokens(run), own[:, run.at])
            if run.dstate is not None:
                asked = asked + op.carry_back(op.transition(part.tokens(run)), run.dstate)
            sent.append(asked)
        pending = self._gather(sent, backward=True)

        def fold(maps: dict[tuple[int, int], list[Tensor]]) -> list[Tensor | None]:
            leaving: dict[int, Tensor | None] = {}
            dstate: Tensor | None = None
            for place in sorted(self._places, key=lambda p: -p.segment.start):
                if place.rank == self._plan.rank:
                    leaving[place.number] = dstate if place.segment.leaves else None
                if not place.segment.enters:
                    dstate = None
                    continue
                (asked,) = maps[place.rank, place.number]
                if place.passes:
                    assert dstate is not None
                    kept = self._kept.get((place.rank, place.number))
                    asked = asked + op.carry_back(kept, dstate)
                dstate = asked
            return [leaving[number] for number in range(len(parts))]

        return pending.then(fold)
