"""Ulysses attention: the sequence is switched for the heads, and attention runs whole.

1. Sharded before: the sequence; inside: the query heads, split as `torch.tensor_split`, with each
   rank's key heads; after: the sequence.
2. Moves, per rank, with h query heads reading g distinct key heads: forward receives
   e B ((N-n) h D + (M-m) g (D+E)) in one message a rank and e B n (H-h) E back; backward
   e B ((N-n) h E + n (H-h) D) and the gradients of its own keys from every rank that used them, in
   float32 (float64) for key heads that several ranks share, else in their own dtype.
3. Saved for backward: q, k, v, out, lse of this rank's heads over the whole sequence; nothing is
   sent twice.
4. Divides: H by G. Any number of heads, also fewer than ranks; any shares, also empty ones.

Long rows on a CPU are computed a few heads at a time, each such unit from tensors of its own: in
backward what is kept of a unit is freed before the gradients of the next are made.
With `chunks` each rank's heads are switched and computed in that many runs: while one is computed
the outputs of the last are on their way back, and the next is on its way in where what is kept for
backward outgrows it (without a backward it would be the peak), but not in a checkpoint, whose
forward and recompute make their exchanges in one order. The bytes do not change.

After Jacobs et al. 2023, arXiv 2309.14509; a key head is sent once to each rank that needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from xdist.comm.first_order import first_order
from xdist.comm.keep import on_tape
from xdist.comm.pending import Pending
from xdist.parallel.attention_call import Call
from xdist.parallel.attention_runs import backward as runs_backward
from xdist.parallel.attention_runs import forward as runs_forward
from xdist.parallel.attention_switch import Switch, Unit
from xdist_kernels.attention.torch import sinks_backward

Pair = tuple[Tensor, Tensor]  # of keys and values
_KEPT = 5  # tensors a unit keeps for backward: q, k, v, out, lse


def ulysses(
    call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, chunks: int
) -> Tensor:
    """The strategy for q, k, v `[B,n,H|G,D|E]` and sinks `[H]`, in `chunks` runs of heads."""
    leaves = (q, k, v) if sinks is None else (q, k, v, sinks)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in leaves)
    out: Tensor = UlyssesAttention.apply(call, chunks, keep, q, k, v, sinks)
    return out


class UlyssesAttention(Function):
    """The strategy as one differentiable function; `keep` says whether a backward will come."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, chunks: int, keep: bool,
        q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        switch = Switch(call, range(call.problem.parts), chunks, by_units=True)
        at = switch.keys_at()
        ahead = keep and not on_tape()
        into = switch.new_output(q, v.shape[3])
        nothing: Pending[Any] = Pending.done(None)
        arriving = switch.start_in(0, q, k, v)
        leaving: Pending[None] = nothing
        kept: list[Tensor] = []
        carried: Pair | None = None
        for chunk in range(chunks):
            qs, ks, vs = arriving.wait()
            arriving = nothing  # it would hold what it gave
            ks[0], vs[0] = _with_carried(carried, (ks[0], vs[0]))
            carried = _carried(switch, chunk, (ks[0], vs[0]))
            if ahead and chunk + 1 < chunks:
                arriving = switch.start_in(chunk + 1, q, k, v)
            outs = []
            for unit in switch.units(chunk):
                q_, k_, v_ = qs.pop(0), ks[0], vs[0]
                if unit.last:
                    del ks[0], vs[0]
                own = None if sinks is None else sinks[_heads(switch, chunk, unit)]
                out, lse = runs_forward(call, unit.runs, q_, k_, v_, at, own, rounded=True)
                out = out.to(q.dtype)
                if keep:
                    kept += [q_, k_, v_, out, lse]
                outs.append(out)
                # Names would keep this unit alive while the next one is worked on.
                del q_, k_, v_, out, lse
            leaving.wait()
            if not switch.alone:
                leaving = switch.start_out(chunk, outs, into)
            if not ahead and chunk + 1 < chunks:
                arriving = switch.start_in(chunk + 1, q, k, v)
        leaving.wait()
        ctx.call, ctx.switch, ctx.like = call, switch, (q.to("meta"), k.to("meta"), v.to("meta"))
        ctx.save_for_backward(sinks, *kept)
        return outs[0] if switch.alone else into[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        call, switch = ctx.call, ctx.switch
        sinks, *kept = ctx.saved_tensors
        # What is kept is freed unit by unit (not with retain_graph): the gradients' messages come
        # when all is computed, and both at once would be the peak.
        ctx.maybe_clear_saved_tensors()
        at = switch.keys_at()
        wide, dtype = kept[_KEPT - 1].dtype, kept[0].dtype
        into = switch.new_gradients(ctx.like, wide)
        dsinks = None if sinks is None else torch.zeros_like(sinks)
        nothing: Pending[Any] = Pending.done(None)
        arriving = switch.start_dout(0, dout)
        leaving: Pending[None] = nothing
        carried: Pair | None = None
        found: tuple[Tensor, ...] = ()
        for chunk in range(len(switch.chunks)):
            douts = arriving.wait()
            arriving = nothing  # it would hold what it gave
            if chunk + 1 < len(switch.chunks):
                arriving = switch.start_dout(chunk + 1, dout)
            dqs: list[Tensor] = []
            dks: list[Tensor] = []
            dvs: list[Tensor] = []
            for unit in switch.units(chunk):
                q_, k_, v_, out, lse = kept[:_KEPT]
                del kept[:_KEPT]
                dout_ = douts.pop(0)
                dq, dk, dv = runs_backward(
                    call, unit.runs, q_, k_, v_, lse, None, dout_, at, out, rounded=switch.apart
                )
                if dsinks is not None:
                    heads, delta = _heads(switch, chunk, unit), call.delta(out, dout_)
                    dsinks[heads] = sinks_backward(sinks[heads], lse, delta).to(sinks.dtype)
                dqs.append(dq)
                _add_or_append(unit, (dks, dvs), (dk, dv))
                del q_, k_, v_, out, lse, dout_, dq, dk, dv
            if carried is not None:
                _add_carried((dks[0], dvs[0]), carried)
            carried = _carried(switch, chunk, (dks[0], dvs[0]))
            leaving.wait()
            if switch.alone:
                found = (dqs[0], dks[0], dvs[0])
            else:
                leaving = switch.start_back(chunk, (dqs, dks, dvs), into, dtype)
        leaving.wait()
        found = found or into.all()
        return None, None, None, *(x.to(dtype) for x in found), dsinks


def _heads(switch: Switch, chunk: int, unit: Unit) -> slice:
    """The unit's query heads by their global numbers."""
    heads = switch.heads(chunk)[unit.h]
    return slice(heads.start, heads.stop)


def _add_or_append(unit: Unit, sums: tuple[list[Tensor], list[Tensor]], pair: Pair) -> None:
    """The gradients of a unit's keys and values, added to the last where it reads the same."""
    for found, x in zip(sums, pair, strict=True):
        if unit.first:
            found.append(x)
        else:
            found[-1] += x


def _with_carried(carried: Pair | None, arrived: Pair) -> Pair:
    """The keys and values of a chunk: a head that the chunk before read too, and those arrived."""
    if carried is None:
        return arrived
    if arrived[0].shape[2] == 0:
        return carried
    return torch.cat([carried[0], arrived[0]], dim=2), torch.cat([carried[1], arrived[1]], dim=2)


def _add_carried(pair: Pair, carried: Pair) -> None:
    """Adds the gradients of a head that the chunk before read too."""
    for x, before in zip(pair, carried, strict=True):
        x[:, :, :1] += before


def _carried(switch: Switch, chunk: int, pair: Pair) -> Pair | None:
    """Of tensors by key head of a chunk, the last head where the next chunk reads it too."""
    heads = switch.chunks[chunk]
    if len(heads.leaving[switch.me]) == len(heads.keys[switch.me]):
        return None
    # A view of one head would keep all of them alive.
    first, second = (x if x.shape[2] == 1 else x[:, :, -1:].clone() for x in pair)
    return first, second
