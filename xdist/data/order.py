"""The order of samples: a pure function of (seed, sample cursor), whatever the number of ranks.

An epoch over `store_length` tokens in samples of `sequence_length` is `store_length //
sequence_length` aligned windows, each drawn once, in a permutation of their own. The windows of an
epoch start at a phase drawn for that epoch, so that over the epochs the tail that does not fill a
window is seen as well, and cuts fall elsewhere. Nothing is repeated within an epoch and nothing is
kept in memory: the permutation is a keyed one, evaluated at one index.
"""

from __future__ import annotations

import hashlib

from xdist.errors import ConfigError, DataError

# Four Feistel rounds over a pseudo-random function give a pseudo-random permutation
# (Luby and Rackoff 1988); one more costs nothing here.
_ROUNDS = 5


def sample_start(
    seed: int, sample_cursor: int, store_length: int, sequence_length: int, *, first: int = 0,
    unit: int = 1,
) -> int:  # fmt: skip
    """Where in the store the sample at `sample_cursor` starts, in tokens.

    Args:
        seed: the run's seed.
        sample_cursor: how many samples the whole run drew before this one, over all ranks.
        store_length: tokens in the split.
        sequence_length: tokens of a sample.
        first: the cursor from which epochs of this length are counted (the start of a stage of a
            curriculum), so that a stage shorter than an epoch repeats nothing.
        unit: samples start at multiples of it (the length of a task's samples).

    Raises:
        DataError: the split is shorter than one sample.
        ConfigError: `sequence_length` < 1, or a cursor before `first`.
    """
    if sequence_length < 1:
        raise ConfigError("a sample needs at least one token", f"length = {sequence_length}")
    if sample_cursor < first:
        raise ConfigError(
            "a sample cursor lies before its stage", f"cursor {sample_cursor} < first {first}"
        )
    windows = store_length // sequence_length
    if windows == 0:
        raise DataError(
            "the data are shorter than one sample",
            f"{store_length} tokens < sequence length {sequence_length}",
            "prepare more text, or shorten the sequence",
        )
    epoch, number = divmod(sample_cursor - first, windows)
    key = f"{seed}/{first}/{sequence_length}/{epoch}"
    phases = (store_length - windows * sequence_length) // unit + 1
    phase = unit * (_draw(key, "phase", 0) % phases)
    return phase + sequence_length * permute(number, windows, key)


def permute(index: int, size: int, key: str) -> int:
    """The image of `index` under the permutation of `[0, size)` that `key` names.

    A Feistel network on the smallest even number of bits that holds `size`, walked until it lands
    inside (at most 4 steps on average).
    """
    if not 0 <= index < size:
        raise IndexError(f"{index} is not in [0, {size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (_draw(key, str(number), right) & mask)
        index = (left << half) | right
        if index < size:
            return index


def evaluation_windows(
    store_length: int, sequence_length: int, tokens: int
) -> list[tuple[int, int]]:
    """Windows `(start, stop)` that cover the first `tokens` of a split once, in order.

    Fewer tokens when the split is shorter. The last window may be shorter than `sequence_length`.
    """
    if sequence_length < 1:
        raise ConfigError("a window needs at least one token", f"length = {sequence_length}")
    end = min(store_length, tokens)
    return [(at, min(at + sequence_length, end)) for at in range(0, end, sequence_length)]


def _draw(key: str, role: str, value: int) -> int:
    digest = hashlib.blake2b(f"{key}/{role}/{value}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")
