"""Strategy scan: tokens stay where they are, and only states of fixed size cross ranks.

Sharded before and after: every input and the output along the sequence, in any layout.
Moves: forward, the summary (M, E) of each segment whose document goes on, gathered by all and
    folded; backward, dE of each segment whose document began earlier (M is kept from forward).
    Final states, where asked for: one copy to every rank, and the sum of their gradients back.
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
from xdist.parallel import recurrent_local as local_work
from xdist.parallel.recurrent_final import FinalStates
from xdist.parallel.recurrent_local import Part
from xdist.parallel.recurrent_op import Local, RecurrentOp
from xdist.parallel.recurrent_segments import Segments
from xdist.parallel.recurrent_states import StateExchange


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


def _forward(request: ScanRequest, parts: list[Part], inputs: Local) -> StateExchange | None:
    """Run every part from its true state; what is returned serves the backward direction."""
    op = request.op
    if request.group is None:
        local_work.forward_alone(op, parts)
        return None
    exchange = StateExchange(op, request.plan, request.group, inputs)
    pending = exchange.start(parts)
    for part in parts:
        local_work.run_part(op, part)
    for part, state in zip(parts, pending.wait(), strict=True):
        if part.segment.enters:
            part.runs[0].state = state
        local_work.complete(op, part)
    return exchange


def _backward(
    request: ScanRequest, parts: list[Part], dout: Tensor, exchange: StateExchange | None
) -> None:
    """Fill every part's gradients; the runs' `dstate` hold the gradients of final states."""
    op = request.op
    if exchange is None:
        local_work.backward_alone(op, parts, dout)
        return
    pending = exchange.start_back(parts, dout)
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


class ScanRecurrence(torch.autograd.Function):
    """(request, starting, initial, *inputs) -> (out, final or None).

    starting, initial and final [B,documents,H,K,V]; `starting` is `initial` or zeros.
    """

    @staticmethod
    def forward(
        ctx: Any, request: ScanRequest, starting: Tensor, initial: Tensor | None, *inputs: Any
    ) -> tuple[Tensor, Tensor | None]:
        parts = local_work.parts_of(request.plan, inputs, initial, request.want_final)
        ctx.request, ctx.exchange = request, _forward(request, parts, inputs)
        local_work.keep(ctx, parts, inputs, initial)
        final = None
        if request.want_final:
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
        _backward(request, parts, dout, ctx.exchange)
        if dinitial is not None:
            local_work.initial_gradient(request.op, parts, dout, dinitial)
        return None, None, dinitial, *local_work.input_gradients(parts, inputs)
