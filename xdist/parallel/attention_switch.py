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
    many tokens before. On the way back `into` is where all heads come together, `added` where
    several members may hold one."""

    x: Tensor
    heads: Sequence[Sequence[int]]
    tokens: Sequence[int]
    into: Tensor | None = None
    added: bool = False


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

    def start_out(self, chunk: int, out: Tensor, into: Tensor) -> Pending[None]:
        """This rank's heads of `out` back: after the wait `into` `[B,n,H,E]` has all members'."""
        return self._to_sequence([_Moved(out, self.chunks[chunk].queries, self.queries, into)])

    def start_back(
        self, chunk: int, dq: Tensor, dk: Tensor, dv: Tensor, into: tuple[Tensor, Tensor, Tensor]
    ) -> Pending[None]:
        """The adjoint of `start_in`: `into` are dq, and dk and dv as `new_gradient` makes them.

        dk and dv hold the key heads that leave. Those that members share travel and are added in
        float32 or float64, the others in the dtype of dq.
        """
        heads = self.chunks[chunk]
        moved = [_Moved(dq, heads.queries, self.queries, into[0])]
        pairs = ((dk, into[1]), (dv, into[2]))
        own = heads.leaving[self.me]
        if not self.keys_move:
            for x, target in pairs:
                of_heads(target, own).copy_(x)
            return self._to_sequence(moved)
        for shared in (True, False):
            some = [[g for g in run if (g in self.shared) == shared] for run in heads.leaving]
            for x, target in pairs:
                part = _some_heads(x, [g - own.start for g in some[self.me]])
                part = part if shared else part.to(dq.dtype)
                moved.append(_Moved(part, some, self.keys, target, shared))
        return self._to_sequence(moved)

    def new_gradients(
        self, like: tuple[Tensor, Tensor, Tensor], wide: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Where dq, dk and dv of this rank's tokens come together; `like` are q, k and v.

        dk and dv are zeros where a head may have several parts or none.
        """
        q, k, v = like
        device = self.call.device
        dq = torch.empty(q.shape, dtype=q.dtype, device=device)
        if self.keys_move and not self.shared:
            dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in (k, v))
        else:
            dtype = wide if self.keys_move else k.dtype
            dk, dv = (torch.zeros(x.shape, dtype=dtype, device=device) for x in (k, v))
        return dq, dk, dv

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

    def _to_sequence(self, moved: list[_Moved]) -> Pending[None]:
        """Each member's tokens of every tensor `[B, all tokens, heads, dim]` go to it."""
        me, places = self.me, range(len(self.members))
        cut = [m.x.split(list(m.tokens), dim=1) for m in moved]
        sends = [[pieces[r] for pieces in cut] for r in places]
        arriving = self._exchange(sends, moved, lambda m, r: (m.tokens[me], len(m.heads[r])))
        # A view of x would keep it alive while the messages travel.
        targets = [replace(m, x=m.x.new_empty(0)) for m in moved]
        # This rank's own part is put in place at once, so that nothing of `moved` outlives here.
        for part, m in zip(sends[me], moved, strict=True):
            _put(part, m.heads[me], m)

        def finish(got: dict[int, list[Tensor]]) -> None:
            for place in sorted(got):
                for part, m in zip(got[place], targets, strict=True):
                    _put(part, m.heads[place], m)

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


def _put(part: Tensor, heads: Sequence[int], moved: _Moved) -> None:
    """Writes or adds `part` `[B, n, heads, dim]` to its heads."""
    assert moved.into is not None
    start = 0
    for stop in range(1, len(heads) + 1):
        if stop == len(heads) or heads[stop] != heads[stop - 1] + 1:
            place = moved.into[:, :, heads[start] : heads[stop - 1] + 1]
            piece = part[:, :, start:stop]
            _ = place.add_(piece) if moved.added else place.copy_(piece)
            start = stop
