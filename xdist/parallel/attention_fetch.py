"""Gather and halo: keys and values of other ranks in one exchange, kept for backward.

1. Sharded before and after: the sequence.
2. Moves, per rank: forward receives e B G (D+E) a key: gather every key of the others, halo those
   its queries see. Backward returns w B G (D+E) a received key in float32 (float64 for float64).
3. Saved for backward: q, k, v, out, lse of this rank and the keys and values received.
4. Divides: H by G. Halo needs a mask of finite reach on both sides; it may be wider than a share.
   Any shares, also empty ones.

The keys this rank holds are worked on while the others travel, in both directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from xdist.comm.first_order import first_order
from xdist.cost.attention_keys import Needs, all_keys
from xdist.parallel.attention_blocks import Block, Blocks
from xdist.parallel.attention_call import Call, joined
from xdist_kernels.attention.torch import sinks_backward


class FetchAttention(Function):
    """Either strategy as one differentiable function of q, k, v and sinks; `move` names it."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, move: str, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> Tensor:
        blocks = Blocks(call, _needs(call, move), move, groups=k.shape[2])
        seen, own = call.own_seen(), blocks.own_positions()
        arriving = blocks.start_keys(k, v, call.others(), call.others())
        out, lse = call.forward(q, k, v, seen, own)
        got = arriving.wait()
        far = _joined(got) if got else (k[:, :0], v[:, :0])
        ctx.owners = [(owner, got[owner][0].shape[1]) for owner in sorted(got)]
        # Names would keep the blocks as they came beside the joined ones.
        del arriving, got
        if ctx.owners:
            call.forward(q, *far, seen, _positions(blocks, ctx.owners), into=(out, lse))
        if sinks is not None:
            call.merge_sinks_(out, lse, sinks)
        out = out.to(q.dtype)
        ctx.call, ctx.blocks = call, blocks
        ctx.save_for_backward(q, k, v, out, lse, sinks, *far)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        call, blocks = ctx.call, ctx.blocks
        q, k, v, out, lse, sinks, *far = ctx.saved_tensors
        # What is kept is freed when it has been used (not with retain_graph).
        ctx.maybe_clear_saved_tensors()
        seen, own = call.own_seen(), blocks.own_positions()
        delta = call.delta(out, dout)
        del out
        given: dict[int, Block] = {}
        far_dq = None
        if ctx.owners:
            at = _positions(blocks, ctx.owners)
            far_dq, *sums = call.backward(q, *far, lse, delta, dout, seen, at)
            given = _by_owner(sums, ctx.owners)
            del sums
        del far
        returning = blocks.start_gradients(given, call.others(), lse.dtype)
        given.clear()  # they are packed
        dq, dk, dv = call.backward(q, k, v, lse, delta, dout, seen, own)
        if far_dq is not None:
            dq += far_dq
        blocks.add(dk, dv, returning.wait())
        dsinks = None if sinks is None else sinks_backward(sinks, lse, delta).to(sinks.dtype)
        return None, None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks


def _needs(call: Call, move: str) -> Needs:
    return call.problem.needs if move == "halo" else all_keys(call.problem)


def _joined(got: dict[int, Block]) -> Block:
    """Blocks in rank order as one."""
    owners = sorted(got)
    keys, values = zip(*(got[owner] for owner in owners), strict=True)
    return joined(keys, 1), joined(values, 1)


def _by_owner(sums: list[Tensor], owners: list[tuple[int, int]]) -> dict[int, Block]:
    """Gradients of the joined blocks, each block's for its owner."""
    dks, dvs = (x.split([tokens for _, tokens in owners], 1) for x in sums)
    return {owner: (dks[i], dvs[i]) for i, (owner, _) in enumerate(owners)}


def _positions(blocks: Blocks, owners: list[tuple[int, int]]) -> Tensor:
    return blocks.call.once(
        (blocks.move, "far"), lambda: torch.cat([blocks.positions(owner) for owner, _ in owners])
    )
