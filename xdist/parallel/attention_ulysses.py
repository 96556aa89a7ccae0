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

After Jacobs et al. 2023, arXiv 2309.14509; a key head is sent once to each rank that needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from xdist.parallel.attention_call import Call
from xdist.parallel.attention_wire import Spec, start_packed
from xdist_kernels.attention.blocks import Spans
from xdist_kernels.attention.torch import attention_delta, sinks_backward

# A tensor, which heads each rank holds of it once switched, how many tokens each rank holds.
Moved = tuple[Tensor, Sequence[Sequence[int]], Sequence[int]]


class UlyssesAttention(Function):
    """The strategy as one differentiable function of q, k, v `[B,n,H|G,D|E]` and sinks `[H]`."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> Tensor:
        switch = _Switch(call)
        q_, k_, v_ = switch.in_forward(q, k, v)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = q.new_empty(*q_.shape[:3], v.shape[-1])
        lse = q.new_empty(q_.shape[:3], dtype=wide)
        for run in switch.runs():
            own = None if sinks is None else sinks[switch.heads][run.h]
            part = call.forward(
                q_[:, :, run.h], k_[:, :, run.g], v_[:, :, run.g], run.spans, switch.key_at, own
            )
            out[:, :, run.h], lse[:, :, run.h] = part
        ctx.call, ctx.switch = call, switch
        ctx.save_for_backward(q_, k_, v_, out, lse, sinks)
        return switch.out_forward(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        call, switch = ctx.call, ctx.switch
        q_, k_, v_, out, lse, sinks = ctx.saved_tensors
        dout = switch.in_backward(dout)
        delta = attention_delta(out, dout)
        dq = torch.empty_like(q_)
        dk = k_.new_zeros(k_.shape, dtype=lse.dtype)
        dv = v_.new_zeros(v_.shape, dtype=lse.dtype)
        for run in switch.runs():
            h, g = run.h, run.g
            dq[:, :, h], dk_, dv_ = call.backward(
                q_[:, :, h], k_[:, :, g], v_[:, :, g], lse[:, :, h], delta[:, :, h],
                dout[:, :, h], run.spans, switch.key_at,
            )  # fmt: skip
            # A key head cut by the split of a group is met by one run only, so this adds to zeros
            # except where two runs of one rank read it.
            dk[:, :, g] += dk_
            dv[:, :, g] += dv_
        dsinks = None
        if sinks is not None:
            dsinks = torch.zeros_like(sinks)
            own = sinks_backward(sinks[switch.heads], lse, delta)
            dsinks[switch.heads] = own.to(sinks.dtype)
        dq, dk, dv = switch.out_backward(dq, dk, dv, q_.dtype)
        return None, dq, dk, dv, dsinks


@dataclass(frozen=True)
class _Run:
    """Query heads `h` that share the key heads `g` evenly (local indices), and what they see."""

    h: slice
    g: slice
    spans: Spans


class _Switch:
    """Who sends which heads of which tokens to whom."""

    def __init__(self, call: Call) -> None:
        p = call.problem
        ranks = range(p.parts)
        self.call = call
        self.query_heads = [range(*p.query_heads(r)) for r in ranks]
        self.key_heads = [range(*p.key_heads(r)) for r in ranks]
        self.queries = p.layout.local_lengths
        self.keys = p.key_lengths()
        self.keys_move = p.key_layout is not None
        self.heads = _slice(self.query_heads[call.rank])
        self.own_keys = _slice(self.key_heads[call.rank])
        positions = [call.key_positions(r) for r in (ranks if self.keys_move else [0])]
        self.key_at = call.tensor(np.concatenate(positions))
        users = [sum(g in run for run in self.key_heads) for g in range(p.groups)]
        # Gradients of a shared head are added across ranks and travel wide; others only move.
        self.shared = [[g for g in run if users[g] > 1] for run in self.key_heads]
        self.alone = [[g for g in run if users[g] == 1] for run in self.key_heads]

    def runs(self) -> list[_Run]:
        """This rank's query heads in runs over which H / G is even: at most three."""
        p = self.call.problem
        per_group = p.heads // max(1, p.groups)
        start, stop, first_key = self.heads.start, self.heads.stop, self.own_keys.start
        positions = np.concatenate([p.layout.positions(r) for r in range(p.parts)])
        found = []
        h = start
        while h < stop:
            whole = (stop - h) // per_group if h % per_group == 0 else 0
            end = h + whole * per_group if whole else min(stop, (h // per_group + 1) * per_group)
            g = slice(h // per_group - first_key, (end - 1) // per_group + 1 - first_key)
            spans = self.call.spans(positions, h, end)
            found.append(_Run(slice(h - start, end - start), g, spans))
            h = end
        return found

    def in_forward(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """q, k, v of this rank's tokens to those of its heads over the whole sequence."""
        if not self.keys_move:
            (q_,) = self._to_heads([(q, self.query_heads, self.queries)])
            return [q_, k[:, :, self.own_keys], v[:, :, self.own_keys]]
        keys = [(x, self.key_heads, self.keys) for x in (k, v)]
        return self._to_heads([(q, self.query_heads, self.queries), *keys])

    def out_forward(self, out: Tensor) -> Tensor:
        """Outputs of this rank's heads to all heads of its tokens."""
        parts = self._to_sequence([(out, self.query_heads, self.queries)])
        return torch.cat([part[0] for part in parts], dim=2)

    def in_backward(self, dout: Tensor) -> Tensor:
        """The adjoint of `out_forward`."""
        return self._to_heads([(dout, self.query_heads, self.queries)])[0]

    def out_backward(
        self, dq: Tensor, dk: Tensor, dv: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The adjoint of `in_forward`: dk and dv come in float32 or wider, all go in `dtype`."""
        p, me = self.call.problem, self.call.rank
        queries = (dq, self.query_heads, self.queries)
        totals = [x.new_zeros(p.batch, self.keys[me], p.groups, x.shape[-1]) for x in (dk, dv)]
        if self.keys_move:
            first = self.own_keys.start
            own = [[g - first for g in heads[me]] for heads in (self.shared, self.alone)]
            moved = [(x[:, :, own[0]], self.shared, self.keys) for x in (dk, dv)]
            moved += [(x[:, :, own[1]].to(dtype), self.alone, self.keys) for x in (dk, dv)]
            parts = self._to_sequence([queries, *moved])
            for r, (_, *given) in enumerate(parts):
                for i, heads in enumerate((self.shared[r], self.alone[r])):
                    index = torch.tensor(heads, dtype=torch.int64, device=dk.device)
                    for total, part in zip(totals, given[2 * i : 2 * i + 2], strict=True):
                        total.index_add_(2, index, part.to(total.dtype))
        else:
            parts = self._to_sequence([queries])
            for total, x in zip(totals, (dk, dv), strict=True):
                total[:, :, self.own_keys] = x
        dq = torch.cat([part[0] for part in parts], dim=2)
        return dq, totals[0].to(dtype), totals[1].to(dtype)

    def _to_heads(self, moved: list[Moved]) -> list[Tensor]:
        """Each rank's heads of every tensor `[B, n, heads, dim]` go to it; tokens are joined."""
        me = self.call.rank
        sends = [[x[:, :, _run(heads[r])] for x, heads, _ in moved] for r in range(len(self.keys))]
        specs: list[list[Spec]] = [
            [
                ((x.shape[0], tokens[r], len(heads[me]), x.shape[3]), x.dtype)
                for x, heads, tokens in moved
            ]
            for r in range(len(self.keys))
        ]
        parts = self._exchange(sends, specs)
        return [torch.cat(same, dim=1) for same in zip(*parts, strict=True)]

    def _to_sequence(self, moved: list[Moved]) -> list[list[Tensor]]:
        """Each rank's tokens of every tensor `[B, N, heads, dim]` go to it; by sending rank."""
        me = self.call.rank
        cut = [x.split(list(tokens), dim=1) for x, _, tokens in moved]
        sends = [[pieces[r] for pieces in cut] for r in range(len(self.keys))]
        specs: list[list[Spec]] = [
            [
                ((x.shape[0], tokens[me], len(heads[r]), x.shape[3]), x.dtype)
                for x, heads, tokens in moved
            ]
            for r in range(len(self.keys))
        ]
        return self._exchange(sends, specs)

    def _exchange(self, sends: list[list[Tensor]], specs: list[list[Spec]]) -> list[list[Tensor]]:
        """One message to and from every other rank; what is for this rank stays here."""
        others = self.call.others()
        got = start_packed(
            {r: sends[r] for r in others},
            {r: specs[r] for r in others},
            self.call.group,
            move="switch",
            device=self.call.device,
        ).wait()
        return [got[r] if r in got else sends[r] for r in range(len(sends))]


def _slice(run: range) -> slice:
    return slice(run.start, run.stop)


def _run(heads: Sequence[int]) -> slice:
    return slice(heads[0], heads[-1] + 1) if heads else slice(0, 0)
