"""Strategy scan: tokens stay where they are, and only states of fixed size cross ranks.

Sharded before and after: every input and the output along the sequence, in any layout.
Moves: forward, the summary (M, E) of each segment whose document goes on, to the ranks that hold
    later tokens of it, folded there; backward, dE of each segment whose document began earlier, to
    the ranks that hold earlier ones (M is kept from forward). Final states, where asked for: one
    copy to every rank, and the sum of their gradients back.
Saved for backward: the inputs, one state per tile of tokens, the state entering each segment and
    the transitions.
Must divide: nothing. The bytes do not depend on the sequence's length.

The exchange is in flight while the local work that needs no incoming state is computed: forward
the whole run from zero, backward the whole backward run with no gradient from later segments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup
from xdist.comm.scan import Scan, apply_transition
from xdist.parallel import recurrent_local as local_work
from xdist.parallel.recurrent_final import FinalStates
from xdist.parallel.recurrent_local import Part
from xdist.parallel.recurrent_op import Local, RecurrentOp, Summary
from xdist.parallel.recurrent_segments import Segments
from xdist_kernels.linear import state_dtype


@dataclass(frozen=True)
class ScanRequest:
    """One recurrence on one rank's share: everything about it that is no tensor."""

    op: RecurrentOp
    plan: Segments
    group: ProcessGroup | None
    want_final: bool

    @property
    def finals(self) -> FinalStates:
        return FinalStates(self.plan, self.group)


def _forward(request: ScanRequest, parts: list[Part], inputs: Local) -> Scan | None:
    """Run every part from its true state; what is returned serves the backward direction."""
    op, plan = request.op, request.plan
    if request.group is None:
        local_work.forward_alone(op, parts)
        return None
    scan = Scan(
        plan.layout,
        request.group,
        transition=op.transition,
        cu_seqlens=plan.documents.cu_seqlens,
    )
    like = _empty_state(op, inputs)
    summaries = [_summary(op, part, like) for part in parts]
    transitions = [s.transition for s in summaries if s.transition is not None]
    pending = scan.start([s.entry for s in summaries], transitions, like)
    for part in parts:
        local_work.run_part(op, part)
    for part, state in zip(parts, pending.wait(), strict=True):
        if part.segment.enters:
            part.runs[0].state = state
        local_work.complete(op, part)
    return scan


def _empty_state(op: RecurrentOp, inputs: Local) -> Tensor:
    like = op.out_like(inputs)
    return like.new_empty(op.state_shape(inputs), dtype=state_dtype(like))


def _summary(op: RecurrentOp, part: Part, like: Tensor) -> Summary:
    """What later segments need of this one: its last run, from that run's state if known."""
    run = part.runs[-1]
    if not part.segment.leaves:
        return Summary(op.transition_of(part.tokens(run)), torch.zeros_like(like))
    found = op.summary(part.tokens(run))
    if run.state is None:
        return found
    carried = apply_transition(op.transition, found.transition, run.state)
    return Summary(found.transition, found.entry + carried)


def _backward(
    request: ScanRequest, parts: list[Part], inputs: Local, dout: Tensor, scan: Scan | None
) -> None:
    """Fill every part's gradients; the runs' `dstate` hold the gradients of final states."""
    op = request.op
    if scan is None:
        local_work.backward_alone(op, parts, dout)
        return
    like = _empty_state(op, inputs)
    asked = [_asked(op, part, dout[:, part.segment.tokens], like) for part in parts]
    pending = scan.start_adjoint(asked, like)
    for part in parts:
        own = dout[:, part.segment.tokens]
        local_work.run_part_backward(op, part, own)
        for run in part.runs:
            local_work.through_start(op, part, run, own)
    for part, dstate in zip(parts, pending.wait(), strict=True):
        if part.segment.leaves:
            part.runs[-1].dstate = dstate
        for run in part.runs:
            local_work.through_end(op, part, run)


def _asked(op: RecurrentOp, part: Part, dout: Tensor, like: Tensor) -> Tensor:
    """Gradient of the entering state as far as this segment alone causes it."""
    if not part.segment.enters:
        return torch.zeros_like(like)
    run = part.runs[0]
    found = op.adjoint_summary(part.tokens(run), dout[:, run.at])
    if run.dstate is None:
        return found
    transition = op.transition_of(part.tokens(run))
    return found + apply_transition(op.transition, transition, run.dstate, transposed=True)


class ScanRecurrence(torch.autograd.Function):
    """(request, starting, initial, *inputs) -> (out, final or None).

    starting, initial and final [B,documents,H,K,V]; `starting` is `initial` or
    zeros, and None where no final state is wanted.
    """

    @staticmethod
    def forward(
        ctx: Any,
        request: ScanRequest,
        starting: Tensor | None,
        initial: Tensor | None,
        *inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        parts = local_work.parts_of(request.plan, inputs, initial, request.want_final)
        ctx.request, ctx.scan = request, _forward(request, parts, inputs)
        local_work.keep(ctx, parts, inputs, initial)
        final = None
        if request.want_final:
            assert starting is not None
            states = local_work.final_states(request.op, parts)
            final = request.finals.collect(states, starting)
        out = local_work.joined([part.out for part in parts], request.op.out_like(inputs))
        return out, final

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        request = ctx.request
        parts, inputs, initial = local_work.restore(ctx, request.plan, request.want_final)
        dinitial = None if initial is None else torch.zeros_like(initial)
        if request.want_final:
            assert dfinal is not None
            own = request.finals.distribute(dfinal, dinitial)
            local_work.set_final_gradients(parts, own)
        _backward(request, parts, inputs, dout, ctx.scan)
        if dinitial is not None:
            local_work.initial_gradient(request.op, parts, dout, dinitial)
        return None, None, dinitial, *local_work.input_gradients(parts, inputs)
