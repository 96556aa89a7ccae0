"""Tiles of a rank's tokens with the tokens before them: the unit of every streamed layer.

A rank holds segments one after another in one local tensor [B, n, ...]. A tile is a run of a few
thousand tokens of ONE segment. A layer that looks back reads it with `context` tokens on its left:
tokens of the same segment, then the halo (received once per layer), then zeros before the
sequence starts. The adjoint, `add_context`, gives gradients of the context back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from xdist.documents import Documents


@dataclass(frozen=True)
class Tile:
    """Local tokens [start, stop) of segment `segment`, `offset` tokens after its beginning.

    `position` is the global position of the first token.
    """

    segment: int
    start: int
    stop: int
    position: int
    offset: int

    @property
    def tokens(self) -> int:
        """Tokens of the tile in one row of the batch."""
        return self.stop - self.start


@lru_cache(maxsize=64)
def tiles_of(segments: tuple[tuple[int, int], ...], tokens: int) -> tuple[tuple[Tile, ...], ...]:
    """The tiles of each local segment, in position order inside it; empty segments have none.

    segments: `layout.segments(rank)` as a tuple; tokens: the most tokens of a tile.
    """
    found = []
    local = 0
    for index, (start, stop) in enumerate(segments):
        tiles = []
        for position in range(start, stop, tokens):
            offset = position - start
            end = min(position + tokens, stop)
            tiles.append(Tile(index, local + offset, local + end - start, position, offset))
        found.append(tuple(tiles))
        local += stop - start
    return tuple(found)


def with_context(x: Tensor, halo: Sequence[Tensor], tile: Tile, context: int) -> Tensor:
    """The tile of x [B, n, ...] with `context` tokens before it, [B, context + tokens, ...].

    halo: for each segment the tokens before it, [B, m, ...] with m <= context.
    """
    own = min(context, tile.offset)
    inside = x[:, tile.start - own : tile.stop]
    if own == context:
        return inside
    before = halo[tile.segment]
    before = before[:, max(0, before.shape[1] - (context - own)) :]
    missing = context - own - before.shape[1]
    zeros = x.new_zeros(x.shape[0], missing, *x.shape[2:])
    return torch.cat([zeros, before, inside], 1)


def add_context(
    dx: Tensor, dhalo: Sequence[Tensor], tile: Tile, context: int, gradient: Tensor
) -> None:
    """Adds the gradient of a tile's context, [B, context, ...], to dx and the halo's gradient."""
    own = min(context, tile.offset)
    if own:
        dx[:, tile.start - own : tile.start] += gradient[:, context - own :]
    if own < context:
        target = dhalo[tile.segment]
        width = min(context - own, target.shape[1])
        if width:
            stop = context - own
            target[:, target.shape[1] - width :] += gradient[:, stop - width : stop]


@dataclass(frozen=True)
class Cuts:
    """Where documents start in and just before a tile of T tokens.

    starts: bool [T], True at the first token of a document (None: no state has to be dropped).
    since: int64 [T], how many tokens of the same document precede each token; None when at least
    `context` precede every token.
    """

    starts: Tensor | None
    since: Tensor | None


def cuts_of(tile: Tile, documents: Documents, context: int, device: torch.device) -> Cuts:
    """The cuts that matter to a tile read with `context` tokens before it, on `device`."""
    first = int(documents.starts(tile.position + tile.tokens - 1))
    if first <= tile.position - context or (first == 0 and context == 0):
        return Cuts(None, None)
    positions = np.arange(tile.position, tile.position + tile.tokens)
    since = torch.from_numpy(positions - documents.starts(positions))
    near = bool((since < context).any())
    begins = since == 0
    starts = begins.to(device) if first > 0 and bool(begins.any()) else None
    return Cuts(starts, since.to(device) if near else None)
