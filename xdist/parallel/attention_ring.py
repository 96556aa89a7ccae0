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

from xdist.comm.pending import Pending
from xdist.parallel.attention_blocks import Block, Blocks
from xdist.parallel.attention_call import Call
from xdist.parallel.first_order import first_order
from xdist_kernels.attention.torch import attention_delta, sinks_backward
from xdist_kernels.merge.torch import merge_, merge_sinks_


class RingAttention(Function):
    """The strategy as one differentiable function of q, k, v `[B,n,H|G,D|E]` and sinks `[H]`."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> Tensor:
        blocks = Blocks(call, call.problem.needs, "ring")
        seen, own = call.own_seen(), call.tensor(call.key_positions(call.rank))
        steps = _steps(call)
        arriving = _start_step(blocks, k, v, steps, 0)
        out, lse = call.forward(q, k, v, seen, own)
        for number, (_, owner) in enumerate(steps):
            got = arriving.wait()
            arriving = _start_step(blocks, k, v, steps, number + 1)
            if owner in got:
                merge_(out, lse, *call.forward(q, *got[owner], seen, blocks.positions(owner)))
            del got
        if sinks is not None:
            merge_sinks_(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.call, ctx.blocks = call, blocks
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        call, blocks = ctx.call, ctx.blocks
        q, k, v, out, lse, sinks = ctx.saved_tensors
        steps = _steps(call)
        arriving = _start_step(blocks, k, v, steps, 0)
        seen, own = call.own_seen(), call.tensor(call.key_positions(call.rank))
        delta = attention_delta(out, dout)
        dq, dk, dv = call.backward(q, k, v, lse, delta, dout, seen, own)
        returning: Pending[dict[int, Block]] = Pending.done({})
        for number, (user, owner) in enumerate(steps):
            got = arriving.wait()
            arriving = _start_step(blocks, k, v, steps, number + 1)
            given: dict[int, Block] = {}
            if owner in got:
                dq_, *block = call.backward(
                    q, *got[owner], lse, delta, dout, seen, blocks.positions(owner)
                )
                dq += dq_
                given[owner] = (block[0], block[1])
                # Names would keep this block alive while the next one is worked on.
                del block, dq_
            blocks.add(dk, dv, returning.wait())
            returning = blocks.start_gradients(given, [user], dk.dtype)
            del given, got
        blocks.add(dk, dv, returning.wait())
        dsinks = None if sinks is None else sinks_backward(sinks, lse, delta).to(sinks.dtype)
        return None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks


def _steps(call: Call) -> list[tuple[int, int]]:
    """(whom this rank sends to, whose block it receives) at each step."""
    parts = call.problem.parts
    return [((call.rank + t) % parts, (call.rank - t) % parts) for t in range(1, parts)]


def _start_step(
    blocks: Blocks, k: Tensor, v: Tensor, steps: list[tuple[int, int]], number: int
) -> Pending[dict[int, Block]]:
    if number == len(steps):
        return Pending.done({})
    user, owner = steps[number]
    return blocks.start_keys(k, v, [user], [owner])
