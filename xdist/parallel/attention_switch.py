"""Heads for sequence among some ranks, in runs of heads: what ulysses and 2d send.

The members switch q, k and v so that each holds some heads of all of the members' tokens, and what
it makes of them back. A chunk of heads is one exchange; every head travels once each way, so that
the bytes do not depend on the number of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xdist.comm.pending import Pending
from xdist.cost.attention_heads import HeadChunk, head_chunks
from xdist.parallel.attention_call import Call, joined
from xdist.parallel.attention_runs import Run, of_heads, runs_of
from xdist.parallel.attention_wire import Spec, start_packed


@dataclass(frozen=True)
class _Moved:
    """A tensor `[B, tokens, heads, dim]`; by member, which heads it holds once switched and how
    many tokens before. On the way back `target` numbers where all heads come together, `added`
    where several members may hold one."""

    x: Tensor
    heads: Sequence[Sequence[int]]
    tokens: Sequence[int]
    target: int = 0
    added: bool = False


class Targets:
    """Where heads of this rank's tokens come together: each tensor is made for its first part."""

    def __init__(self, makers: Sequence[Callable[[], Tensor]]) -> None:
        self._makers = makers
        self._made: dict[int, Tensor] = {}

    def __getitem__(self, number: int) -> Tensor:
        if number not in self._made:
            self._made[number] = self._makers[number]()
        return self._made[number]

    def all(self) -> tuple[Tensor, ...]:
        """Every tensor, also one that got no part."""
        return tuple(self[number] for number in range(len(self._makers)))


class Switch:
    """One call's switch among the sequence ranks `members`, this rank one of them."""

    def __init__(self, call: Call, members: range, chunks: int = 1) -> None:
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

    @property
    def alone(self) -> bool:
        """Whether nothing is switched and no head waits: tensors stay what they are."""
        return len(self.members) == len(self.chunks) == 1

    @property
    def apart(self) -> bool:
        """Whether no key head's gradient is a sum of several members' or chunks' parts."""
        cut = any(len(c.leaving[self.me]) < len(c.keys[self.me]) for c in self.chunks)
        return not self.shared and not cut

    def keys_at(self) -> Tensor:
        """Global positions of the members' keys, as they lie once switched."""
        return self.call.keys_at(self.members if self.keys_move else self.members[:1])

    def heads(self, chunk: int) -> range:
        """This rank's query heads of a chunk."""
        return self.chunks[chunk].queries[self.me]

    def runs(self, chunk: int) -> list[Run]:
        """This rank's query heads of a chunk, in runs."""
        return runs_of(self.call, self.heads(chunk), self.chunks[chunk].keys[self.me], self.members)

    def start_in(
        self, chunk: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Pending[tuple[Tensor, Tensor, Tensor]]:
        """q, k, v of this rank's tokens to those of its heads: of k and v those that arrive."""
        heads = self.chunks[chunk]
        queries = _Moved(q, heads.queries, self.queries)
        if not self.keys_move:
            own = heads.arriving[self.me]
            k, v = of_heads(k, own), of_heads(v, own)
            return self._to_heads([queries]).then(lambda got: (got[0], k, v))
        keys = [_Moved(x, heads.arriving, self.keys) for x in (k, v)]
        return self._to_heads([queries, *keys]).then(lambda got: (got[0], got[1], got[2]))

    def start_dout(self, chunk: int, dout: Tensor) -> Pending[Tensor]:
        """The adjoint of `start_out`."""
        moved = [_Moved(dout, self.chunks[chunk].queries, self.queries)]
        return self._to_heads(moved).then(lambda got: got[0])

    def start_out(self, chunk: int, out: list[Tensor], into: Targets) -> Pending[None]:
        """This rank's heads of `out` back: after the wait `into` `[B,n,H,E]` has all members'.

        `out` is emptied, so that the tensor is freed once it is packed.
        """
        moved = [_Moved(out.pop(), self.chunks[chunk].queries, self.queries)]
        return self._to_sequence(moved, into)

    def start_back(self, chunk: int, gradients: list[Tensor], into: Targets) -> Pending[None]:
        """The adjoint of `start_in`: `gradients` are dq, dk and dv, and are taken out of the list.

        dk and dv hold the key heads that leave. Those that members share travel and are added in
        float32 or float64, the others in the dtype of dq.
        """
        heads = self.chunks[chunk]
        dq, dk, dv = gradients
        gradients.clear()
        moved = [_Moved(dq, heads.queries, self.queries)]
        own = heads.leaving[self.me]
        if not self.keys_move:
            for number, x in ((1, dk), (2, dv)):
                of_heads(into[number], own).copy_(x)
            del dq, dk, dv, x
            return self._to_sequence(moved, into)
        for shared in (True, False):
            some = [[g for g in run if (g in self.shared) == shared] for run in heads.leaving]
            for number, x in ((1, dk), (2, dv)):
                part = _some_heads(x, [g - own.start for g in some[self.me]])
                part = part if shared else part.to(dq.dtype)
                if any(some):
                    moved.append(_Moved(part, some, self.keys, number, shared))
        del dq, dk, dv, x, part
        return self._to_sequence(moved, into)

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

    def _to_heads(self, moved: list[_Moved]) -> Pending[list[Tensor]]:
        """Each member's heads of every tensor `[B, n, heads, dim]` go to it; tokens are joined."""
        me, places = self.me, range(len(self.members))
        sends = [[_some_heads(m.x, m.heads[r]) for m in moved] for r in places]
        arriving = self._exchange(sends, moved, lambda m, r: (m.tokens[r], len(m.heads[me])))
        own = sends[me]
        return arriving.then(
            lambda got: [
                joined(list(same), 1)
                for same in zip(*(got.get(r, own) for r in places), strict=True)
            ]
        )

    def _to_sequence(self, moved: list[_Moved], into: Targets) -> Pending[None]:
        """Each member's tokens of every tensor `[B, all tokens, heads, dim]` go to it.

        `moved` is emptied: its tensors are freed, if nobody else has them, once they are packed.
        """
        me, places = self.me, range(len(self.members))
        sends = [[m.x.split(list(m.tokens), dim=1)[r] for m in moved] for r in places]
        arriving = self._exchange(sends, moved, lambda m, r: (m.tokens[me], len(m.heads[r])))
        own = sends[me]
        # A view of x would keep it alive while the messages travel.
        rest = [replace(m, x=m.x.new_empty(0)) for m in moved]
        moved.clear()
        sends.clear()
        for m in rest:
            _put(own.pop(0), m.heads[me], m, into)

        def finish(got: dict[int, list[Tensor]]) -> None:
            for place in sorted(got):
                for part, m in zip(got[place], rest, strict=True):
                    _put(part, m.heads[place], m, into)

        return arriving.then(finish)

    def _exchange(
        self,
        sends: list[list[Tensor]],
        moved: list[_Moved],
        size: Callable[[_Moved, int], tuple[int, int]],
    ) -> Pending[dict[int, list[Tensor]]]:
        """One message to and from every other member; `size` gives tokens and heads of one."""
        others = [place for place in range(len(self.members)) if place != self.me]
        specs: dict[int, list[Spec]] = {
            self.members[r]: [((m.x.shape[0], *size(m, r), m.x.shape[3]), m.x.dtype) for m in moved]
            for r in others
        }
        pending = start_packed(
            {self.members[r]: sends[r] for r in others},
            specs,
            self.call.group,
            move="switch",
            device=self.call.device,
        )
        first = self.members.start
        return pending.then(lambda got: {rank - first: parts for rank, parts in got.items()})


def _some_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """`heads` of x `[B, n, H, dim]`: a view where they are a run."""
    if not heads:
        return x[:, :, :0]
    run = range(heads[0], heads[-1] + 1)
    return of_heads(x, run) if len(run) == len(heads) else x[:, :, list(heads)]


def _put(part: Tensor, heads: Sequence[int], moved: _Moved, into: Targets) -> None:
    """Writes or adds `part` `[B, n, heads, dim]` to its heads."""
    start = 0
    for stop in range(1, len(heads) + 1):
        if stop == len(heads) or heads[stop] != heads[stop - 1] + 1:
            place = into[moved.target][:, :, heads[start] : heads[stop - 1] + 1]
            piece = part[:, :, start:stop]
            _ = place.add_(piece) if moved.added else place.copy_(piece)
            start = stop
