"""Layers streamed over a rank's tokens in tiles, forward and backward, with their exchanges.

A streamed layer is an object with explicit passes over tiles (nn/linear_pass.py,
nn/attention_pass.py). The sweeps here own everything between the tiles: the context before a tile,
the state from tile to tile, and the two exchanges of a layer - the halo of its input and, for a
recurrence, the scan of its state. Between two exchanges a rank never waits:

    forward   halo -> sweep of summaries (no outputs) -> scan -> sweep of outputs
    backward  sweep of outer halves (output to y) -> adjoint scan -> sweep of inner halves, last
              tile first -> adjoint halo

What is kept for backward: the layer's input x, its halo and the state before each tile. So a
backward pass recomputes every tile and repeats no exchange. Gradients overwrite the buffer of the
output's gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from xdist.comm.scan import Scan
from xdist.memory.allocator import stream_like
from xdist.memory.exchange import Exchange
from xdist.memory.tiles import Cuts, Tile, add_context, cuts_of, with_context


class Looking(Protocol):
    """Anything that reads `context` tokens before a tile."""

    @property
    def context(self) -> int: ...


class Windowed(Looking, Protocol):
    """A layer whose output at t reads x in [t - context, t]."""

    def forward(self, xe: Tensor, cuts: Cuts) -> Tensor: ...

    def backward(self, xe: Tensor, cuts: Cuts, dout: Tensor) -> Tensor: ...


class Recurrent(Looking, Protocol):
    """A layer with a state that is affine in the state before it (scalar decay per head)."""

    def zero_state(self, x: Tensor) -> Tensor: ...

    def summary(
        self, xe: Tensor, cuts: Cuts, state: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]: ...

    def forward(self, xe: Tensor, cuts: Cuts, state: Tensor) -> tuple[Tensor, Tensor]: ...

    def backward_outer(
        self, xe: Tensor, cuts: Cuts, state: Tensor, dout: Tensor, dstate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Any]: ...

    def backward_inner(
        self, xe: Tensor, cuts: Cuts, state: Tensor, dy: Tensor, dstate: Tensor, inputs: Any
    ) -> tuple[Tensor, Tensor]: ...


@dataclass
class Kept:
    """What a layer keeps from forward to backward besides its input."""

    halo: list[Tensor]
    states: dict[Tile, Tensor]
    scan: Scan | None = None


class Sweep:
    """The tiles of one batch on this rank, and the exchanges of its layers."""

    def __init__(self, exchange: Exchange, tiles: Sequence[Sequence[Tile]]) -> None:
        self.exchange = exchange
        self.segments = tiles
        self._cuts: dict[tuple[Tile, int], Cuts] = {}

    def read(
        self, layer: Looking, x: Tensor, halo: Sequence[Tensor], tile: Tile
    ) -> tuple[Tensor, Cuts]:
        """The tile of x with the layer's context before it, and the document starts in it."""
        key = (tile, layer.context)
        if key not in self._cuts:
            self._cuts[key] = cuts_of(tile, self.exchange.documents, layer.context, x.device)
        return with_context(x, halo, tile, layer.context), self._cuts[key]

    def windowed_forward(self, layer: Windowed, x: Tensor) -> tuple[Tensor, Kept]:
        """Output of a windowed layer for x [B, n, C]."""
        halo = self.exchange.halo(x, layer.context)
        out = stream_like(x)
        for tiles in self.segments:
            for tile in tiles:
                out[:, tile.start : tile.stop] = layer.forward(*self.read(layer, x, halo, tile))
        return out, Kept(halo, {})

    def windowed_backward(self, layer: Windowed, x: Tensor, kept: Kept, dx: Tensor) -> None:
        """dx holds the gradient of the output and becomes that of x."""
        dhalo = [torch.zeros_like(part) for part in kept.halo]
        # First tile first: a context then lies in tiles whose dx is no longer an output's gradient.
        for tiles in self.segments:
            for tile in tiles:
                own = dx[:, tile.start : tile.stop]
                dxe = layer.backward(*self.read(layer, x, kept.halo, tile), own)
                own.copy_(dxe[:, layer.context :])
                add_context(dx, dhalo, tile, layer.context, dxe[:, : layer.context])
        self.exchange.halo_adjoint(dx, dhalo, layer.context)

    def recurrent_forward(self, layer: Recurrent, x: Tensor) -> tuple[Tensor, Kept]:
        """Output of a recurrent layer for x [B, n, C]."""
        halo = self.exchange.halo(x, layer.context)
        incoming, scan = self._incoming(layer, x, halo)
        out = stream_like(x)
        states: dict[Tile, Tensor] = {}
        for tiles, state in zip(self.segments, incoming, strict=True):
            for tile in tiles:
                states[tile] = state
                xe, cuts = self.read(layer, x, halo, tile)
                out[:, tile.start : tile.stop], state = layer.forward(xe, cuts, state)
        return out, Kept(halo, states, scan)

    def _incoming(
        self, layer: Recurrent, x: Tensor, halo: Sequence[Tensor]
    ) -> tuple[list[Tensor], Scan | None]:
        """The state before each local segment, and the scan that brought it."""
        zero = layer.zero_state(x)
        totals = [zero.new_zeros(zero.shape[:2]) for _ in self.segments]
        ends = [zero for _ in self.segments]
        if not self.exchange.scans:
            return ends, None
        for index, tiles in enumerate(self.segments):
            if self.exchange.leaves(index):
                for tile in tiles:
                    ends[index], totals[index] = layer.summary(
                        *self.read(layer, x, halo, tile), ends[index], totals[index]
                    )
        scan = self.exchange.scan()
        return scan.start(ends, totals, zero).wait(), scan

    def recurrent_backward(self, layer: Recurrent, x: Tensor, kept: Kept, dx: Tensor) -> None:
        """dx holds the gradient of the output and becomes that of x."""
        zero = layer.zero_state(x)
        dhalo = [torch.zeros_like(part) for part in kept.halo]
        if kept.scan is None:
            for tiles in self.segments:
                self._one_phase(layer, x, kept, dx, dhalo, tiles, zero)
        else:
            self._two_phases(layer, x, kept, kept.scan, dx, dhalo, zero)
        self.exchange.halo_adjoint(dx, dhalo, layer.context)

    def _one_phase(
        self,
        layer: Recurrent,
        x: Tensor,
        kept: Kept,
        dx: Tensor,
        dhalo: list[Tensor],
        tiles: Sequence[Tile],
        dstate: Tensor,
    ) -> None:
        """Both halves of a tile together, for a state that crosses no other rank or segment."""
        later: tuple[Tile, Tensor] | None = None
        for tile in reversed(tiles):
            own = dx[:, tile.start : tile.stop]
            xe, cuts = self.read(layer, x, kept.halo, tile)
            part, dy, _, inputs = layer.backward_outer(xe, cuts, kept.states[tile], own, None)
            dxe, dstate = layer.backward_inner(xe, cuts, kept.states[tile], dy, dstate, inputs)
            torch.add(part, dxe[:, layer.context :], out=own)
            # Only now does dx hold this tile's gradient, to which the later tile's context adds.
            if later is not None:
                add_context(dx, dhalo, later[0], layer.context, later[1])
            later = tile, dxe[:, : layer.context]
        if later is not None:
            add_context(dx, dhalo, later[0], layer.context, later[1])

    def _two_phases(
        self,
        layer: Recurrent,
        x: Tensor,
        kept: Kept,
        scan: Scan,
        dx: Tensor,
        dhalo: list[Tensor],
        zero: Tensor,
    ) -> None:
        dy = stream_like(x)
        starts = [zero for _ in self.segments]
        for index, tiles in enumerate(self.segments):
            for tile in reversed(tiles):
                own = slice(tile.start, tile.stop)
                xe, cuts = self.read(layer, x, kept.halo, tile)
                dx[:, own], dy[:, own], adjoint, _ = layer.backward_outer(
                    xe, cuts, kept.states[tile], dx[:, own], starts[index]
                )
                assert adjoint is not None
                starts[index] = adjoint
        outgoing = scan.start_adjoint(starts, zero).wait()
        for tiles, dstate in zip(self.segments, outgoing, strict=True):
            for tile in reversed(tiles):
                own = slice(tile.start, tile.stop)
                xe, cuts = self.read(layer, x, kept.halo, tile)
                dxe, dstate = layer.backward_inner(
                    xe, cuts, kept.states[tile], dy[:, own], dstate, None
                )
                dx[:, own] += dxe[:, layer.context :]
                add_context(dx, dhalo, tile, layer.context, dxe[:, : layer.context])
