"""Strategy switch: tokens sharded becomes heads sharded, the recurrence runs whole, and back.

Sharded before and after: every input and the output along the sequence, in any layout; inside,
value heads are split as `tensor_split` and each rank holds the whole sequence of its own.
Moves: forward, one exchange of all inputs and one of the outputs; backward, one of the outputs'
    gradients and one of all the inputs'. A key head that several ranks need goes once to each of
    them, and its gradients come back in float32 or wider to be added. Final states, where asked
    for: one gather over heads, and the sum of their gradients back.
Saved for backward: the switched inputs and one state per tile of tokens.
Must divide: nothing. With fewer heads than ranks some ranks compute nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xdist.comm.first_order import first_order
from xdist.cost.recurrent import Shares, overlaps
from xdist.layout import Layout
from xdist.parallel.recurrence import Inputs
from xdist.parallel.recurrent_call import Call, Tensors, keep, restore, split
from xdist.parallel.recurrent_final import FinalStates
from xdist.parallel.recurrent_heads import HeadExchange
from xdist.parallel.recurrent_tiles import Share
from xdist.parallel.recurrent_work import Work
from xdist_kernels.autocast import in_given_dtypes


@dataclass(frozen=True)
class SwitchRequest:
    """Calls on one rank's share; the exchange knows the layout and the group."""

    calls: tuple[Call, ...]
    exchange: HeadExchange


@dataclass(frozen=True)
class _Split:
    """How the heads of one call are split: of outputs and states, of each input, and of which
    inputs tokens travel."""

    values: Shares
    inputs: tuple[Shares | None, ...]
    moved: tuple[int, ...]
    heads: tuple[int, ...]  # of the moved inputs
    total: int  # heads of the outputs

    @classmethod
    def of(cls, call: Call, inputs: Inputs, ranks: int) -> _Split:
        values, shares = call.op.shares(inputs, ranks)
        moved = tuple(i for i, x in enumerate(inputs) if x is not None and i not in call.op.whole)
        heads = tuple(x.shape[2] for i in moved if (x := inputs[i]) is not None)
        return cls(values, shares, moved, heads, call.op.state_shape(inputs)[1])

    def added(self) -> list[int]:
        """Moved inputs of which several ranks use a head: their gradients are added."""
        return [i for i in self.moved if (share := self.inputs[i]) is not None and overlaps(share)]

    def moved_shares(self) -> list[Shares]:
        return [share for i in self.moved if (share := self.inputs[i]) is not None]


def _whole_share(share: Share) -> Share:
    """The sequence as one rank's single segment."""
    return replace(share, layout=Layout.contiguous(share.documents.length, 1), rank=0)


def _to_heads(
    exchange: HeadExchange, splits: Sequence[_Split], given: Sequence[Inputs]
) -> list[tuple[Tensor | None, ...]]:
    """Every call's inputs of this rank's heads and all tokens, in one exchange."""
    tensors = [x for s, own in zip(splits, given, strict=True) for i in s.moved
               if (x := own[i]) is not None]  # fmt: skip
    shares = [share for s in splits for share in s.moved_shares()]
    arrived = iter(exchange.to_heads(tensors, shares))
    found = []
    for s, own in zip(splits, given, strict=True):
        inputs: list[Tensor | None] = []
        for index, (x, share) in enumerate(zip(own, s.inputs, strict=True)):
            if x is None or share is None:
                inputs.append(None)
            else:
                inputs.append(
                    next(arrived) if index in s.moved else x[slice(*share[exchange.rank])]
                )
        found.append(tuple(inputs))
    return found


class SwitchRecurrence(torch.autograd.Function):
    """(request, then starting, initial and inputs of each call) -> (out, final or None) of each.

    starting, initial and final [B,documents,H,K,V] with all heads; `starting` is `initial` or
    identities, and None where no final state is wanted.
    """

    @staticmethod
    @in_given_dtypes
    def forward(ctx: Any, request: SwitchRequest, *tensors: Any) -> tuple[Tensor | None, ...]:
        exchange = request.exchange
        given = split(request.calls, tensors)
        ctx.splits = [
            _Split.of(call, own.inputs, exchange.layout.parts)
            for call, own in zip(request.calls, given, strict=True)
        ]
        ctx.request = request
        switched = _to_heads(exchange, ctx.splits, [own.inputs for own in given])
        works, finals = [], []
        for call, s, own, inputs in zip(request.calls, ctx.splits, given, switched, strict=True):
            works.append(_run(call, inputs, _own_heads(own.initial, s, exchange)))
            finals.append(_final(call, s, own, works[-1], exchange))
        keep(ctx, works)
        outs = exchange.to_tokens(
            [work.out for work in works],
            [s.values for s in ctx.splits],
            [s.total for s in ctx.splits],
        )
        return tuple(x for pair in zip(outs, finals, strict=True) for x in pair)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        request: SwitchRequest = ctx.request
        exchange, splits = request.exchange, ctx.splits
        works = restore(ctx, request.calls, [_whole_share(c.share) for c in request.calls])
        douts = exchange.to_heads(list(grads[::2]), [s.values for s in splits])
        dinitials = [
            _back(call, s, work, dout, dfinal, exchange)
            for call, s, work, dout, dfinal in zip(
                request.calls, splits, works, douts, grads[1::2], strict=True
            )
        ]
        moved = [(s, i, work) for s, work in zip(splits, works, strict=True) for i in s.moved]
        # Those of heads that several ranks used are added, so they are wide.
        own = [work.grads[i] for _, i, work in moved]
        shares = [s.inputs[i] for s, i, _ in moved]
        heads = [count for s in splits for count in s.heads]
        arrived = iter(exchange.to_tokens(own, shares, heads))
        found: list[Tensor | None] = [None]
        for s, work, dinitial in zip(splits, works, dinitials, strict=True):
            found += [None, dinitial]
            for index, x in enumerate(work.inputs):
                if x is None:
                    found.append(None)
                elif index in s.moved:
                    found.append(next(arrived).to(x.dtype))
                else:
                    found.append(_own_part(work.grads[index], s, s.inputs[index], exchange, x))
        return tuple(found)


def _own_heads(states: Tensor | None, s: _Split, exchange: HeadExchange) -> Tensor | None:
    return None if states is None else states[:, :, slice(*s.values[exchange.rank])]


def _run(call: Call, inputs: Inputs, initial: Tensor | None) -> Work:
    work = Work(call.op, _whole_share(call.share), inputs, initial, want_final=call.want_final)
    work.start_forward()
    work.forward_alone()
    return work


def _final(
    call: Call, s: _Split, own: Tensors, work: Work, exchange: HeadExchange
) -> Tensor | None:
    if not call.want_final:
        return None
    starting = _own_heads(own.starting, s, exchange)
    assert starting is not None
    final = FinalStates(_whole_share(call.share), None).collect(work.finals, starting)
    return exchange.gather_states(final, s.values)


def _back(
    call: Call, s: _Split, work: Work, dout: Tensor, dfinal: Tensor | None, exchange: HeadExchange
) -> Tensor | None:
    """The work's backward; the gradient of the initial states, zero for other ranks' heads."""
    rest = None if work.initial is None else torch.zeros_like(work.initial)
    own = {}
    if call.want_final:
        assert dfinal is not None
        mine = exchange.scatter_states(dfinal, s.values)
        own = FinalStates(_whole_share(call.share), None).distribute(mine, rest)
    work.start_backward(dout, own, s.added())
    work.backward_alone()
    if rest is None or work.dinitial is None:
        return None
    full = rest.new_zeros(*rest.shape[:2], s.total, *rest.shape[3:])
    full[:, :, slice(*s.values[exchange.rank])] = rest + work.dinitial
    return full


def _own_part(
    grad: Tensor | None, s: _Split, share: Shares | None, exchange: HeadExchange, x: Tensor
) -> Tensor:
    """The gradient of an input held whole: this rank's part, zero for other ranks' heads."""
    assert grad is not None
    assert share is not None
    full = grad.new_zeros(max(stop for _, stop in share), *grad.shape[1:])
    full[slice(*share[exchange.rank])] = grad
    return full.to(x.dtype)
