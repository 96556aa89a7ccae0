"""Tensors whose heads lie in parts, between the sequence and the heads: packed, sent, put together.

On the way out each part is freed when it is in its messages, and what this rank keeps for itself
waits beside them as one small copy: the tensors and where they come together are never there both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xdist.comm.pending import Pending
from xdist.parallel.attention_call import Call, joined
from xdist.parallel.attention_runs import of_heads
from xdist.parallel.attention_wire import Spec, new_message, start_messages, start_packed


@dataclass(frozen=True)
class Inward:
    """x `[B, n, H, dim]` of this rank's tokens; by member, the heads that it gets and how many
    tokens it holds. This rank wants its own heads in the runs `cuts`."""

    x: Tensor
    heads: Sequence[range]
    tokens: Sequence[int]
    cuts: Sequence[slice]


@dataclass(frozen=True)
class Part:
    """The heads of these numbers, ascending, of a tensor `[B, tokens, heads, dim]`."""

    heads: Sequence[int]
    x: Tensor


@dataclass(frozen=True)
class Outward:
    """A tensor `[B, all tokens, heads, width]` in `parts`; by member, the heads of it that it holds
    and how many tokens it gets. It travels in `dtype`. `target` numbers where all heads come
    together, `added` where several members may hold one."""

    parts: list[Part]
    heads: Sequence[Sequence[int]]
    tokens: Sequence[int]
    batch: int
    width: int
    dtype: torch.dtype
    target: int = 0
    added: bool = False

    def spec(self, tokens: int, heads: int) -> Spec:
        return (self.batch, tokens, heads, self.width), self.dtype


class Targets:
    """Where heads of this rank's tokens come together: each tensor is made for its first part."""

    def __init__(self, makers: Sequence[Callable[[], Tensor]]) -> None:
        self._makers = makers
        self._made: dict[int, Tensor] = {}

    def __getitem__(self, number: int) -> Tensor:
        if number not in self._made:
            self._made[number] = self._makers[number]()
        return self._made[number]

    def made(self, number: int) -> bool:
        """Whether the tensor is there already."""
        return number in self._made

    def all(self) -> tuple[Tensor, ...]:
        """Every tensor, also one that got no part."""
        return tuple(self[number] for number in range(len(self._makers)))


def start_to_heads(
    call: Call, members: range, moved: Sequence[Inward]
) -> Pending[list[list[Tensor]]]:
    """Each member's heads of every tensor go to it, in one message a pair: after the wait, for each
    tensor, its runs `[B, all tokens, heads, dim]`."""
    me = members.index(call.rank)
    others = [place for place in range(len(members)) if place != me]
    own = [of_heads(m.x, m.heads[me]) for m in moved]
    cuts = [m.cuts for m in moved]
    arriving = start_packed(
        {members[r]: [of_heads(m.x, m.heads[r]) for m in moved] for r in others},
        {
            members[r]: [
                ((m.x.shape[0], m.tokens[r], len(m.heads[me]), m.x.shape[3]), m.x.dtype)
                for m in moved
            ]
            for r in others
        },
        call.group,
        move="switch",
        device=call.device,
    )

    def finish(got: dict[int, list[Tensor]]) -> list[list[Tensor]]:
        shares = [got.get(rank, own) for rank in members]
        return [
            [joined([of_heads(share[i], cut) for share in shares], 1) for cut in wanted]
            for i, wanted in enumerate(cuts)
        ]

    return arriving.then(finish)


def start_to_sequence(
    call: Call, members: range, moved: Sequence[Outward], into: Targets
) -> Pending[None]:
    """Each member's tokens of every tensor go to it, in one message a pair: after the wait `into`
    has all members' heads of this rank's tokens.

    Parts are taken out as they are packed, so that they are freed if nobody else has them.
    """
    me = members.index(call.rank)
    others = [place for place in range(len(members)) if place != me]
    made = {
        r: new_message([m.spec(m.tokens[r], len(m.heads[me])) for m in moved], call.device)
        for r in others
    }
    own: list[tuple[Outward, _Place]] = []
    for i, m in enumerate(moved):
        order = {head: place for place, head in enumerate(m.heads[me])}
        if into.made(m.target) or not others:
            mine = _target(m, m.heads[me], into)
        else:
            shape, dtype = m.spec(m.tokens[me], len(m.heads[me]))
            mine = _Place(torch.empty(shape, dtype=dtype, device=call.device), order)
            own.append((m, mine))
        places = [mine if r == me else _Place(made[r][1][i], order) for r in range(len(members))]
        while m.parts:
            _leave(m.parts.pop(0), m.tokens, places)
    arriving = start_messages(
        {members[r]: message for r, (message, _) in made.items()},
        {members[r]: [m.spec(m.tokens[me], len(m.heads[r])) for m in moved] for r in others},
        call.group,
        move="switch",
        device=call.device,
    )

    def finish(got: dict[int, list[Tensor]]) -> None:
        while own:
            _put_own(*own.pop(0), into)
        for place, rank in enumerate(members):
            for part, m in zip(got.get(rank, ()), moved, strict=rank in got):
                _target(m, m.heads[place], into).put(m.heads[place], part)

    return arriving.then(finish)


@dataclass(frozen=True)
class _Place:
    """`at` says which heads, by their numbers, lie where in x, to be written or `added` to."""

    x: Tensor
    at: Mapping[int, int]
    added: bool = False

    def put(self, heads: Iterable[int], part: Tensor) -> None:
        """Those of `heads`, which `part` holds, that have a place here."""
        for here, there in common(heads, self.at):
            place, piece = self.x[:, :, there], part[:, :, here]
            _ = place.add_(piece) if self.added else place.copy_(piece)


def _target(m: Outward, heads: Iterable[int], into: Targets) -> _Place:
    """These heads' place where all come together."""
    return _Place(into[m.target], {head: head for head in heads}, m.added)


def _leave(part: Part, tokens: Sequence[int], places: Sequence[_Place]) -> None:
    """Copies a part to the members' places, each its tokens."""
    for place, share in zip(places, part.x.split(list(tokens), dim=1), strict=True):
        place.put(part.heads, share)


def _put_own(m: Outward, mine: _Place, into: Targets) -> None:
    _target(m, mine.at, into).put(mine.at, mine.x)


def common(held: Iterable[int], at: Mapping[int, int]) -> list[tuple[slice, slice]]:
    """Runs of heads that lie in both: where among those held, one after another, and where `at`
    says."""
    found: list[tuple[slice, slice]] = []
    for here, head in enumerate(held):
        there = at.get(head)
        if there is None:
            continue
        if found and (found[-1][0].stop, found[-1][1].stop) == (here, there):
            first, second = found.pop()
            found.append((slice(first.start, here + 1), slice(second.start, there + 1)))
        else:
            found.append((slice(here, here + 1), slice(there, there + 1)))
    return found
