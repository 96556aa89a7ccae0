"""Ring attention: keys and values visit the ranks that need them, one owner's block at a time.

1. Sharded before and after: the sequence.
2. Moves, per rank: forward receives e B G (D+E) a key of other ranks that its queries see; backward
   the same again, and returns w B G (D+E) a key in float32 (float64 for float64).
3. Saved for backward: q, k, v, out, lse of this rank; blocks are sent again, so that no rank ever
   holds more than two blocks of others.
4. Divides: H by G. Any shares, also empty ones.

Step t works on the block of rank r - t while that of r - t - 1 is on its way (Liu et al. 2023,
arXiv 2310.01889); partial results merge by log-sum-exp in float32 or float64.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from xdist.comm.first_order import first_order
from xdist.comm.pending import Pending
from xdist.parallel.attention_blocks import Block, Blocks
from xdist.parallel.attention_call import Call
from xdist.parallel.attention_runs import Run, merge_forward
from xdist.parallel.attention_runs import backward as runs_backward
from xdist.parallel.attention_runs import forward as runs_forward
from xdist_kernels.attention.torch import sinks_backward


class RingAttention(Function):
    """The strategy as one differentiable function of q, k, v `[B,n,H|G,D|E]` and sinks `[H]`."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> Tensor:
        ring = _all_ranks(call)
        out, lse = ring.forward(q, k, v, sinks)
        out = out.to(q.dtype)
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        delta = ctx.call.delta(out, dout)
        dq, dk, dv = _all_ranks(ctx.call).backward(q, k, v, lse, delta, dout)
        dsinks = None if sinks is None else sinks_backward(sinks, lse, delta).to(sinks.dtype)
        return None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks


class Ring:
    """The blocks of some places in turn: of the sequence ranks, or of the rows of strategy 2d.

    `runs` are this rank's query heads and what its queries see.
    """

    def __init__(self, call: Call, blocks: Blocks, runs: list[Run]) -> None:
        self.call, self.blocks, self.runs = call, blocks, runs
        me, places = blocks.me, len(blocks.ranks)
        # (to whom this place sends, whose block it receives) at each step
        self.steps = [((me + t) % places, (me - t) % places) for t in range(1, places)]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """out `[B,n,h,E]` and lse `[B,n,h]` over the keys of all places, float32 or float64."""
        call, blocks, runs = self.call, self.blocks, self.runs
        arriving = self._start(k, v, 0)
        out, lse = runs_forward(call, runs, q, k, v, self._own())
        for number, (_, owner) in enumerate(self.steps):
            got = arriving.wait()
            arriving = self._start(k, v, number + 1)
            if owner in got:
                merge_forward(call, runs, out, lse, q, *got[owner], blocks.positions(owner))
            del got
        if sinks is not None:
            call.merge_sinks_(out, lse, sinks)
        return out, lse

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dout: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq `[B,n,h,D]`, dk `[B,m,g,D]`, dv `[B,m,g,E]` of this place, float32 or float64."""
        call, blocks, runs = self.call, self.blocks, self.runs
        arriving = self._start(k, v, 0)
        dq, dk, dv = runs_backward(call, runs, q, k, v, lse, delta, dout, self._own())
        returning: Pending[dict[int, Block]] = Pending.done({})
        for number, (user, owner) in enumerate(self.steps):
            got = arriving.wait()
            arriving = self._start(k, v, number + 1)
            given: dict[int, Block] = {}
            if owner in got:
                at = blocks.positions(owner)
                dq_, *block = runs_backward(call, runs, q, *got[owner], lse, delta, dout, at)
                dq += dq_
                given[owner] = (block[0], block[1])
                # Names would keep this block alive while the next one is worked on.
                del block, dq_
            blocks.add(dk, dv, returning.wait())
            returning = blocks.start_gradients(given, [user], dk.dtype)
            del given, got
        blocks.add(dk, dv, returning.wait())
        return dq, dk, dv

    def _own(self) -> Tensor:
        return self.blocks.own_positions()

    def _start(self, k: Tensor, v: Tensor, number: int) -> Pending[dict[int, Block]]:
        if number == len(self.steps):
            return Pending.done({})
        user, owner = self.steps[number]
        return self.blocks.start_keys(k, v, [user], [owner])


def _all_ranks(call: Call) -> Ring:
    p = call.problem
    whole = Run(slice(0, p.heads), slice(0, p.groups), call.own_seen())
    return Ring(call, Blocks(call, p.needs, "ring", groups=p.groups), [whole])
