"""Balanced layouts: tokens and counted work even, few segments, few keys that travel."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdist import Layout, Mask
from xdist.cost.attention_keys import Problem
from xdist.documents import Documents
from xdist.errors import DocumentsError, LayoutError, MaskError

PARTS = (2, 3, 4, 8)
MASKS = (
    Mask(),
    Mask(causal=False),
    Mask(window=40),
    Mask(causal=False, window=(7, 90)),
    Mask(window=[5, 5, None]),
    Mask(prefix=30, window=12),
    Mask(chunk=64),
)


def mix(seed: int, length: int) -> list[int]:
    """Documents of web text: lengths log-normal about 600 tokens, one in forty past 7000."""
    draw = np.random.default_rng(seed)
    cuts = [0]
    while cuts[-1] < length:
        cuts.append(min(length, cuts[-1] + 1 + int(600 * np.exp(1.3 * draw.standard_normal()))))
    return cuts


def over_mean(values: list[int]) -> float:
    return max(values) / (sum(values) / len(values))


def causal_work(layout: Layout, cuts: list[int]) -> list[int]:
    """Visible pairs of each rank, counted token by token from the definition."""
    inside = np.concatenate([np.arange(1, b - a + 1) for a, b in itertools.pairwise(cuts)])
    return [int(inside[layout.positions(rank)].sum()) for rank in range(layout.parts)]


def keys_that_travel(layout: Layout, cuts: list[int], mask: Mask) -> int:
    documents = Documents.of(cuts, layout.length)
    call = Problem(
        layout, documents, mask, layout, documents, cross=False,
        batch=1, heads=mask.heads or 1, groups=1, dim=8, value_dim=8, element_bytes=2,
    )  # fmt: skip
    return sum(call.needs.received(rank) for rank in range(layout.parts))


@pytest.mark.parametrize("parts", PARTS)
def test_a_realistic_mix_is_within_5_percent_of_the_mean(parts: int) -> None:
    for length in (32768, 131072):
        for seed in range(6):
            cuts = mix(seed, length)
            layout = Layout.balanced(cuts, parts)
            assert over_mean(causal_work(layout, cuts)) <= 1.05
            assert over_mean(list(layout.local_lengths)) <= 1.05
            runs = [len(layout.segments(rank)) for rank in range(parts)]
            assert sum(runs) <= 2 * parts - 1
            # Zigzag moves 3 (P - 1) / 4 rows of keys where the row is one document. What travels
            # here is mostly the longest document, which has to be cut.
            longest = max(np.diff(cuts)) / length
            moved = keys_that_travel(layout, cuts, Mask()) / (0.75 * (parts - 1) * length)
            assert moved <= 1.5 * longest + 0.05


@pytest.mark.parametrize("parts", PARTS)
def test_contiguous_and_zigzag_are_not_balanced_on_that_mix(parts: int) -> None:
    """What the balanced layout is for: the others' worst rank over the same rows."""
    worst = {
        make: max(over_mean(causal_work(make(131072, parts), mix(s, 131072))) for s in range(6))
        for make in (Layout.contiguous, Layout.zigzag)
    }
    assert min(worst.values()) > 1.05


@pytest.mark.parametrize("parts", range(1, 9))
def test_causal_zigzag_is_within_2_percent_of_the_mean(parts: int) -> None:
    for n in (4096, 10_007):
        assert over_mean(causal_work(Layout.zigzag(n, parts), [0, n])) <= 1.02


@pytest.mark.parametrize("parts", PARTS)
def test_one_causal_document_gives_zigzag(parts: int) -> None:
    n = 2 * parts * 1200
    layout, expected = Layout.balanced([0, n], parts), Layout.zigzag(n, parts)
    for rank in range(parts):
        assert np.array_equal(layout.positions(rank), expected.positions(rank))


@pytest.mark.parametrize("parts", PARTS)
def test_uniform_work_gives_contiguous(parts: int) -> None:
    n = parts * 100
    assert Layout.balanced([0, n], parts, Mask(causal=False)) == Layout.contiguous(n, parts)


def test_documents_that_fit_a_share_stay_whole() -> None:
    cuts = list(range(0, 4097, 64))
    layout = Layout.balanced(cuts, 4)
    assert keys_that_travel(layout, cuts, Mask()) == 0
    assert over_mean(causal_work(layout, cuts)) == 1.0


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_work_is_that_of_the_mask(mask: Mask) -> None:
    """Counted from dense visibility, windows per head added up."""
    for seed, parts in ((0, 2), (1, 3), (2, 4)):
        n = 3000
        cuts = mix(seed, n)
        documents = Documents.of(cuts, n)
        layout = Layout.balanced(cuts, parts, mask)
        work = []
        for rank in range(parts):
            at = layout.positions(rank)
            heads = [mask.spans(at, documents, h) for h in range(mask.heads or 1)]
            work.append(sum(int(s.visible(np.arange(n)).sum()) for s in heads))
        assert over_mean(work) <= 1.05
        assert over_mean(list(layout.local_lengths)) <= 1.05


@given(st.data())
def test_any_documents_are_shared_out_once_in_few_runs(data: st.DataObject) -> None:
    n, parts = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 9))
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, n), max_size=6))), n]
    slack = data.draw(st.sampled_from((0.0, 0.02, 0.5)))
    layout = Layout.balanced(cuts, parts, data.draw(st.sampled_from(MASKS)), slack=slack)
    held = np.concatenate([layout.positions(rank) for rank in range(parts)])
    assert sorted(held.tolist()) == list(range(n))
    assert sum(len(layout.segments(rank)) for rank in range(parts)) <= 2 * parts - 1
    assert Layout.balanced(Documents.of(cuts, n), parts, slack=0.5).length == n


def test_slack_saves_keys() -> None:
    cuts = mix(0, 32768)
    moved = [
        keys_that_travel(Layout.balanced(cuts, 2, slack=slack), cuts, Mask())
        for slack in (0.0, 0.05)
    ]
    assert moved[1] < moved[0] / 2


def test_what_cannot_be_balanced_is_refused() -> None:
    with pytest.raises(LayoutError, match="parts >= 1"):
        Layout.balanced([0, 8], 0)
    for slack in (-0.1, math.inf, math.nan):
        with pytest.raises(LayoutError, match=rf"slack must be finite and not negative\n.*{slack}"):
            Layout.balanced([0, 8], 2, slack=slack)
    with pytest.raises(MaskError, match=r"mask must be an xdist.Mask or None\ngot str"):
        Layout.balanced([0, 8], 2, "causal")  # type: ignore[arg-type]
    for wrong in (None, 8, [], [0], [1, 8], [0, 5, 3], [0, 8.5], [[0, 8]], "08"):
        with pytest.raises(DocumentsError):
            Layout.balanced(wrong, 2)
