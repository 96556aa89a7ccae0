"""Random numbers by counter: the n-th draw of sample i is a function of (seed, stream, i, n) alone.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3"),
over whole arrays: integers only, so every machine gets the same ones, in any order and any parts.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xdist.errors import ConfigError

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

Words = NDArray[np.uint64]  # each below 2^32


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, ...]:
    """Four words of 32 bits for each counter of four; all of one shape."""
    a, b, c, d = counter
    for number in range(_ROUNDS):
        k0 = np.uint64((key[0] + number * _WEYL[0]) & 0xFFFFFFFF)
        k1 = np.uint64((key[1] + number * _WEYL[1]) & 0xFFFFFFFF)
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b = (second >> _HALF) ^ b ^ k0, second & _LOW
        c, d = (first >> _HALF) ^ d ^ k1, first & _LOW
    return a, b, c, d


def draws(seed: int, stream: int, samples: NDArray[np.int64], count: int) -> Words:
    """`count` words of 32 bits for each sample: uint64 [samples, count].

    seed: 0 <= seed < 2^64. stream: which use of the seed this is, 0 <= stream < 2^32; samples:
    int64 [m], their numbers.

    Raises:
        ConfigError: a seed that does not fit 64 bits.
    """
    if not 0 <= seed < 1 << 64:
        raise ConfigError("a seed has 64 bits", f"got {seed}", "choose 0 <= seed < 2^64")
    blocks = -(-count // 4)
    shape = (samples.size, blocks)
    number = samples.astype(np.uint64)[:, None]
    block = np.broadcast_to(np.arange(blocks, dtype=np.uint64), shape)
    low = np.broadcast_to(number & _LOW, shape)
    high = np.broadcast_to(number >> _HALF, shape)
    kind = np.full(shape, stream, dtype=np.uint64)
    words = philox((block, low, high, kind), (seed & 0xFFFFFFFF, seed >> 32))
    return np.stack(words, axis=-1).reshape(samples.size, 4 * blocks)[:, :count]


def below(words: Words, size: int) -> NDArray[np.int64]:
    """Each word as a number in [0, size), size < 2^32; no value is likelier than another by more
    than size / 2^32."""
    return ((words * np.uint64(size)) >> _HALF).astype(np.int64)


def orders(words: Words) -> NDArray[np.int64]:
    """Each row as a permutation of its columns: the order of its words, ties by column."""
    return np.argsort(words, axis=-1, kind="stable").astype(np.int64)
