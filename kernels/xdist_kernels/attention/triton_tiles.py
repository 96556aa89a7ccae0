"""Block sizes, warps and stages of the attention kernels: pure functions of dims, dtype and target.

Widths are the head dims padded to powers of two. What bounds a choice:
    shared memory   the block that stays (q; q and dO; k and v) and `stages` of those that stream,
                    within Target.shared_bytes with 2 KiB left for what the compiler adds
    registers       float32 accumulators and one block of scores, 255 a thread
    compile time    float32 products without tensor cores are written out in full: few a thread
Choices are by width; docs/kernels/compiled.md lists what they compile to.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from xdist_kernels.launch import Config, Target


class Tile(NamedTuple):
    """A block of `rows` queries meets blocks of `keys` keys."""

    rows: int
    keys: int
    config: Config


def padded(dim: int) -> int:
    """The least power of two that holds `dim` and that a matrix product takes."""
    return max(16, 1 << (dim - 1).bit_length()) if dim > 0 else 16


def forward_tile(
    dim: int, value_dim: int, dtype: torch.dtype, target: Target, precision: str = "ieee"
) -> Tile:
    """rows stay, keys stream."""
    width = max(padded(dim), padded(value_dim))
    large = target.capability >= 90
    if dtype == torch.float32:
        if precision == "tf32x3" and width <= 128:
            return Tile(64, 32, Config(4, 2))
        return _by_width(width, (64, 32, 8, 2), (32, 16, 8, 1), (16, 32, 8, 1))
    wide = (128, 64, 8, 2) if large else (64, 32, 8, 2)
    narrow = (128, 64, 4, 3) if large else (128, 64, 8, 2)
    return _by_width(width, narrow, (128, 64, 8, 3 if large else 2), wide)


def dq_tile(
    dim: int, value_dim: int, dtype: torch.dtype, target: Target, precision: str = "ieee"
) -> Tile:
    """rows of q and dO stay, keys stream."""
    width = max(padded(dim), padded(value_dim))
    large = target.capability >= 90
    if dtype == torch.float32:
        if precision == "tf32x3" and width <= 128:
            return Tile(64 if width <= 64 else 32, 32, Config(8, 1))
        return _by_width(width, (32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1))
    wide = (64, 64, 8, 2) if large else (64, 32, 8, 1)
    return _by_width(width, (128, 64, 8, 3 if large else 2), (128, 64, 8, 2), wide)


def dkdv_tile(
    dim: int, value_dim: int, dtype: torch.dtype, target: Target, precision: str = "ieee"
) -> Tile:
    """keys stay, with two accumulators; rows of q and dO stream."""
    width = max(padded(dim), padded(value_dim))
    large = target.capability >= 90
    if dtype == torch.float32:
        if precision == "tf32x3" and width <= 128:
            return Tile(32, 64 if width <= 64 else 32, Config(8, 1))
        return _by_width(width, (32, 32, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1))
    narrow = (64, 128, 8, 3 if large else 2)
    middle = (64, 128, 8, 2) if large else (32, 128, 8, 2)
    return _by_width(width, narrow, middle, (32, 64, 8, 2 if large else 1))


_Sizes = tuple[int, int, int, int]


def _by_width(width: int, to_64: _Sizes, to_128: _Sizes, wider: _Sizes) -> Tile:
    rows, keys, warps, stages = to_64 if width <= 64 else to_128 if width <= 128 else wider
    return Tile(rows, keys, Config(warps, stages))


def delta_rows(value_dim: int) -> int:
    """Rows of a program of the delta kernel: about 8 Ki elements."""
    return max(16, 8192 // padded(value_dim))


def head_parts(programs: int, per_group: int, processors: int = 132) -> int:
    """In how many parts the query heads of a key head are taken where `programs` fill no card.

    The least divisor of `per_group` that gives each multiprocessor a program, else `per_group`.
    """
    if programs == 0:
        return 1
    for parts in range(1, per_group):
        if per_group % parts == 0 and programs * parts >= processors:
            return parts
    return max(1, per_group)
