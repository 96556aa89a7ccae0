"""The exchange under strategy switch: tokens of all heads <-> heads of all tokens.

Each input has its own shares of dim 2: value heads split as `tensor_split`, key heads the ranges
that a rank's value heads use (these may overlap: a key head then goes to several ranks, once to
each). All tensors of one direction travel in one exchange, as bytes, in their own dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xdist.comm.collectives import ProcessGroup, start_pairs
from xdist.comm.gather import start_gather, start_reduce_scatter
from xdist.comm.switch import pack, packed_spec, unpack
from xdist.cost.recurrent import Shares
from xdist.layout import Layout

Specs = list[tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class HeadExchange:
    """Who holds which tokens; `layout` has the group's ranks, `rank` is this one."""

    layout: Layout
    rank: int
    group: ProcessGroup | None

    def _specs(
        self, tensors: Sequence[Tensor], shares: Sequence[Shares], tokens_of: int, heads_of: int
    ) -> Specs:
        """Shapes and dtypes of the tokens of one rank and the heads of another."""
        n = self.layout.local_length(tokens_of)
        return [
            ((x.shape[0], n, share[heads_of][1] - share[heads_of][0], x.shape[3]), x.dtype)
            for x, share in zip(tensors, shares, strict=True)
        ]

    def to_heads(self, tensors: Sequence[Tensor], shares: Sequence[Shares]) -> list[Tensor]:
        """[B, n, H_i, D_i] of this rank's tokens -> [B, N, h_i, D_i] of its heads, by position."""
        peers = range(self.layout.parts)
        sends, receives = {}, {}
        for peer in peers:
            parts = [x[:, :, slice(*s[peer])] for x, s in zip(tensors, shares, strict=True)]
            sends[peer] = pack(parts)
            receives[peer] = packed_spec(self._specs(tensors, shares, peer, self.rank))
        received = start_pairs(sends, receives, self.group, move="switch").wait()
        whole = []
        for x, share in zip(tensors, shares, strict=True):
            start, stop = share[self.rank]
            whole.append(x.new_empty(x.shape[0], self.layout.length, stop - start, x.shape[3]))
        for peer in peers:
            blocks = unpack(received[peer], self._specs(tensors, shares, peer, self.rank))
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
            sends[peer] = pack(parts)
            receives[peer] = packed_spec(self._specs(tensors, shares, self.rank, peer))
        received = start_pairs(sends, receives, self.group, move="switch").wait()
        n = self.layout.local_length(self.rank)
        found = [
            x.new_zeros(x.shape[0], n, count, x.shape[3])
            for x, count in zip(tensors, heads, strict=True)
        ]
        for peer in peers:
            blocks = unpack(received[peer], self._specs(tensors, shares, self.rank, peer))
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
