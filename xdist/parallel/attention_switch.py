"""Heads for sequence among some ranks, in runs of heads: what ulysses and 2d send.

The members switch q, k and v so that each holds some heads of all of the members' tokens, and what
it makes of them back. A chunk of heads is one exchange; every head travels once each way, so that
the bytes do not depend on the number of chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xdist.comm.pending import Pending
from xdist.cost.attention_heads import HeadChunk, head_chunks
from xdist.parallel.attention_call import Call, Positions
from xdist.parallel.attention_parts import (
    Inward,
    Outward,
    Part,
    Targets,
    common,
    start_to_heads,
    start_to_sequence,
)
from xdist.parallel.attention_runs import Run, of_heads, runs_of
from xdist_kernels.attention.checks import sum_dtype


@dataclass(frozen=True)
class Unit:
    """Heads of a chunk that are computed at once, from tensors of their own: query heads `h`, which
    read the key heads `g` (both of this rank's in the chunk), in `runs` (of the unit's own).

    Units that share key heads follow each other: `first` and `last` of those.
    """

    h: slice
    g: slice
    runs: list[Run]
    first: bool = True
    last: bool = True


class Switch:
    """One call's switch among the sequence ranks `members`, this rank one of them.

    With `by_units` a chunk that is the only one is computed unit by unit where its heads are long:
    what the kernel needs and what it gives is then there for a unit alone.
    """

    def __init__(
        self, call: Call, members: range, chunks: int = 1, *, by_units: bool = False
    ) -> None:
        p = call.problem
        self.call, self.members = call, members
        self.me = members.index(call.rank)
        self.chunks: list[HeadChunk] = head_chunks(p, len(members), chunks)
        self.queries = [p.layout.local_length(r) for r in members]
        self.keys = [p.key_lengths()[r] for r in members]
        self.keys_move = p.key_layout is not None
        read = [range(*p.key_heads(place, len(members))) for place in range(len(members))]
        users = [sum(g in run for run in read) for g in range(p.groups)]
        self.shared = frozenset(g for g in range(p.groups) if users[g] > 1)
        self.by_units = by_units and not self.alone and chunks == 1
        # Made once: backward takes what is kept by the units of forward.
        self._units = [self._units_of(chunk) for chunk in range(chunks)]

    @property
    def alone(self) -> bool:
        """Whether nothing is switched and no head waits: tensors stay what they are."""
        return len(self.members) == len(self.chunks) == 1

    @property
    def apart(self) -> bool:
        """Whether no key head's gradient is a sum of several members', chunks' or units' parts."""
        cut = any(len(c.leaving[self.me]) < len(c.keys[self.me]) for c in self.chunks)
        again = any(not unit.first for units in self._units for unit in units)
        return not self.shared and not cut and not again

    def keys_at(self) -> Positions:
        """Global positions of the members' keys, as they lie once switched."""
        return self.call.keys_at(self.members if self.keys_move else self.members[:1])

    def heads(self, chunk: int) -> range:
        """This rank's query heads of a chunk."""
        return self.chunks[chunk].queries[self.me]

    def units(self, chunk: int) -> list[Unit]:
        """This rank's heads of a chunk, one unit or more."""
        return self._units[chunk]

    def _units_of(self, chunk: int) -> list[Unit]:
        heads, keys = self.heads(chunk), self.chunks[chunk].keys[self.me]
        runs = runs_of(self.call, heads, keys, self.members)
        most = self.call.heads_at_once(sum(self.queries)) if self.by_units else len(heads)
        if most >= len(heads):
            return [Unit(slice(0, len(heads)), slice(0, len(keys)), runs)]
        fine = runs_of(self.call, heads, keys, self.members, most)
        found = []
        for run, before, after in zip(fine, [None, *fine], [*fine[1:], None], strict=False):
            own = Run(_whole(run.h), _whole(run.g), run.seen)
            first = before is None or before.g != run.g
            last = after is None or after.g != run.g
            found.append(Unit(run.h, run.g, [own], first, last))
        return found

    def start_in(
        self, chunk: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Pending[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
        """q, k, v of this rank's tokens to those of its heads: q by unit, k and v by units that
        share none. Of k and v those that arrive, with one unit."""
        heads, units = self.chunks[chunk], self.units(chunk)
        arriving = heads.arriving[self.me]
        apart = [unit.g for unit in units if unit.first]
        if len(apart) == 1:
            apart = [slice(0, len(arriving))]
        queries = Inward(q, heads.queries, self.queries, [unit.h for unit in units])
        if not self.keys_move:
            own = [[of_heads(of_heads(x, arriving), g) for g in apart] for x in (k, v)]
            return self._to_heads([queries]).then(lambda got: (got[0], own[0], own[1]))
        keys = [Inward(x, heads.arriving, self.keys, apart) for x in (k, v)]
        return self._to_heads([queries, *keys]).then(lambda got: (got[0], got[1], got[2]))

    def start_dout(self, chunk: int, dout: Tensor) -> Pending[list[Tensor]]:
        """The adjoint of `start_out`."""
        cuts = [unit.h for unit in self.units(chunk)]
        moved = [Inward(dout, self.chunks[chunk].queries, self.queries, cuts)]
        return self._to_heads(moved).then(lambda got: got[0])

    def start_out(self, chunk: int, out: list[Tensor], into: Targets) -> Pending[None]:
        """This rank's heads of `out`, by unit, back: after the wait `into` `[B,n,H,E]` has all
        members'. `out` is emptied, so that its tensors are freed once they are packed."""
        dtype = out[0].dtype
        moved = self._queries(chunk, out, self.call.problem.value_dim, dtype)
        return start_to_sequence(self.call, self.members, [moved], into)

    def start_back(
        self, chunk: int, gradients: Sequence[list[Tensor]], into: Targets, dtype: torch.dtype
    ) -> Pending[None]:
        """The adjoint of `start_in`: `gradients` are dq, dk and dv as it gave q, k and v, and the
        lists are emptied.

        dk and dv hold at least the key heads that leave. Those that members share travel and are
        added in float32 or float64, the others travel in `dtype`, that of the inputs, as dq does.
        """
        heads, p = self.chunks[chunk], self.call.problem
        dq, *both = gradients
        moved = [self._queries(chunk, dq, p.dim, dtype)]
        read = heads.keys[self.me]
        apart = [read[unit.g.start : unit.g.stop] for unit in self.units(chunk) if unit.first]
        parts = [[Part(run, x) for run, x in zip(apart, xs, strict=True)] for xs in both]
        for xs in both:
            xs.clear()
        if not self.keys_move:
            own = heads.leaving[self.me]
            for number in (1, 2):
                for part in parts[number - 1]:
                    _keep(part, own, into[number])
            del parts, part
            return start_to_sequence(self.call, self.members, moved, into)
        for shared in (True, False):
            some = [[g for g in run if (g in self.shared) == shared] for run in heads.leaving]
            if not any(some):
                continue
            for number, width in ((1, p.dim), (2, p.value_dim)):
                mine = [x for x in parts[number - 1] if any(g in some[self.me] for g in x.heads)]
                moved.append(
                    Outward(
                        mine, some, self.keys, p.batch, width,
                        sum_dtype(dtype) if shared else dtype, number, shared,
                    )
                )  # fmt: skip
        del parts
        return start_to_sequence(self.call, self.members, moved, into)

    def new_output(self, like: Tensor, width: int) -> Targets:
        """Where outputs of this rank's tokens come together: `[B,n,H,width]`."""
        return Targets([lambda: like.new_empty(*like.shape[:3], width)])

    def new_gradients(self, like: tuple[Tensor, Tensor, Tensor], wide: torch.dtype) -> Targets:
        """Where dq, dk and dv of this rank's tokens come together; `like` are q, k and v.

        dk and dv are zeros where a head may have several parts or none.
        """
        q, k, v = like
        once = self.keys_move and not self.shared
        make = torch.empty if once else torch.zeros
        dtype = wide if self.keys_move and not once else k.dtype
        device = self.call.device
        return Targets(
            [
                lambda: torch.empty(q.shape, dtype=q.dtype, device=device),
                lambda: make(k.shape, dtype=dtype, device=device),
                lambda: make(v.shape, dtype=dtype, device=device),
            ]
        )

    def _queries(self, chunk: int, xs: list[Tensor], width: int, dtype: torch.dtype) -> Outward:
        """Tensors of query heads by unit, taken out of the list."""
        heads = self.chunks[chunk].queries
        own = heads[self.me]
        parts = [
            Part(own[unit.h.start : unit.h.stop], x)
            for unit, x in zip(self.units(chunk), xs, strict=True)
        ]
        xs.clear()
        return Outward(parts, heads, self.queries, self.call.problem.batch, width, dtype)

    def _to_heads(self, moved: list[Inward]) -> Pending[list[list[Tensor]]]:
        return start_to_heads(self.call, self.members, moved)


def _whole(run: slice) -> slice:
    """All of as many heads as a run has."""
    return slice(0, run.stop - run.start)


def _keep(part: Part, own: range, target: Tensor) -> None:
    """The gradients of keys that do not travel to their heads."""
    for here, there in common(part.heads, {head: head for head in own}):
        target[:, :, there].copy_(part.x[:, :, here])
