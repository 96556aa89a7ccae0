"""Strategy scan: tokens stay where they are, and only states of fixed size cross ranks.

Sharded before and after: every input and the output along the sequence, in any layout.
Moves: forward, the summary (M, E) of each segment whose document goes on, or the state itself from
    segment to segment, as the algorithm says (comm/scan.py); backward, the same for dE, and no M.
    Several calls (the two directions of a bidirectional layer) share one exchange. Final states,
    where asked for: one copy to every rank, and the sum of their gradients back.
Saved for backward: the inputs, one state per tile of tokens, and the transitions.
Must divide: nothing. The bytes do not depend on the sequence's length.

The exchange is in flight while the work that needs no state from other ranks is done: documents
that start on this rank, and of the other tiles what an op's `ahead` and `backward_ahead` make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup
from xdist.comm.first_order import first_order
from xdist.comm.scan import Scan, start_adjoint_together, start_together
from xdist.parallel.recurrent_call import Call, keep, restore, split
from xdist.parallel.recurrent_final import FinalStates
from xdist.parallel.recurrent_work import Work
from xdist_kernels.autocast import in_given_dtypes


@dataclass(frozen=True)
class ScanRequest:
    """Calls on one rank's share; group None is one rank, which moves nothing."""

    calls: tuple[Call, ...]
    group: ProcessGroup | None
    algorithm: str


def _scan_of(request: ScanRequest, call: Call, work: Work) -> Scan:
    return Scan(
        call.share.scan_layout,
        request.group,
        transition=call.op.transition,
        cu_seqlens=call.share.scan_documents.cu_seqlens,
        algorithm=request.algorithm,
        rates=call.op.rates_of(work.inputs),
    )


def _forward(request: ScanRequest, works: Sequence[Work]) -> list[Scan]:
    """Run every tile from its true state; the scans serve the backward direction."""
    if request.group is None:
        for work in works:
            work.start_forward()
            work.forward_alone()
        return []
    scans = [_scan_of(request, *pair) for pair in zip(request.calls, works, strict=True)]
    forward_together(works, scans)
    return scans


def forward_together(works: Sequence[Work], scans: Sequence[Scan]) -> None:
    """Every tile of all works from its true state, the works' states in one exchange."""
    for work in works:
        work.start_forward()
    asked = []
    for scan, work in zip(scans, works, strict=True):
        found = [work.summary(segment) for segment in work.segments]
        transitions = [m for _, m in found if m is not None]
        asked.append((scan, [entry for entry, _ in found], transitions, work.identity))
    pending = start_together(asked)
    for work in works:
        work.ahead()
    for work, entering in zip(works, pending.wait(), strict=True):
        for segment, state in zip(work.segments, entering, strict=True):
            work.complete(segment, state)


def backward_together(works: Sequence[Work], scans: Sequence[Scan]) -> None:
    """Adjoint of `forward_together`; without scans, of each work alone on one rank."""
    if not scans:
        for work in works:
            work.backward_alone()
        return
    asked = []
    for scan, work in zip(scans, works, strict=True):
        grads = [work.adjoint_summary(segment) for segment in work.segments]
        asked.append((scan, grads, work.identity))
    pending = start_adjoint_together(asked)
    for work in works:
        work.ahead_back()
    for work, leaving in zip(works, pending.wait(), strict=True):
        for segment, dstate in zip(work.segments, leaving, strict=True):
            work.complete_back(segment, dstate)


class ScanRecurrence(torch.autograd.Function):
    """(request, then starting, initial and inputs of each call) -> (out, final or None) of each.

    starting, initial and final [B,documents,H,K,V]; `starting` is `initial` or identities, and
    None where no final state is wanted.
    """

    @staticmethod
    @in_given_dtypes
    def forward(ctx: Any, request: ScanRequest, *tensors: Any) -> tuple[Tensor | None, ...]:
        given = split(request.calls, tensors)
        works = [
            Work(c.op, c.share, x.inputs, x.initial, want_final=c.want_final)
            for c, x in zip(request.calls, given, strict=True)
        ]
        ctx.request, ctx.scans = request, _forward(request, works)
        keep(ctx, works)
        found: list[Tensor | None] = []
        for call, work, own in zip(request.calls, works, given, strict=True):
            final = None
            if call.want_final:
                assert own.starting is not None
                final = FinalStates(call.share, request.group).collect(work.finals, own.starting)
            found += [work.out, final]
        return tuple(found)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        request: ScanRequest = ctx.request
        works = restore(ctx, request.calls, [call.share for call in request.calls])
        rests = []
        for number, (call, work) in enumerate(zip(request.calls, works, strict=True)):
            dout, dfinal = grads[2 * number], grads[2 * number + 1]
            rest = None if work.initial is None else torch.zeros_like(work.initial)
            own = {}
            if call.want_final:
                own = FinalStates(call.share, request.group).distribute(dfinal, rest)
            work.start_backward(dout, own)
            rests.append(rest)
        backward_together(works, ctx.scans)
        found: list[Tensor | None] = [None]
        for work, rest in zip(works, rests, strict=True):
            dinitial = None if rest is None or work.dinitial is None else rest + work.dinitial
            found += [None, dinitial, *work.input_gradients()]
        return tuple(found)
