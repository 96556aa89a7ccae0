"""Strategy switch: tokens sharded becomes heads sharded, the recurrence runs whole, and back.

Sharded before and after: every input and the output along the sequence, in any layout; inside,
value heads are split as `tensor_split` and each rank holds the whole sequence of its own.
Moves: forward, one exchange of all inputs and one of the output; backward, one of the output's
    gradient and one of all the inputs'. A key head that several ranks need goes once to each of
    them, and its gradients come back in float32 or wider to be added. Final states, where asked
    for: one gather over heads, and the sum of their gradients back.
Saved for backward: the switched inputs and one state per tile of tokens.
Must divide: nothing. With fewer heads than ranks some ranks compute nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xdist.cost.recurrent import overlaps
from xdist.documents import Documents
from xdist.layout import Layout
from xdist.parallel import recurrent_local as local_work
from xdist.parallel.recurrent_final import FinalStates
from xdist.parallel.recurrent_heads import HeadExchange
from xdist.parallel.recurrent_op import Local, RecurrentOp
from xdist.parallel.recurrent_segments import Segments
from xdist_kernels.linear import state_dtype


@dataclass(frozen=True)
class SwitchRequest:
    """One recurrence on one rank's share: everything about it that is no tensor."""

    op: RecurrentOp
    exchange: HeadExchange
    documents: Documents
    want_final: bool

    @property
    def plan(self) -> Segments:
        """The sequence as one rank's single segment."""
        return Segments(Layout.contiguous(self.documents.length, 1), self.documents, 0)

    @property
    def finals(self) -> FinalStates:
        return FinalStates(self.plan, None)


def _present(tensors: Local, shares: tuple) -> tuple[list[Tensor], list]:
    found = [(x, s) for x, s in zip(tensors, shares, strict=True) if x is not None]
    return [x for x, _ in found], [s for _, s in found]


def _with_gaps(found: list[Tensor], like: Local) -> tuple[Tensor | None, ...]:
    """`found` put back where `like` has tensors."""
    rest = iter(found)
    return tuple(None if x is None else next(rest) for x in like)


class SwitchRecurrence(torch.autograd.Function):
    """(request, starting, initial, *inputs) -> (out, final or None).

    starting, initial and final [B,documents,H,K,V] with all heads; `starting` is `initial` or
    zeros, and None where no final state is wanted.
    """

    @staticmethod
    def forward(
        ctx: Any,
        request: SwitchRequest,
        starting: Tensor | None,
        initial: Tensor | None,
        *inputs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        op, exchange, plan = request.op, request.exchange, request.plan
        ctx.values, ctx.shares = op.head_shares(inputs, exchange.layout.parts)
        ctx.request, ctx.heads = request, [None if x is None else x.shape[2] for x in inputs]
        whole = _with_gaps(exchange.to_heads(*_present(inputs, ctx.shares)), inputs)
        own_heads = slice(*ctx.values[exchange.rank])
        own = None if initial is None else initial[:, :, own_heads]
        parts = local_work.parts_of(plan, whole, own, request.want_final)
        local_work.forward_alone(op, parts)
        local_work.keep(ctx, parts, whole, own)
        final = None
        if request.want_final:
            assert starting is not None
            states = local_work.final_states(op, parts)
            final = request.finals.collect(states, starting[:, :, own_heads])
            final = exchange.gather_states(final, ctx.values)
        out = local_work.joined([part.out for part in parts], op.out_like(whole))
        (out,) = exchange.to_tokens([out], [ctx.values], [op.out_like(inputs).shape[2]])
        return out, final

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        request = ctx.request
        op, exchange = request.op, request.exchange
        parts, whole, own = local_work.restore(ctx, request.plan, request.want_final)
        (dout,) = exchange.to_heads([dout], [ctx.values])
        dinitial = None if own is None else torch.zeros_like(own)
        if request.want_final:
            assert dfinal is not None
            mine = exchange.scatter_states(dfinal, ctx.values)
            local_work.set_final_gradients(parts, request.finals.distribute(mine, dinitial))
        local_work.backward_alone(op, parts, dout)
        if dinitial is not None:
            local_work.initial_gradient(op, parts, dout, dinitial)
            # This rank's part: zero for the heads that other ranks have.
            counts = ctx.values[-1][1]
            full = dinitial.new_zeros(*dinitial.shape[:2], counts, *dinitial.shape[3:])
            full[:, :, slice(*ctx.values[exchange.rank])] = dinitial
            dinitial = full
        grads, shares = _present(local_work.input_gradients(parts, whole), ctx.shares)
        # Heads that several ranks used are added, so they travel wide.
        grads = [
            x.to(state_dtype(x)) if overlaps(s) else x for x, s in zip(grads, shares, strict=True)
        ]
        heads = [count for count in ctx.heads if count is not None]
        back = exchange.to_tokens(grads, shares, heads)
        back = [x.to(y.dtype) for x, y in zip(back, _present(whole, ctx.shares)[0], strict=True)]
        return None, None, dinitial, *_with_gaps(back, whole)
