"""Keys and values to the ranks that need them, their gradients back: what ring, halo, gather send.

A block is the keys and values of one owner that one user's queries see, in one message.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xdist.comm.pending import Pending
from xdist.cost.attention_keys import Needs, Ranges, Rows
from xdist.parallel.attention_call import Call, add_at, positions_at, take
from xdist.parallel.attention_wire import Spec, start_packed

Block = tuple[Tensor, Tensor]


class Blocks:
    """The traffic of one call whose `needs` say which keys go where.

    `needs` counts places: the sequence ranks, or with `rows` the rows of strategy 2d, of which this
    rank speaks for its own to the ranks of its column. `groups` key heads travel.
    """

    def __init__(
        self, call: Call, needs: Needs, move: str, *, groups: int, rows: Rows | None = None
    ) -> None:
        self.call = call
        self.needs = needs
        self.move = move
        self.groups = groups
        self.rows = rows
        if rows is None:
            self.me, self.ranks = call.rank, range(call.problem.parts)
        else:
            self.me, column = rows.place(call.rank)
            self.ranks = range(column, call.problem.parts, rows.inner)

    def start_keys(
        self, k: Tensor, v: Tensor, users: list[int], owners: list[int]
    ) -> Pending[dict[int, Block]]:
        """Sends each of `users` the keys it sees here, receives those seen of `owners`.

        k `[B,m,G,D]`, v `[B,m,G,E]`. Gives (keys, values) by owner, only where there are any.
        """
        me = self.me
        sends = {}
        taken: dict[Ranges, list[Tensor]] = {}
        for user in users:
            if self.needs.tokens(user, me):
                ranges = self.needs.ranges[user][me]
                if ranges not in taken:  # whoever sees the same keys is sent one message
                    taken[ranges] = [take(k, ranges), take(v, ranges)]
                sends[user] = taken[ranges]
        receives = {}
        for owner in owners:
            if self.needs.tokens(me, owner):
                receives[owner] = self._specs(self.needs.tokens(me, owner), k.dtype)
        return self._start(sends, receives)

    def start_gradients(
        self, gradients: dict[int, Block], users: list[int], dtype: torch.dtype
    ) -> Pending[dict[int, Block]]:
        """Returns (dk, dv) of blocks to their owners, receives those of `users`, in `dtype`."""
        me = self.me
        receives = {}
        for user in users:
            if self.needs.tokens(user, me):
                receives[user] = self._specs(self.needs.tokens(user, me), dtype)
        return self._start({o: list(block) for o, block in gradients.items()}, receives)

    def add(self, dk: Tensor, dv: Tensor, gradients: dict[int, Block]) -> None:
        """Adds the gradients that `gradients`' users returned, in rank order."""
        for user in sorted(gradients):
            ranges = self.needs.ranges[user][self.me]
            add_at(dk, ranges, gradients[user][0])
            add_at(dv, ranges, gradients[user][1])

    def positions(self, owner: int) -> Tensor:
        """Global positions of the keys this rank sees of `owner`."""
        ranges = self.needs.ranges[self.me][owner]
        return self.call.once(
            (self.move, self.rows is None, owner),
            lambda: self.call.tensor(positions_at(self._held(owner), ranges)),
        )

    def own_positions(self) -> Tensor:
        """Global positions of all keys that this place holds."""
        return self.call.once(
            ("own", self.rows is None), lambda: self.call.tensor(self._held(self.me))
        )

    def _held(self, owner: int) -> NDArray[np.int64]:
        if self.rows is None or self.rows.key_layout is None:
            return self.call.key_positions(owner)
        return self.rows.key_layout.positions(owner)

    def _specs(self, tokens: int, dtype: torch.dtype) -> list[Spec]:
        p = self.call.problem
        shape = (p.batch, tokens, self.groups)
        return [((*shape, p.dim), dtype), ((*shape, p.value_dim), dtype)]

    def _start(
        self, sends: dict[int, list[Tensor]], receives: dict[int, list[Spec]]
    ) -> Pending[dict[int, Block]]:
        pending = start_packed(
            {self.ranks[place]: tensors for place, tensors in sends.items()},
            {self.ranks[place]: specs for place, specs in receives.items()},
            self.call.group,
            move=self.move,
            device=self.call.device,
        )
        places = {rank: place for place, rank in enumerate(self.ranks)}
        return pending.then(
            lambda got: {places[rank]: (pair[0], pair[1]) for rank, pair in got.items()}
        )
