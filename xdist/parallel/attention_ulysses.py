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

from xdist.parallel.attention_call import Call, Seen, joined
from xdist.parallel.attention_wire import Spec, start_packed
from xdist.parallel.first_order import first_order
from xdist_kernels.attention.torch import attention_delta, sinks_backward

# A tensor, which heads each rank holds of it once switched, how many tokens each rank holds.
Moved = tuple[Tensor, Sequence[Sequence[int]], Sequence[int]]
# Heads, and a tensor that holds them along dim 2.
Part = tuple[Sequence[int], Tensor]


class UlyssesAttention(Function):
    """The strategy as one differentiable function of q, k, v `[B,n,H|G,D|E]` and sinks `[H]`."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None
    ) -> Tensor:
        switch = _Switch(call)
        q_, k_, v_ = switch.in_forward(q, k, v)
        outs, lses = [], []
        for run in switch.runs():
            own = None if sinks is None else sinks[switch.heads][run.h]
            part, lse = call.forward(
                _heads(q_, run.h), _heads(k_, run.g), _heads(v_, run.g), run.seen,
                switch.key_at, own,
            )  # fmt: skip
            outs.append(part.to(q.dtype))
            lses.append(lse)
        out, lse = joined(outs, 2), joined(lses, 2)
        ctx.call, ctx.switch = call, switch
        ctx.save_for_backward(q_, k_, v_, out, lse, sinks)
        return switch.out_forward(out)

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        call, switch = ctx.call, ctx.switch
        q_, k_, v_, out, lse, sinks = ctx.saved_tensors
        dout = switch.in_backward(dout)
        delta = attention_delta(out, dout)
        dqs, dks, dvs = [], [], []
        for run in switch.runs():
            h, g = run.h, run.g
            dq, dk, dv = call.backward(
                _heads(q_, h), _heads(k_, g), _heads(v_, g), lse[:, :, h], delta[:, :, h],
                _heads(dout, h), run.seen, switch.key_at,
            )  # fmt: skip
            dqs.append(dq.to(q_.dtype))
            dks.append((range(g.start, g.stop), dk))
            dvs.append((range(g.start, g.stop), dv))
        dq = joined(dqs, 2)
        # A key head cut by the split of a group is met by two runs where one rank reads it twice.
        dk, dv = _summed(dks, k_.shape[2]), _summed(dvs, v_.shape[2])
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
    seen: Seen


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
        """This rank's query heads in runs over which H / G is even: at most three, at least one."""
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
            seen = self.call.seen(positions, h, end)
            found.append(_Run(slice(h - start, end - start), g, seen))
            h = end
        none = slice(0, 0)
        return found or [_Run(none, none, self.call.seen(positions, start, start))]

    def in_forward(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """q, k, v of this rank's tokens to those of its heads over the whole sequence."""
        if not self.keys_move:
            (q_,) = self._to_heads([(q, self.query_heads, self.queries)])
            return [q_, _heads(k, self.own_keys), _heads(v, self.own_keys)]
        keys = [(x, self.key_heads, self.keys) for x in (k, v)]
        return self._to_heads([(q, self.query_heads, self.queries), *keys])

    def out_forward(self, out: Tensor) -> Tensor:
        """Outputs of this rank's heads to all heads of its tokens."""
        parts = self._to_sequence([(out, self.query_heads, self.queries)])
        return joined([part[0] for part in parts], 2)

    def in_backward(self, dout: Tensor) -> Tensor:
        """The adjoint of `out_forward`."""
        return self._to_heads([(dout, self.query_heads, self.queries)])[0]

    def out_backward(
        self, dq: Tensor, dk: Tensor, dv: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The adjoint of `in_forward`: dk and dv come in float32 or wider, all go in `dtype`."""
        p, me = self.call.problem, self.call.rank
        queries = (dq, self.query_heads, self.queries)
        if self.keys_move:
            first = self.own_keys.start
            own = [[g - first for g in heads[me]] for heads in (self.shared, self.alone)]
            moved = [(_heads(x, own[0]), self.shared, self.keys) for x in (dk, dv)]
            moved += [(_heads(x, own[1]).to(dtype), self.alone, self.keys) for x in (dk, dv)]
            parts = self._to_sequence([queries, *moved])
            given: tuple[list[Part], list[Part]] = ([], [])
            for r, (_, *got) in enumerate(parts):
                for i, heads in enumerate((self.shared[r], self.alone[r])):
                    for which, part in zip(given, got[2 * i : 2 * i + 2], strict=True):
                        which.append((heads, part))
        else:
            parts = self._to_sequence([queries])
            own_keys = range(self.own_keys.start, self.own_keys.stop)
            given = ([(own_keys, dk)], [(own_keys, dv)])
        dq = joined([part[0] for part in parts], 2)
        dk, dv = (_summed(which, p.groups) for which in given)
        return dq, dk.to(dtype), dv.to(dtype)

    def _to_heads(self, moved: list[Moved]) -> list[Tensor]:
        """Each rank's heads of every tensor `[B, n, heads, dim]` go to it; tokens are joined."""
        me = self.call.rank
        sends = [[_heads(x, heads[r]) for x, heads, _ in moved] for r in range(len(self.keys))]
        specs: list[list[Spec]] = [
            [
                ((x.shape[0], tokens[r], len(heads[me]), x.shape[3]), x.dtype)
                for x, heads, tokens in moved
            ]
            for r in range(len(self.keys))
        ]
        parts = self._exchange(sends, specs)
        return [joined(same, 1) for same in zip(*parts, strict=True)]

    def _to_sequence(self, moved: list[Moved]) -> list[list[Tensor]]:
        """Each rank's tokens of every tensor `[B, N, heads, dim]` go to it; by sending rank."""
        me = self.call.rank
        # What one rank keeps whole stays itself: an output that is a view could not be written to.
        cut = [[x] if len(tokens) == 1 else x.split(list(tokens), dim=1) for x, _, tokens in moved]
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


def _heads(x: Tensor, heads: slice | Sequence[int]) -> Tensor:
    """`heads` of x `[B, n, H, dim]`: x itself where that is all, a view where they are a run."""
    if not isinstance(heads, slice):
        run = list(heads) == list(range(heads[0], heads[-1] + 1)) if heads else True
        if not run:
            return x[:, :, list(heads)]
        heads = slice(heads[0], heads[-1] + 1) if heads else slice(0, 0)
    return x if heads == slice(0, x.shape[2]) else x[:, :, heads]


def _summed(parts: Sequence[Part], heads: int) -> Tensor:
    """Parts `[B, n, some heads, dim]` by head, in the widest dtype among them where heads meet.

    Parts that hold every head once, in order, are only joined; a head that no part holds is zero.
    """
    some = [(held, part) for held, part in parts if len(held)]
    if some and [h for held, _ in some for h in held] == list(range(heads)):
        return joined([part for _, part in some], 2)
    like = parts[0][1]
    dtype = max((part.dtype for _, part in parts), key=lambda dtype: dtype.itemsize)
    total = like.new_zeros(*like.shape[:2], heads, like.shape[3], dtype=dtype)
    for held, part in some:
        index = torch.tensor(list(held), dtype=torch.int64, device=like.device)
        total.index_add_(2, index, part.to(dtype))
    return total
