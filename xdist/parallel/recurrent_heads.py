"""The exchange under strategy switch: tokens of all heads <-> heads of all tokens.

Each input has its own shares of dim 2: value heads split as `tensor_split`, key heads the ranges
that a rank's value heads use (these may overlap: a key head then goes to several ranks, once to
each). All tensors of one direction travel in one exchange, as bytes, in their own dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from xdist.comm import start_exchange, start_gather, start_reduce_scatter
from xdist.comm.collectives import ProcessGroup
from xdist.cost.recurrent import Shares
from xdist.layout import Layout


@dataclass(frozen=True)
class _Packing:
    """Several tensors of known shapes and dtypes as one run of bytes, widest dtype first."""

    shapes: list[tuple[int, ...]]
    dtypes: list[torch.dtype]

    @property
    def _order(self) -> list[int]:
        return sorted(range(len(self.dtypes)), key=lambda i: (-self.dtypes[i].itemsize, i))

    @property
    def received(self) -> tuple[tuple[int], torch.dtype]:
        """Shape and dtype of the packed bytes."""
        sizes = [prod(s) * d.itemsize for s, d in zip(self.shapes, self.dtypes, strict=True)]
        return (sum(sizes),), torch.uint8

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([tensors[i].contiguous().view(-1).view(torch.uint8) for i in self._order])

    def unpack(self, packed: Tensor) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        start = 0
        for i in self._order:
            stop = start + prod(self.shapes[i]) * self.dtypes[i].itemsize
            found[i] = packed[start:stop].view(self.dtypes[i]).view(self.shapes[i])
            start = stop
        return [found[i] for i in range(len(self.shapes))]


@dataclass(frozen=True)
class HeadExchange:
    """Who holds which tokens; `layout` has the group's ranks, `rank` is this one."""

    layout: Layout
    rank: int
    group: ProcessGroup | None

    def _packing(
        self, tensors: Sequence[Tensor], shares: Sequence[Shares], tokens_of: int, heads_of: int
    ) -> _Packing:
        """The tokens of one rank, the heads of another."""
        n = self.layout.local_length(tokens_of)
        widths = [share[heads_of][1] - share[heads_of][0] for share in shares]
        shapes = [
            (x.shape[0], n, width, x.shape[3]) for x, width in zip(tensors, widths, strict=True)
        ]
        return _Packing(shapes, [x.dtype for x in tensors])

    def to_heads(self, tensors: Sequence[Tensor], shares: Sequence[Shares]) -> list[Tensor]:
        """[B, n, H_i, D_i] of this rank's tokens -> [B, N, h_i, D_i] of its heads, by position."""
        peers = range(self.layout.parts)
        sends, receives = {}, {}
        for peer in peers:
            parts = [x[:, :, slice(*s[peer])] for x, s in zip(tensors, shares, strict=True)]
            sends[peer] = self._packing(tensors, shares, self.rank, peer).pack(parts)
            receives[peer] = self._packing(tensors, shares, peer, self.rank).received
        received = start_exchange(sends, receives, self.group, move="switch").wait()
        whole = []
        for x, share in zip(tensors, shares, strict=True):
            start, stop = share[self.rank]
            whole.append(x.new_empty(x.shape[0], self.layout.length, stop - start, x.shape[3]))
        for peer in peers:
            packing = self._packing(tensors, shares, peer, self.rank)
            blocks = packing.unpack(received[peer])
            for piece in self.layout.pieces_of(peer):
                end = piece.offset + piece.stop - piece.start
                for y, block in zip(whole, blocks, strict=True):
                    y[:, piece.start : piece.stop] = block[:, piece.offset : end]
        return whole

    def to_tokens(
        self, tensors: Sequence[Tensor], shares: Sequence[Shares], heads: Sequence[int]
    ) -> list[Tensor]:
        """[B, N, h_i, D_i] of this rank's heads -> [B, n, heads_i, D_i] of its tokens.

        Adjoint of `to_heads`: where shares overlap the ranks' parts are added in rank order, and
        the caller passes float32 or wider.
        """
        peers = range(self.layout.parts)
        sends, receives = {}, {}
        for peer in peers:
            runs = self.layout.segments(peer)
            parts = [torch.cat([x[:, :0], *(x[:, a:b] for a, b in runs)], 1) for x in tensors]
            sends[peer] = self._packing(tensors, shares, peer, self.rank).pack(parts)
            receives[peer] = self._packing(tensors, shares, self.rank, peer).received
        received = start_exchange(sends, receives, self.group, move="switch").wait()
        n = self.layout.local_length(self.rank)
        found = [
            x.new_zeros(x.shape[0], n, count, x.shape[3])
            for x, count in zip(tensors, heads, strict=True)
        ]
        for peer in peers:
            packing = self._packing(tensors, shares, self.rank, peer)
            blocks = packing.unpack(received[peer])
            for y, share, block in zip(found, shares, blocks, strict=True):
                y[:, :, slice(*share[peer])] += block
        return found

    def gather_states(self, states: Tensor, shares: Shares) -> Tensor:
        """[B, documents, h, ...] of this rank's heads -> of all heads, valid on every rank."""
        sizes = [b - a for a, b in shares]
        return start_gather(states.contiguous(), self.group, dim=2, sizes=sizes).wait()

    def scatter_states(self, dstates: Tensor, shares: Shares) -> Tensor:
        """Adjoint of `gather_states`: this rank's heads of the sum over ranks."""
        sizes = [b - a for a, b in shares]
        summed = start_reduce_scatter(dstates.contiguous(), self.group, dim=2, sizes=sizes)
        return summed.wait()
