"""One call of a recurrence on one rank's share: tile by tile, forward and backward.

    forward   summary of each segment -> (states travel, `ahead`) -> the tiles that waited
    backward  adjoint of each segment -> (gradients travel, `ahead_back`) -> the tiles that waited

Kept for backward: the inputs and the state before each tile. What of a tile needs no state is
made once where it fits in KEPT_BYTES, and again otherwise.

Shapes: states [B,H,K,V]; states of documents [B,documents,H,K,V].
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from xdist.errors import ConfigError
from xdist.parallel.recurrence import Inputs, Recurrence
from xdist.parallel.recurrent_tiles import Segment, Share, Tile

# Prepared tiles kept while a state travels: a few tiles, about half a second of a CPU core. Tiles
# of a GPU are larger, and so is its memory.
KEPT_BYTES, TIMES_ON_A_GPU = 256 << 20, 16

Found = TypeVar("Found")


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor of nested tuples."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from tensors_in(branch)


class Kept:
    """Prepared tiles under way, as many as fit."""

    def __init__(self, inputs: Inputs) -> None:
        self._tiles: dict[int, Any] = {}
        given = [x for x in inputs if x is not None]
        self._own = {_memory(x) for x in given}
        self.room = KEPT_BYTES * (TIMES_ON_A_GPU if given[0].device.type == "cuda" else 1)
        self.bytes = 0

    def _size(self, prepared: Any) -> int:
        sizes = {_memory(t): t.untyped_storage().nbytes() for t in tensors_in(prepared)}
        return sum(size for place, size in sizes.items() if place not in self._own)

    def offer(self, tile: Tile, prepared: Any) -> bool:
        """Keep a prepared tile if there is room; whether it was kept."""
        size = self._size(prepared)
        if self.bytes + size > self.room:
            return False
        self.bytes += size
        self._tiles[id(tile)] = prepared
        return True

    def take(self, tile: Tile) -> Any | None:
        """A kept tile, no longer kept here; None where there was no room."""
        found = self._tiles.pop(id(tile), None)
        if found is not None:
            self.bytes -= self._size(found)
        return found


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def from_state(call: Callable[..., Found], state: Tensor, *rest: Tensor, of: Recurrence) -> Found:
    """`call(state, *rest)` of a recurrence, which leaves the state as it is: other documents start
    from the same tensor, and backward reads it.

    Raises:
        ConfigError: the state was changed in place.
    """
    if state.is_inference():
        # Such a tensor does not tell whether it was changed.
        return call(state.clone(), *rest)
    version = state._version
    found = call(state, *rest)
    if state._version != version:
        raise ConfigError(
            f"{type(of).__name__} changed the state it was given in place",
            f"its shape is {list(state.shape)}; other documents start from the same tensor",
            "return a new state, or work on `state.clone()`, in `run` and what replaces it",
        )
    return found


class Work:
    """The tiles of one call, and what is known of them so far."""

    def __init__(
        self,
        op: Recurrence,
        share: Share,
        inputs: Inputs,
        initial: Tensor | None,
        *,
        want_final: bool,
        states: Sequence[Tensor] | None = None,
    ) -> None:
        """states: those before each tile, in order, as forward left them."""
        self.op, self.share, self.inputs, self.initial = op, share, inputs, initial
        several = share.documents.count > 1
        alone = (several and (want_final or initial is not None)) or not op.marks_documents
        self.segments = share.segments(op.tile_tokens(inputs), at_documents=alone)
        self.identity = op.identity(inputs)
        self.finals: dict[int, Tensor] = {}
        self.kept = Kept(inputs)
        order = [tile for segment in self.segments for tile in segment.tiles]
        self.states = dict(zip(map(id, order), states, strict=True)) if states else {}
        first = next(x for i, x in enumerate(inputs) if x is not None and i not in op.whole)
        _, heads, _, _ = self.identity.shape
        # Under switch a rank may have no head; kernels then have nothing to shape.
        self._idle = heads == 0
        self._out_shape = (*first.shape[:2], heads, op.value_dim(inputs))

    @property
    def kept_states(self) -> list[Tensor]:
        """The states before each tile, in order."""
        return [self.states[id(tile)] for segment in self.segments for tile in segment.tiles]

    def cut(self, tile: Tile) -> tuple[Tensor | None, ...]:
        """The tile's tokens of every input."""
        return tuple(
            x if x is None or index in self.op.whole else tile.take(x)
            for index, x in enumerate(self.inputs)
        )

    def _prepared(self, tile: Tile) -> Any:
        found = self.kept.take(tile)
        if found is None:
            found = self.op.prepare(self.cut(tile), tile.marks(self.identity.device))
        return found

    def _start_of(self, tile: Tile) -> Tensor:
        """The state before a tile with which a document starts."""
        return self.identity if self.initial is None else self.initial[:, tile.document]

    # --- forward -------------------------------------------------------------------------------

    def start_forward(self) -> None:
        """Make room for the outputs [B, n, H, V]."""
        dtype = self.op.output_dtype(self.inputs)
        self.out = torch.empty(self._out_shape, dtype=dtype, device=self.identity.device)

    def summary(self, segment: Segment) -> tuple[Tensor, Tensor | None]:
        """(E, M) of a segment: what it does to the states of later ones."""
        kind = self.op.transition
        passes = segment.enters and segment.leaves and segment.single
        through = None if kind in ("none", "logsumexp") else self.no_transition()
        moves = passes and through is not None
        if not segment.leaves:
            return self.identity, through
        state = self.identity
        for tile in segment.tiles[segment.origin :]:
            state = self._start_of(tile) if tile.fresh else state
            call = partial(self.op.summarised, self._prepared(tile), through=moves)
            prepared, state, own = from_state(call, state, of=self.op)
            if moves:
                assert through is not None
                through = joined_transitions(kind, through, own)
            self.kept.offer(tile, prepared)
        return state, through

    def no_transition(self) -> Tensor:
        """M = 1, as it travels."""
        kind, like = self.op.transition, self.identity
        if kind == "matrix":
            return torch.eye(like.shape[2], dtype=like.dtype, device=like.device).expand(
                *like.shape[:2], -1, -1
            )
        lone = kind == "scalar" or self.op.rates_of(self.inputs) is not None
        return like.new_zeros(like.shape[:2] if lone else like.shape[:3])

    def ahead(self) -> None:
        """All that needs no state from other ranks."""
        for segment in self.segments:
            self._run(segment, segment.waiting, len(segment.tiles), None)
            for tile in segment.tiles[: segment.waiting]:
                if not self.kept.offer(tile, self.op.ahead(self._prepared(tile))):
                    break

    def complete(self, segment: Segment, state: Tensor) -> None:
        """The tiles that waited for the state entering their segment."""
        self._run(segment, 0, segment.waiting, state)

    def forward_alone(self) -> None:
        """The segments, which are the whole sequence, one after another."""
        state = self.identity
        for segment in sorted(self.segments, key=lambda one: one.start):
            state = self._run(segment, 0, len(segment.tiles), state)

    def _run(self, segment: Segment, first: int, last: int, state: Tensor | None) -> Tensor:
        for tile in segment.tiles[first:last]:
            if tile.fresh:
                state = self._start_of(tile)
            assert state is not None
            self.states[id(tile)] = state
            if not self._idle:
                prepared = self._prepared(tile)
                if tile.reverse:
                    out, state = from_state(partial(self.op.run, prepared), state, of=self.op)
                    tile.put(self.out, out)
                else:
                    call = partial(self.op.run_into, prepared)
                    state = from_state(call, state, self.out[:, tile.at], of=self.op)
            if tile.closes is not None:
                self.finals[tile.closes] = state
        return self.identity if state is None else state

    # --- backward ------------------------------------------------------------------------------

    def start_backward(
        self, dout: Tensor, dfinal: dict[int, Tensor], added: Collection[int] = ()
    ) -> None:
        """Make room for gradients; dfinal: those of final states of documents that end here;
        added: inputs whose gradients other ranks add to, which are not narrowed before."""
        self.dout, self.dfinal = dout, dfinal
        self.dinitial = None if self.initial is None else torch.zeros_like(self.initial)
        wide = self.identity.dtype
        # Whether what a tile of all tokens has found may take the place of what was made for it.
        # Kernels with tiles of their own give tensors of their own, others perhaps their inputs.
        self.takes_over = self.op.kernel_tile_tokens is not None
        self.grads = [
            None
            if x is None
            else torch.zeros(x.shape, dtype=wide, device=x.device)
            if index in self.op.whole
            else torch.empty(x.shape, dtype=wide if index in added else x.dtype, device=x.device)
            for index, x in enumerate(self.inputs)
        ]

    def _after(self, tile: Tile, dstate: Tensor | None) -> Tensor:
        """Gradient of the state after a tile, `dstate` where its document goes on."""
        if tile.closes is not None:
            return self.dfinal.get(tile.closes, self.identity)
        return self.identity if dstate is None else dstate

    def adjoint_summary(self, segment: Segment) -> Tensor:
        """Gradient of the state entering a segment as far as the segment alone causes it."""
        if not segment.enters:
            return self.identity
        dstate: Tensor | None = None
        for tile in reversed(segment.tiles[: segment.reach]):
            prepared, dstate = self.op.summarised_back(
                self._prepared(tile),
                self.states[id(tile)],
                tile.take(self.dout),
                self._after(tile, dstate),
            )
            self.kept.offer(tile, prepared)
        assert dstate is not None
        return dstate

    def ahead_back(self) -> None:
        """All that needs no gradient from other ranks."""
        for segment in self.segments:
            self._back(segment, 0, segment.asked, None)
            for tile in reversed(segment.tiles[segment.asked :]):
                prepared = self.op.backward_ahead(
                    self._prepared(tile), self.states[id(tile)], tile.take(self.dout)
                )
                if not self.kept.offer(tile, prepared):
                    break

    def complete_back(self, segment: Segment, dstate: Tensor) -> None:
        """The tiles that waited for the gradient of the state leaving their segment."""
        self._back(segment, segment.asked, len(segment.tiles), dstate)

    def backward_alone(self) -> None:
        """Adjoint of `forward_alone`."""
        dstate: Tensor | None = None
        for segment in sorted(self.segments, key=lambda one: one.start, reverse=True):
            dstate = self._back(segment, 0, len(segment.tiles), dstate)

    def _back(
        self, segment: Segment, first: int, last: int, dstate: Tensor | None
    ) -> Tensor | None:
        if self._idle:
            return self.identity
        for tile in reversed(segment.tiles[first:last]):
            found, dstate = self.op.backward(
                self._prepared(tile),
                self.states[id(tile)],
                tile.take(self.dout),
                self._after(tile, dstate),
            )
            self._add(tile, found)
            if tile.fresh and self.dinitial is not None:
                self.dinitial[:, tile.document] += dstate
        return dstate

    def _add(self, tile: Tile, found: Sequence[Tensor | None]) -> None:
        for index, (grad, part) in enumerate(zip(self.grads, found, strict=True)):
            if grad is None:
                continue
            assert part is not None
            if index in self.op.whole:
                grad += part
            elif self.takes_over and _is_all(tile, part, grad):
                self.grads[index] = part
            else:
                tile.put(grad, part.to(grad.dtype))

    def input_gradients(self) -> list[Tensor | None]:
        """The gradient of every input, in its dtype."""
        return [
            None if grad is None or x is None else grad.to(x.dtype)
            for grad, x in zip(self.grads, self.inputs, strict=True)
        ]


def _is_all(tile: Tile, part: Tensor, grad: Tensor) -> bool:
    """Whether a tile's part of a gradient is the gradient, as it would be put there."""
    alike = part.shape == grad.shape and part.dtype == grad.dtype and part.is_contiguous()
    return alike and not tile.reverse


def joined_transitions(kind: str, first: Tensor, second: Tensor | None) -> Tensor:
    """M of two runs of tokens, one after the other."""
    assert second is not None
    return second @ first if kind == "matrix" else first + second
