"""States of one layer between segments: what enters each before a sweep, and its adjoint.

    forward   halo of x (a convolution's state is made of the tokens before a segment) ->
              for each recurrence, in their order: sweep of summaries -> scan
    backward  for each recurrence, last first: sweep of adjoints -> adjoint scan; then, behind the
              backward sweep, the gradients of the halos go back

What enters is kept with the other states, so a recompute sends nothing. Work before a recurrence
in its layer is done once more in each sweep, work behind it only in the sweeps of later ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from xdist.comm.halo import Halo, start_halo, start_halo_adjoint
from xdist.comm.scan import Scan
from xdist.memory.carry import Call, Carry, call_layer
from xdist.memory.grid_cells import Seed, States, Sums, Sweep, owned
from xdist.memory.grid_chunks import Segment
from xdist.shard import SequenceShard


class Crossing:
    """The exchanges of `layer`, whose calls are `calls`, over the share of `shard`."""

    def __init__(
        self,
        layer: nn.Module,
        calls: Sequence[Call],
        shard: SequenceShard,
        segments: Sequence[Segment],
    ) -> None:
        self.layer, self.calls, self.shard, self.segments = layer, calls, shard, segments
        self.sweep = Sweep([layer], segments, shard.documents)
        self.reach = sum(call.reach for call in calls)
        self.last_convolution = max((i for i, c in enumerate(calls) if c.reach), default=-1)
        self.halos: list[Tensor] = []
        self.scans: dict[int, Scan] = {}

    # --- forward -------------------------------------------------------------------------------

    def enter(self, x: Tensor) -> list[list[States]]:
        """The states before each segment, [segment][layer]."""
        found: list[States] = [
            [None] * len(self.calls) if segment.enters else [] for segment in self.segments
        ]
        if self.reach:
            halos = self._halo(x)
            self.halos = [owned(part) for part in map(self._own, self.segments, halos)]
            for segment, halo, states in zip(self.segments, self.halos, found, strict=True):
                if states:
                    made = self._primed(segment, halo)
                    for index, state in enumerate(made):
                        states[index] = owned(state) if self.calls[index].reach else None
        for index, call in enumerate(self.calls):
            if call.journey is not None:
                for states, state in zip(found, self._scanned(x, index, found), strict=True):
                    if states:
                        states[index] = owned(state)
        return [[states] for states in found]

    def _halo(self, x: Tensor) -> list[Halo]:
        shard = self.shard
        return start_halo(x, shard.layout, shard.group, dim=1, before=self.reach).wait()

    def _own(self, segment: Segment, halo: Halo) -> Tensor:
        """The tokens of a halo that lie in the document of its segment's first token."""
        first = int(self.shard.documents.starts(segment.start))
        return halo.before[:, max(0, min(first, segment.start) - halo.before_start) :]

    def _primed(self, segment: Segment, halo: Tensor) -> list[Tensor]:
        """The states that the tokens before a segment leave in its convolutions."""
        start = segment.start - halo.shape[1]
        documents = self.shard.documents
        carry = Carry(start, segment.start, documents, halo.device, until=self.last_convolution)
        call_layer(self.layer, halo, carry)
        return carry.outgoing

    def _scanned(self, x: Tensor, index: int, entering: Sequence[States]) -> list[Tensor]:
        """The state of recurrence `index` before each segment."""
        call = self.calls[index]
        assert call.journey is not None
        journey = call.journey
        states, transitions = [], []
        for segment, before in zip(self.segments, entering, strict=True):
            state, through = self._summary(x, segment, index, before)
            states.append(journey.identity if state is None else state)
            if journey.through is not None:
                transitions.append(journey.through if through is None else through)
        scan = Scan(
            self.shard.layout,
            self.shard.group,
            transition=journey.transition,
            cu_seqlens=self.shard.documents.cu_seqlens,
            algorithm="auto",
            rates=journey.rates,
        )
        self.scans[index] = scan
        return scan.start(states, transitions, journey.identity).wait()

    def _summary(
        self, x: Tensor, segment: Segment, index: int, before: States
    ) -> tuple[Tensor | None, Tensor | None]:
        """The state behind a segment that is entered by `before`, and its transition."""
        journey = self.calls[index].journey
        if not segment.leaves or journey is None:
            return None, None
        through = journey.through if segment.enters and segment.single else None
        states: list[Tensor | None] = before if segment.single else []
        for chunk in segment.chunks[segment.origin :]:
            if chunk.fresh:
                states = []
            carry = Carry(
                chunk.start,
                chunk.stop,
                self.shard.documents,
                x.device,
                states or None,
                until=index,
                through=through,
            )
            call_layer(self.layer, x[:, chunk.at], carry)
            states, through = [owned(s) for s in carry.outgoing], carry.through
        return states[index], through

    # --- backward ------------------------------------------------------------------------------

    def leave(self, x: Tensor, seed: Seed) -> list[list[States]]:
        """Gradients of the states behind each segment, [segment][layer]."""
        found: list[States] = [
            [None] * len(self.calls) if segment.leaves else [] for segment in self.segments
        ]
        for index in reversed(self.scans):
            journey = self.calls[index].journey
            assert journey is not None
            asked = []
            for number, segment in enumerate(self.segments):
                state = None
                if segment.enters:
                    (own,) = self.sweep.adjoint(x, seed, number, [found[number]])
                    state = own[index]
                asked.append(torch.zeros_like(journey.identity) if state is None else state)
            leaving = self.scans[index].start_adjoint(asked, journey.identity).wait()
            for states, state in zip(found, leaving, strict=True):
                if states:
                    states[index] = state
        return [[states] for states in found]

    def return_halos(
        self, dstates: Sequence[list[States]], x: Tensor, dx: Tensor | None, sums: Sums
    ) -> None:
        """Adds what the halos' gradients are to parameters, and to dx of whoever owns the tokens.

        dstates: gradients of the states before each segment.
        """
        if not self.reach:
            return
        pairs = []
        for segment, halo, (own,) in zip(self.segments, self.halos, dstates, strict=True):
            wide = min(self.reach, segment.start)
            grad = x.new_zeros(x.shape[0], wide, *x.shape[2:])
            if own and halo.shape[1]:
                part = self._halo_gradient(segment, halo, own, x.requires_grad, sums)
                if part is not None:
                    grad[:, wide - halo.shape[1] :] = part
            pairs.append((grad, grad[:, :0]))
        if dx is None:
            return
        shard = self.shard
        same = dx.dtype == torch.promote_types(dx.dtype, torch.float32)
        found = start_halo_adjoint(
            pairs,
            dx,
            shard.layout,
            shard.group,
            dim=1,
            before=self.reach,
            into=dx if same else None,
        ).wait()
        if not same:
            dx += found

    def _halo_gradient(
        self, segment: Segment, halo: Tensor, dstates: States, want_x: bool, sums: Sums
    ) -> Tensor | None:
        with torch.enable_grad():
            leaf = halo.detach().requires_grad_(want_x)
            made = self._primed(segment, leaf)
        pairs = [
            (state, d)
            for state, d, call in zip(made, dstates, self.calls, strict=False)
            if call.reach and d is not None and state.requires_grad
        ]
        wanted = [*([leaf] if want_x else []), *sums.parameters]
        if not pairs or not wanted:
            return None
        outputs, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
        sums.add(found[1:] if want_x else found)
        return found[0] if want_x else None
