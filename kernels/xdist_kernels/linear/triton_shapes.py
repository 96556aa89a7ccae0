"""Block sizes, warps and stages of the Triton kernels, from dims, dtype and target alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.launch import Config, Target

# Tokens of a chunk at most: rows of the matrix products inside it. Spans are multiples of it.
CHUNK_TOKENS = 64
# Tokens of a span, whose states are kept while a tile is worked on: at least, and at most where
# gradients of decays are summed along it (rounding piles up with its length).
LEAST_SPAN_TOKENS, GATED_SPAN_TOKENS = 256, 512
# Programs that keep a large card busy: four on each of 132 multiprocessors.
WANTED_PROGRAMS = 4 * 132
LARGEST_DIM = 256


class Blocks(NamedTuple):
    """Of one kernel: the two dims of its state padded and cut, and how it is started."""

    first: int
    second: int
    config: Config


def padded(dim: int) -> int:
    """The least power of two that holds `dim` and that a matrix instruction takes."""
    return max(16, 1 << (dim - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def precision(x: Tensor) -> str:
    """Of products of x: float32 is multiplied as such, never as TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def chunk_tokens(x: Tensor, largest_dim: int) -> int:
    """Tokens of a chunk of x; largest_dim: of keys and values.

    Products in full float32 are spelled out, instruction by instruction: large ones would take
    minutes to compile and live in local memory.
    """
    if x.dtype != torch.float32:
        return CHUNK_TOKENS
    return 32 if largest_dim <= 64 else 16


def span_tokens(tokens: int, rows: int, blocks: int, *, gated: bool = False) -> int:
    """Tokens that one program goes through in order; a multiple of CHUNK_TOKENS.

    rows: batch x heads; blocks: programs that share a row's span. Long spans keep few states,
    short ones make enough programs.
    """
    span = cdiv(max(tokens, 1), CHUNK_TOKENS) * CHUNK_TOKENS
    if gated and span > GATED_SPAN_TOKENS:
        span = GATED_SPAN_TOKENS
    while span > LEAST_SPAN_TOKENS and rows * blocks * cdiv(tokens, span) < WANTED_PROGRAMS:
        span = max(LEAST_SPAN_TOKENS, cdiv(span // 2, CHUNK_TOKENS) * CHUNK_TOKENS)
    return span


def _stages(x: Tensor, block_bytes: int, fixed_bytes: int, target: Target) -> int:
    """Two where two programs then still fit on a multiprocessor, or one program with room left.

    Spelled-out products read operands of two stages by way of local memory.
    """
    if x.dtype == torch.float32:
        return 1
    return 2 if 2 * block_bytes + fixed_bytes <= target.shared_bytes * 2 // 3 else 1


def sum_blocks(
    first: int, second: int, x: Tensor, target: Target, *, accumulators: int = 1
) -> Blocks:
    """Of `sum_spans` and `sum_both`: sums of outer products [first, second]."""
    width, chunk = x.element_size(), chunk_tokens(x, max(first, second))
    most = 64 if width == 4 else 128
    one, two = min(padded(first), most // accumulators), min(padded(second), 64)
    loaded = chunk * (one + two) * width
    warps = 8 if width == 4 else 4 if one * two >= 2048 else 2
    return Blocks(one, two, Config(warps, _stages(x, loaded, loaded, target)))


def scan_blocks(first: int, second: int, x: Tensor, target: Target) -> Blocks:
    """Of `scan_spans` and `scan_both`: a state [all of first, a block of second]."""
    width, chunk = x.element_size(), chunk_tokens(x, max(first, second))
    one = padded(first)
    most = 16 if width == 4 and one > 128 else 32 if width == 4 or one > 128 else 64
    two = min(padded(second), most)
    loaded = chunk * (2 * one + two) * width
    fixed = (one * two + chunk * chunk + chunk * two) * width
    warps = 8 if width == 4 or one > 128 else 4 if one * two >= 2048 else 2
    return Blocks(one, two, Config(warps, _stages(x, loaded, fixed, target)))


def key_blocks(first: int, x: Tensor) -> Blocks:
    """Of `weigh_chunks`: key dims at once."""
    one = min(padded(first), 32 if x.dtype == torch.float32 else 64)
    return Blocks(one, one, Config(4, 1))


def gradient_blocks(first: int, second: int, x: Tensor) -> Blocks:
    """Of `gradients_of_keys`: a state [a block of first, all of second]."""
    two = padded(second)
    one = min(padded(first), 64 >> int(x.dtype == torch.float32) >> int(two > 128))
    return Blocks(one, two, Config(8 if one * two >= 4096 else 4, 1))
