"""Block sizes of the delta rule's kernels: a pure function of dims, dtype, rows and target.

What limits them is the state in registers (float32, [keys, chain]), the operands of a chunk in
shared memory, and for float32 operands, which no tensor core multiplies, the registers of
products. Each was taken from the compiler's report (docs/kernels/compiled.md); none is timed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.launch import Config, target_of

MOST_KEY_DIMS = 256
# A Hopper card runs this many programs of four warps at twice one a multiprocessor.
PROGRAMS = 264


class Sizes(NamedTuple):
    """What a tile's tensors say."""

    batch: int
    tokens: int
    heads: int
    group: int  # value heads that share a key head
    key_dim: int
    value_dim: int

    @property
    def rows(self) -> int:
        return self.batch * self.heads


class Blocks(NamedTuple):
    """chunk: its tokens. keys, values: dims filled up to whole blocks. block: key and value dims
    of a block of the kernels that have no state (writes_values: value dims of
    `writes_kernel`, grads_keys: key dims of `keys_kernel`);
    chain, chain_keys: value and key dims of one that has."""

    chunk: int
    keys: int
    values: int
    block: int
    writes_values: int
    grads_keys: int
    chain: int
    chain_keys: int
    prepare: Config
    walk: Config
    writes: Config
    grads: Config

    @property
    def levels(self) -> int:
        """Halvings of a chunk."""
        return self.chunk.bit_length() - 1


def power_of_two(n: int) -> int:
    """The least one that is at least n and 16, the least side of a product."""
    return max(16, 1 << (n - 1).bit_length())


def sizes_of(k: Tensor, v: Tensor) -> Sizes:
    """Of keys [B,T,Hk,K] and values [B,T,H,V]."""
    batch, tokens, heads, width = v.shape
    return Sizes(batch, tokens, heads, max(1, heads // max(1, k.shape[2])), k.shape[3], width)


def blocks_of(
    size: Sizes,
    operand: torch.dtype,
    precision: str,
    device: torch.device,
    chunk: int,
    *,
    diagonal: bool,
) -> Blocks:
    """Blocks for products of `operand`, float32 ones in `precision`, on what `device` is."""
    hopper = target_of(device).capability >= 90
    wide = operand == torch.float32
    keys = power_of_two(size.key_dim)
    widest = min(64, power_of_two(size.value_dim))
    block = min(widest, keys, 32 if wide or diagonal else 64)
    chain = min(widest, 32)
    if not wide and keys <= 128 and size.rows * -(-size.value_dim // widest) >= PROGRAMS:
        chain = widest
    if wide and keys > 128:
        chain = 16
    side = max(block, chain)
    # A chunk takes less time than memory takes to answer: two more are under way where they fit.
    ahead = 3 if hopper and keys <= 128 and chain <= 32 else 2
    if wide or (keys > 128 and not hopper):
        ahead = 1
    plain = wide and precision == "ieee"
    return Blocks(
        chunk,
        keys,
        -(-size.value_dim // side) * side,
        block,
        min(block, 32),
        min(block, 16) if diagonal and not (wide or hopper) else block,
        chain,
        min(keys, 32) if plain else keys,
        # Tiles [64, 64] in float32 take half of the registers of four warps, and prepare has six.
        prepare=Config(4 if wide else 8, 1 if wide else 2),
        # Operands of products are held in registers, but for those of Hopper's tensor cores.
        walk=Config(4 if hopper and not wide else 8, ahead),
        writes=Config(4 if wide else 8, 1),
        grads=Config(8 if diagonal and not wide else 4, 1 if wide else 2),
    )
