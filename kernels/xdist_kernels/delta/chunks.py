"""Tokens cut into chunks, and the decays inside a chunk as products of factors at most 1.

Shapes: N = chunks * B * H, fused in that order, so that one chunk of all rows lies in one piece;
C = tokens of a chunk, a power of two; Kd = 1 for a decay per head, K for one per key dim.

A document that starts inside the tile is a decay of 0 at its first token: nothing earlier passes,
whatever the number of documents, and no quotient is ever formed that would forbid a zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


def chunk_size(n: int, chunk: int) -> int:
    """The chunk, halved while half of it already holds all n tokens; a power of two."""
    while chunk // 2 >= n:
        chunk //= 2
    return chunk


def to_chunks(x: Tensor, chunk: int, group: int = 1) -> Tensor:
    """[B,n,H,D] -> a [chunks,B,H*group,C,D] view or copy: the last chunk filled up with zeros,
    each head repeated for the `group` value heads that share it."""
    batch, n, heads, dim = x.shape
    if n % chunk:
        x = pad(x, (0, 0, 0, 0, 0, -n % chunk))
    x = x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4)
    if group == 1:
        return x
    shape = (x.shape[0], batch, heads, group, chunk, dim)
    return x.unsqueeze(3).expand(shape).reshape(*shape[:2], heads * group, chunk, dim)


def fused(x: Tensor, wide: torch.dtype) -> Tensor:
    """[chunks,B,H,C,D] -> [N,C,D] contiguous in the states' dtype."""
    # `to` leaves the strides alone where nothing is to be converted.
    return x.to(wide, memory_format=torch.contiguous_format).reshape(-1, *x.shape[3:]).contiguous()


def to_tokens(x: Tensor, batch: int, heads: int, n: int) -> Tensor:
    """[N,C,D] -> [B,n,H,D] contiguous, without the filling."""
    count, (chunk, dim) = -(-n // x.shape[1]), x.shape[1:]
    x = x.view(count, batch, heads, chunk, dim).permute(1, 0, 3, 2, 4)
    return x.reshape(batch, count * chunk, heads, dim)[:, :n]


class Decays(NamedTuple):
    """Decay factors of a tile."""

    token: Tensor  # [N, C, Kd] exp(log decay), 0 where a document starts
    since_start: Tensor  # [N, C, Kd] from the chunk's start up to the token, itself included
    until_end: Tensor  # [N, C, Kd] from the token, itself excluded, to the chunk's end
    within: Tensor | None  # [N, C, C] for Kd = 1: from key j to query i, 0 for j > i

    def whole(self) -> Tensor:
        """[N, Kd, 1]: over the whole chunk."""
        return self.since_start[:, -1, :, None]


class Level(NamedTuple):
    """One halving: blocks of 2 * half tokens, N * C / (2 * half) of them."""

    half: int
    query: Tensor  # [blocks, half, Kd] from the block's middle to tokens of its second half
    key: Tensor  # [blocks, half, Kd] from tokens of its first half to the middle


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """First and second halves of the blocks of x [N, C, D]: two [blocks, half, D] views."""
    blocks = x.view(-1, 2, half, x.shape[-1])
    return blocks[:, 0], blocks[:, 1]


def levels(token: Tensor, since: Tensor, until: Tensor) -> Iterator[Level]:
    """From blocks of two tokens to the whole chunk; afterwards `since` and `until` are those of
    `Decays`. Both are written: `since` starts as a copy of `token`, `until` as ones.

    A factor over two halves is the product of theirs: no quotient, no difference of long sums, so
    that any decay, 0 included, is exact. Use each level before the next is made.
    """
    half = 1
    while half < token.shape[1]:
        early, late = halves(since, half)
        key = halves(until, half)[0]
        yield Level(half, late, key)
        through = late[:, -1:].clone()
        late *= early[:, -1:]
        key *= through
        half *= 2


def block_of(scores: Tensor, half: int) -> Tensor:
    """What a level's second halves see of its first ones: a view of scores [.., C, C], as
    [.., C / (2 * half), half, half]."""
    chunk = scores.shape[-1]
    blocks = scores.unflatten(-2, (-1, 2, half)).unflatten(-1, (chunk // (2 * half), 2, half))
    return blocks[..., :, 1, :, :, 0, :].diagonal(0, -4, -2).movedim(-1, -3)


def scalar_decays(token: Tensor) -> Decays:
    """Decays of one factor a token [N, C, 1]."""
    since, until = token.clone(), torch.ones_like(token)
    chunk = token.shape[1]
    within = token.new_zeros(token.shape[0], chunk, chunk)
    within.diagonal(0, 1, 2).fill_(1.0)
    for level in levels(token, since, until):
        count = chunk // (2 * level.half)
        between = (level.query * level.key.mT).view(-1, count, level.half, level.half)
        block_of(within, level.half).copy_(between)
    return Decays(token, since, until, within)
