"""A tile cut into blocks of rows (batch x heads), and put together again.

Shapes: q, k [B,T,Hk,K], v [B,T,H,V], states [B,H,K,V]; a block has h value heads of b rows of the
batch, and in the shapes of chunks.py rows = b*h.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.linear.chunks import DocumentIds, group_size, state_dtype

CHUNK_TOKENS = 64
# Rows (batch x heads) computed at once: enough for the matrix products, small enough for a cache.
BLOCK_ROWS = 8
# Of short rows as many as have this many chunks together.
BLOCK_CHUNKS = 256


class Half(NamedTuple):
    """A block's backward pass as far as the gradient of the state after it plays no part."""

    q: Tensor  # [R, C, K]
    k: Tensor  # [R, C, K]
    v: Tensor  # [R, C, V]
    dq: Tensor  # [R, C, K], complete
    dk: Tensor  # [R, C, K], of outputs in the same chunk
    dv: Tensor  # [R, C, V], of outputs in the same chunk
    states: Tensor  # [rows, chunks + 1, K, V] at every border
    asked: Tensor  # [rows, chunks, K, V]: gradients of the states by each chunk's own outputs


class Block(NamedTuple):
    """Some rows of a tile: views of the inputs, decays, and what was computed ahead."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None  # [R, C, 1 or K] log decay to base 2; c below: cumulative inside a chunk
    since_start: Tensor | None  # exp(c_i), zero after a document starts in the chunk
    until_end: Tensor | None  # exp(c_C - c_i), zero before the chunk's last document
    borders: Tensor  # [rows, 1 or K, chunks + 1, chunks + 1] T above, in the states' dtype
    ids: DocumentIds | None
    inner: Tensor | None = None  # [R, C, V] outputs inside the chunk, without scale
    entries: Tensor | None = None  # [rows, chunks, K, V] E above
    half: Half | None = None

    @property
    def chunk(self) -> int:
        return chunk_size(self.v.shape[1])


class Prepared(NamedTuple):
    """A tile without its state: the inputs, and the same cut into blocks of rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    scale: float
    blocks: tuple[Block, ...]

    def slices(self) -> list[tuple[slice, slice, slice]]:
        """(batch, value heads, key heads) of each block."""
        batch, tokens, heads, _ = self.v.shape
        return head_blocks(batch, heads, group_size(self.k, self.v), tokens)


def chunk_size(n: int) -> int:
    """The chunk, halved while half of it already holds all n tokens; a power of two."""
    chunk = CHUNK_TOKENS
    while chunk // 2 >= n:
        chunk //= 2
    return chunk


def head_blocks(
    batch: int, heads: int, group: int, tokens: int
) -> list[tuple[slice, slice, slice]]:
    """(batch, value heads, key heads) slices of at most BLOCK_ROWS rows, or BLOCK_CHUNKS chunks of
    `tokens` tokens a row, or one group of heads."""
    if not batch * heads:
        return []
    width = max(group, min(heads, BLOCK_ROWS) // group * group)
    chunks = -(-max(tokens, 1) // chunk_size(max(tokens, 1)))
    deep = max(1, max(BLOCK_ROWS, BLOCK_CHUNKS // chunks) // width)
    return [
        (
            slice(b, min(b + deep, batch)),
            slice(h, min(h + width, heads)),
            slice(h // group, min(h + width, heads) // group),
        )
        for b in range(0, batch, deep)
        for h in range(0, heads, width)
    ]


def each(p: Prepared, state: Tensor) -> list[Tensor]:
    """The part [b,h,K,V] of `state` that belongs to each block."""
    return [state[rows, own] for rows, own, _ in p.slices()]


def each_dout(p: Prepared, dout: Tensor) -> list[Tensor]:
    """The same of dout [B,T,H,V], in the inputs' dtype."""
    return [dout[rows, :, own].to(p.q.dtype) for rows, own, _ in p.slices()]


def joined_states(parts: list[Tensor], p: Prepared) -> Tensor:
    """[B,H,K,V] of the blocks' states."""
    batch, _, heads, width = p.v.shape
    shape = (batch, heads, p.k.shape[3], width)
    if len(parts) == 1:
        return parts[0].reshape(shape)
    found = p.v.new_empty(shape, dtype=state_dtype(p.v))
    for whole, part in zip(each(p, found), parts, strict=True):
        whole.copy_(part.reshape(whole.shape))
    return found


def joined_tokens(parts: list[Tensor], p: Prepared, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The blocks' [b,T,h,D] as one tensor of the shape of `like`, an input."""
    if len(parts) == 1:
        return parts[0].to(dtype)
    found = torch.empty(like.shape, dtype=dtype, device=like.device)
    by_key = like is p.q or like is p.k
    for (rows, own, shared), part in zip(p.slices(), parts, strict=True):
        found[rows, :, shared if by_key else own] = part
    return found
