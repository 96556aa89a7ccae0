"""The order of samples: a permutation per epoch, a pure function of seed and cursor."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdist.data.order import evaluation_windows, permute, sample_start
from xdist.errors import ConfigError, DataError


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 300), key=st.text(max_size=5))
def test_permute_is_a_permutation(size: int, key: str) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    length=st.integers(1, 50),
    store=st.integers(1, 1000),
    first=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_an_epoch_repeats_nothing_and_stays_inside(seed, length, store, first, epoch) -> None:
    if store < length:
        with pytest.raises(DataError, match="shorter than one sample"):
            sample_start(seed, first, store, length, first=first)
        return
    windows = store // length
    cursors = range(first + epoch * windows, first + (epoch + 1) * windows)
    starts = sorted(sample_start(seed, cursor, store, length, first=first) for cursor in cursors)
    assert starts[0] >= 0
    assert starts[-1] + length <= store
    assert all(b - a == length for a, b in pairwise(starts))


def test_order_depends_on_seed_epoch_and_stage_only() -> None:
    def starts(seed: int, first: int, begin: int) -> list[int]:
        return [sample_start(seed, begin + i, 10_007, 100, first=first) for i in range(100)]

    assert starts(0, 0, 0) == starts(0, 0, 0)
    assert starts(0, 0, 0) != starts(1, 0, 0)
    assert starts(0, 0, 0) != starts(0, 0, 100), "another epoch has another order"
    # Fixed for ever: a resumed run must draw what the first one would have drawn.
    assert [sample_start(7, cursor, 30_000_000, 4096) for cursor in (0, 1, 10**6)] == FIXED


FIXED = [11838278, 19161926, 22225028]


def test_offsets_past_two_to_the_31() -> None:
    starts = [sample_start(3, cursor, 5 << 40, 1 << 20) for cursor in range(50)]
    assert max(starts) > 1 << 40
    assert len(set(starts)) == 50


def test_refusals_name_the_numbers() -> None:
    with pytest.raises(ConfigError, match="length = 0"):
        sample_start(0, 0, 10, 0)
    with pytest.raises(ConfigError, match="cursor 3 < first 4"):
        sample_start(0, 3, 10, 2, first=4)
    with pytest.raises(IndexError):
        permute(5, 5, "")


@given(store=st.integers(0, 200), length=st.integers(1, 60), tokens=st.integers(0, 300))
def test_evaluation_windows_cover_once_in_order(store: int, length: int, tokens: int) -> None:
    windows = evaluation_windows(store, length, tokens)
    covered = [at for start, stop in windows for at in range(start, stop)]
    assert covered == list(range(min(store, tokens)))
    assert all(stop - start == length for start, stop in windows[:-1])
