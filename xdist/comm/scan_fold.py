"""The folds of a scan on one rank, and the rounds in which their parcels travel.

    for each round of the schedule, in order:
        send all of this round's parcels to a rank in one message, receive its parcels in one
        (posted at once where nothing to be sent is still on its way)
        hand what arrived to the folds, which carry each state on through this rank's segments

A rank posts its rounds in order, and what is sent in a round rests on earlier rounds alone: so
ranks cannot wait for each other in a circle, even where messages of a group go one at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup, start_pairs
from xdist.comm.pending import Pending
from xdist.comm.recorder import RECORDER
from xdist.comm.scan_maps import Maps
from xdist.cost.moves import ScanRoute
from xdist.cost.scan import Parcel, block_sizes


@dataclass
class Direction:
    """What a fold goes over: forward in position order, backward against it with M transposed.

    `adds` and `transitions` are by place in position order; gather adds what arrives to both.
    """

    routes: Sequence[ScanRoute]
    me: int
    maps: Maps
    backward: bool
    adds: dict[int, Tensor]
    transitions: dict[int, Tensor]
    like: Tensor

    @property
    def step(self) -> int:
        return -1 if self.backward else 1

    @property
    def order(self) -> range:
        """All places in the order the states go."""
        return range(len(self.routes))[:: self.step]

    def comes_from_before(self, place: int) -> bool:
        """Whether a state goes into the segment."""
        route = self.routes[place]
        return route.leaves if self.backward else route.enters

    def goes_on(self, place: int) -> bool:
        """Whether the state behind the segment goes into another."""
        route = self.routes[place]
        return route.enters if self.backward else route.leaves

    def owner(self, place: int) -> int:
        return self.routes[place].piece.rank

    def through(self, place: int, state: Tensor, add: Tensor) -> Tensor:
        """The state behind a segment; `add` alone where a document starts inside or at it."""
        if not self.routes[place].passes:
            return add
        transition = self.transitions.get(place)
        if transition is None and self.maps.have_transitions:
            # Behind this rank's last segment of the document: nobody here needs the result.
            return add
        return self.maps.advance(state, transition, add, transposed=self.backward)

    def in_local_order(self, entering: dict[int, Tensor]) -> list[Tensor]:
        """This rank's states by place, in the order of its segments."""
        numbers = {self.routes[place].piece.number: state for place, state in entering.items()}
        return [numbers[number] for number in sorted(numbers)]


class Fold(ABC):
    """One scan in one direction on one rank: takes its parcels in and gives its parcels out."""

    def __init__(self, way: Direction, parcels: Sequence[Parcel]) -> None:
        self.way = way
        self.parcels = parcels

    @abstractmethod
    def shape(self, parcel: Parcel) -> tuple[int, ...]:
        """Shape of the parcel's tensor."""

    @abstractmethod
    def give(self, parcel: Parcel) -> Tensor:
        """The tensor of a parcel of this rank; all it needs has been taken in."""

    @abstractmethod
    def take(self, parcel: Parcel, tensor: Tensor) -> None:
        """A parcel for this rank has arrived."""

    @abstractmethod
    def states(self) -> list[Tensor]:
        """The state that goes into each of this rank's segments, in local order."""


class GatherFold(Fold):
    """Every summary that matters here is brought here and folded in one go."""

    def shape(self, parcel: Parcel) -> tuple[int, ...]:
        like = self.way.like
        return self.way.maps.transition_shape(like) if parcel.is_transition else tuple(like.shape)

    def _table(self, parcel: Parcel) -> dict[int, Tensor]:
        return self.way.transitions if parcel.is_transition else self.way.adds

    def give(self, parcel: Parcel) -> Tensor:
        return self._table(parcel)[parcel.place]

    def take(self, parcel: Parcel, tensor: Tensor) -> None:
        self._table(parcel)[parcel.place] = tensor

    def states(self) -> list[Tensor]:
        way = self.way
        state = way.maps.empty(way.like)
        entering: dict[int, Tensor] = {}
        for place in way.order:
            if not way.comes_from_before(place):
                state = way.maps.empty(way.like)
            if way.owner(place) == way.me:
                entering[place] = state
            if place in way.adds:
                state = way.through(place, state, way.adds[place])
        return way.in_local_order(entering)


class ChainFold(Fold):
    """A state goes through this rank's segments as soon as it is here, block by block.

    Only this rank's own transitions are used. `blocks` cuts the value columns.
    """

    def __init__(self, way: Direction, parcels: Sequence[Parcel], blocks: int) -> None:
        super().__init__(way, parcels)
        self.sizes = block_sizes(way.like.shape[-1], blocks)
        self._entering: dict[tuple[int, int], Tensor] = {}
        self._leaving: dict[tuple[int, int], Tensor] = {}
        for place in way.adds:
            if way.routes[place].passes:
                continue
            for block, add in enumerate(self._cut(way.adds[place])):
                self._behind(place, block, add)

    def _cut(self, state: Tensor) -> Sequence[Tensor]:
        return state.split(self.sizes, dim=-1) if len(self.sizes) > 1 else (state,)

    def _behind(self, place: int, block: int, state: Tensor) -> None:
        """Carry the state behind `place` on, as far as this rank's segments reach."""
        way = self.way
        while way.goes_on(place):
            following = place + way.step
            if way.owner(following) != way.me:
                self._leaving[place, block] = state
                return
            self._entering[following, block] = state
            if not way.routes[following].passes:
                return
            place = following
            state = way.through(place, state, self._cut(way.adds[place])[block])

    def shape(self, parcel: Parcel) -> tuple[int, ...]:
        return (*self.way.like.shape[:-1], self.sizes[parcel.block])

    def give(self, parcel: Parcel) -> Tensor:
        return self._leaving.pop((parcel.place, parcel.block))

    def take(self, parcel: Parcel, tensor: Tensor) -> None:
        way = self.way
        place = parcel.place + way.step
        self._entering[place, parcel.block] = tensor
        if way.routes[place].passes:
            add = self._cut(way.adds[place])[parcel.block]
            self._behind(place, parcel.block, way.through(place, tensor, add))

    def states(self) -> list[Tensor]:
        way = self.way
        entering = {}
        for place in way.adds:
            if not way.comes_from_before(place):
                entering[place] = way.maps.empty(way.like)
                continue
            parts = [self._entering[place, block] for block in range(len(self.sizes))]
            entering[place] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return way.in_local_order(entering)


@dataclass
class _Round:
    """What this rank sends and receives in one round, by the other rank."""

    sends: dict[int, list[tuple[Fold, Parcel]]] = field(default_factory=dict)
    receives: dict[int, list[tuple[Fold, Parcel]]] = field(default_factory=dict)


def run_together(
    folds: Sequence[Fold], group: ProcessGroup | None, like: Tensor
) -> Pending[list[list[Tensor]]]:
    """Start the exchange of several folds: in each round one message a pair of ranks.

    The later rounds of a chain are posted in `wait`: until it ends no other move may be made on
    the group (a rank with rounds left refuses it).

    Raises:
        PeerLost: here or on `wait()`, a rank of the group died or hung.
    """
    if group is None:
        return Pending.done([fold.states() for fold in folds])
    under_way = _UnderWay(folds, group, like)
    under_way.post()

    def finish() -> list[list[Tensor]]:
        under_way.finish()
        return [fold.states() for fold in folds]

    return Pending(finish)


class _UnderWay:
    """The rounds of one exchange on this rank."""

    def __init__(self, folds: Sequence[Fold], group: ProcessGroup, like: Tensor) -> None:
        self.group, self.like = group, like
        rounds: dict[int, _Round] = {}
        for fold in folds:
            for parcel in fold.parcels:
                one = rounds.setdefault(parcel.round, _Round())
                if parcel.sender == fold.way.me:
                    one.sends.setdefault(parcel.receiver, []).append((fold, parcel))
                else:
                    one.receives.setdefault(parcel.sender, []).append((fold, parcel))
        self._to_post = [rounds[number] for number in sorted(rounds)]
        self._posted: list[tuple[_Round, Pending[dict[int, Tensor]]]] = []

    def post(self) -> None:
        """Post the next rounds, up to one that sends what is still on its way."""
        RECORDER.release(self.group)
        while self._to_post:
            waiting = any(one.receives for one, _ in self._posted)
            if waiting and self._to_post[0].sends:
                RECORDER.hold(self.group)
                return
            one = self._to_post.pop(0)
            self._posted.append((one, self._started(one)))

    def finish(self) -> None:
        while self._posted:
            one, pending = self._posted.pop(0)
            got = pending.wait()
            for sender, items in one.receives.items():
                shapes = [fold.shape(parcel) for fold, parcel in items]
                parts = got[sender].split([torch.Size(shape).numel() for shape in shapes])
                for part, shape, (fold, parcel) in zip(parts, shapes, items, strict=True):
                    fold.take(parcel, part.view(shape))
            self.post()

    def _started(self, one: _Round) -> Pending[dict[int, Tensor]]:
        sends = {
            rank: torch.cat([fold.give(parcel).reshape(-1) for fold, parcel in items])
            for rank, items in one.sends.items()
        }
        specs = {
            rank: (
                (sum(torch.Size(fold.shape(parcel)).numel() for fold, parcel in items),),
                self.like.dtype,
            )
            for rank, items in one.receives.items()
        }
        return start_pairs(sends, specs, self.group, move="scan", device=self.like.device)
