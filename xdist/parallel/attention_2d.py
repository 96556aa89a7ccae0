"""Attention on two axes: ulysses among the ranks of a row, ring among the rows.

Sequence rank r is number r % u of row r // u, u the inner degree (`ulysses` of the mesh).
1. Sharded before and after: the sequence; between: the heads within a row, the sequence over rows.
2. Moves, per rank: those of ulysses among the u ranks of its row, then those of ring between the
   rows for its h query heads and the g key heads they read, whose blocks are u times as long.
3. Saved for backward: q, k, v, out, lse of this rank's heads over its row's tokens; blocks of other
   rows are sent again.
4. Divides: H by G. Any number of heads, any shares, also empty ones.

After Fang and Zhao 2024, arXiv 2405.07719 (unified sequence parallelism).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from xdist.comm.first_order import first_order
from xdist.parallel.attention_blocks import Blocks
from xdist.parallel.attention_call import Call
from xdist.parallel.attention_ring import Ring
from xdist.parallel.attention_switch import Switch
from xdist_kernels.attention.torch import sinks_backward


class TwoAxesAttention(Function):
    """The strategy as one differentiable function of q, k, v `[B,n,H|G,D|E]` and sinks `[H]`."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> Tensor:
        switch = _switch(call)
        (q_,), (k_,), (v_,) = switch.start_in(0, q, k, v).wait()
        own = None if sinks is None else sinks[_heads(switch)]
        out, lse = _ring(call, switch).forward(q_, k_, v_, own)
        out = out.to(q.dtype)
        ctx.call, ctx.like = call, (q.to("meta"), k.to("meta"), v.to("meta"))
        ctx.save_for_backward(q_, k_, v_, out, lse, sinks)
        if switch.alone:
            return out
        into = switch.new_output(q, v.shape[3])
        switch.start_out(0, [out], into).wait()
        return into[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        call, switch = ctx.call, _switch(ctx.call)
        q_, k_, v_, out, lse, sinks = ctx.saved_tensors
        (dout,) = switch.start_dout(0, dout).wait()
        delta = call.delta(out, dout)
        dq, dk, dv = _ring(call, switch).backward(q_, k_, v_, lse, delta, dout)
        dsinks = None
        if sinks is not None:
            dsinks, heads = torch.zeros_like(sinks), _heads(switch)
            dsinks[heads] = sinks_backward(sinks[heads], lse, delta).to(sinks.dtype)
        found: tuple[Tensor, ...] = (dq, dk, dv)
        if not switch.alone:
            into = switch.new_gradients(ctx.like, lse.dtype)
            switch.start_back(0, [[dq], [dk], [dv]], into, q_.dtype).wait()
            found = into.all()
        return None, *(x.to(q_.dtype) for x in found), dsinks


def _switch(call: Call) -> Switch:
    rows = call.problem.rows
    return Switch(call, rows.members(rows.place(call.rank)[0]))


def _heads(switch: Switch) -> slice:
    heads = switch.heads(0)
    return slice(heads.start, heads.stop)


def _ring(call: Call, switch: Switch) -> Ring:
    rows = call.problem.rows
    needs = rows.needs[switch.me]
    groups = len(switch.chunks[0].keys[switch.me])
    blocks = Blocks(call, needs, "ring", groups=groups, rows=rows)
    return Ring(call, blocks, switch.units(0)[0].runs)
