"""A chunk of a sequence in time, handed to a layer in place of a shard.

A shard says which tokens of a sequence a rank holds; a `Carry` says which tokens a layer is given
now, and holds the state in which the tokens before them left each of the layer's recurrences and
convolutions. The public functions know it: the i-th call with a state takes the i-th state that
came in and leaves behind the state after the chunk, differentiable both ways. A layer written with
them runs chunk by chunk without code of its own.

What has no state of fixed size (softmax attention) or sums over the whole sequence (losses, means)
refuses a carry: its layer needs the whole share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xdist.comm.scan import Transition
from xdist.documents import Documents
from xdist.errors import ShapeError, StrategyError
from xdist.layout import Layout
from xdist.mesh import Mesh
from xdist.shard import SequenceShard


class NeedsWholeSequence(StrategyError):  # noqa: N818 - it says what is needed
    """A layer was given a chunk and cannot go on from a state."""


class Enough(Exception):  # noqa: N818 - it is not an error
    """Ends a layer's call whose carry has what it was asked for."""


class Journey(NamedTuple):
    """What the scan of a recurrence's state between ranks needs to know.

    transition, rates: as comm.scan.Scan takes them. identity: the state before a document.
    through: the transition of no tokens at all; None where none travels.
    """

    transition: Transition
    rates: Tensor | None
    identity: Tensor
    through: Tensor | None


class Call(NamedTuple):
    """One call with a state inside a layer: a convolution's state holds `reach` tokens, a
    recurrence's travels as `journey` says."""

    reach: int = 0
    journey: Journey | None = None


@dataclass
class Carry:
    """Positions `[start, stop)` of a sequence, and the states before them.

    incoming: the state of each call, None where a document starts with the chunk; None in place of
    the whole: no call has one. until: the last call that matters; behind it the layer stops, and
    of a recurrence only the state after the chunk is made. through: for the recurrence `until`,
    the transition of the tokens before the chunk, to which the chunk's is joined; None: not wanted.

    outgoing: the state after the chunk of each call made so far.
    """

    start: int
    stop: int
    within: Documents
    device: torch.device
    incoming: Sequence[Tensor | None] | None = None
    until: int | None = None
    through: Tensor | None = None

    def __post_init__(self) -> None:
        self.calls: list[Call] = []
        self.outgoing: list[Tensor] = []

    # --- what a shard also says ----------------------------------------------------------------

    @property
    def local_length(self) -> int:
        """Tokens of the chunk."""
        return self.stop - self.start

    @property
    def documents(self) -> Documents:
        """The documents of the chunk, by positions in it."""
        return self.shard.documents

    @property
    def packed(self) -> bool:
        """Whether a document starts inside the chunk."""
        return self.shard.packed

    @property
    def layout(self) -> Layout:
        """The chunk as a sequence of one rank."""
        return self.shard.layout

    @property
    def group(self) -> None:
        """Nothing moves between ranks inside a chunk."""
        return

    @property
    def shard(self) -> SequenceShard:
        """The chunk as a sequence of its own."""
        return _chunk_shard(self.start, self.stop, self.within, self.device)

    @property
    def positions(self) -> Tensor:
        """Global position of each token, int64 `[n]`."""
        return torch.arange(self.start, self.stop, device=self.device)

    @property
    def document_positions(self) -> Tensor:
        """Position of each token inside its document, int64 `[n]`."""
        positions = self.positions.cpu().numpy()
        inside = torch.from_numpy(positions - self.within.starts(positions))
        return inside.to(self.device)

    def __getattr__(self, name: str) -> Any:
        # Reached only by what a chunk does not have, such as `mesh`.
        if name.startswith("_"):
            raise AttributeError(name)
        raise NeedsWholeSequence(
            "a layer that was given a chunk of its sequence asked for more than the chunk",
            f"it read {name!r} of its shard; the chunk is positions [{self.start}, {self.stop})",
            "give the whole share to this layer: call it outside checkpoint_grid",
        )

    # --- states --------------------------------------------------------------------------------

    def take(self, call: Call, x: Tensor | None = None) -> tuple[int, Tensor | None]:
        """The number of this call in its layer, and the state that comes in; x: what a
        convolution reads."""
        index = len(self.calls)
        self.calls.append(call)
        if self.incoming is None:
            return index, None
        if index == len(self.incoming):
            raise ShapeError(
                "a layer made more calls with a state than in its first chunk",
                f"{index} then, at least {index + 1} for positions [{self.start}, {self.stop})",
                "make the same calls whatever the tokens are",
            )
        return index, self.incoming[index]

    def put(self, state: Tensor, out: Tensor | None = None) -> None:
        """The state after the chunk of the call taken last; out: what a recurrence gave.

        Raises:
            Enough: nothing behind this call matters.
        """
        self.outgoing.append(state)
        if self.until == len(self.outgoing) - 1:
            raise Enough


@lru_cache(maxsize=256)
def _chunk_shard(start: int, stop: int, within: Documents, device: torch.device) -> SequenceShard:
    runs = within.runs(start, stop)
    cuts = [a - start for a, _, _ in runs] + [stop - start] if len(runs) > 1 else None
    return SequenceShard(Mesh.one_rank(device), Layout.contiguous(stop - start, 1), cuts)


def call_layer(layer: Callable[..., Tensor], x: Tensor, carry: Carry) -> Tensor | None:
    """`layer(x, carry)`; None where the carry ended the call."""
    try:
        return layer(x, carry)
    except Enough:
        return None


def whole_sequence(name: str, shard: Any) -> None:
    """Raises where `name`, which has no state of fixed size, was given a chunk.

    Raises:
        NeedsWholeSequence: `shard` is a Carry.
    """
    if isinstance(shard, Carry):
        raise NeedsWholeSequence(
            f"{name} cannot go on from a state of fixed size",
            f"it was given positions [{shard.start}, {shard.stop}) of its sequence alone",
            "put its layer on the layer axis: a layer of its own in checkpoint_grid",
        )
