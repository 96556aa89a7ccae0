"""The mask's one answer against the definition, written out as a loop over pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdist import Mask
from xdist.documents import Documents
from xdist.errors import MaskError
from xdist.mask import EMPTY, FULL, PARTIAL

SIDE = st.none() | st.integers(0, 8)
WINDOW = st.none() | st.integers(0, 8) | st.tuples(SIDE, SIDE)
MASKS = st.builds(
    Mask,
    causal=st.booleans(),
    window=WINDOW | st.lists(WINDOW, min_size=3, max_size=3),
    prefix=st.integers(0, 7),
    chunk=st.none() | st.integers(1, 6),
)
DOCUMENTS = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(
    lambda sizes: Documents(tuple(np.concatenate([[0], np.cumsum(sizes)]).tolist()))
)


def defined(mask: Mask, documents: Documents, head: int, query: int, key: int) -> bool:
    """DESIGN section 4, sentence by sentence."""
    if documents.index(query) != documents.index(key):
        return False
    start = int(documents.starts(query))
    i, j = query - start, key - start
    if mask.chunk is not None and i // mask.chunk != j // mask.chunk:
        return False
    window = mask.window.windows[head] if mask.heads is not None else mask.window
    if isinstance(window, int):
        window = (window, 0) if mask.causal else (window, window)
    left, right = (None, None) if window is None else window
    in_window = (left is None or i - j <= left) and (right is None or j - i <= right)
    return j < mask.prefix or ((not mask.causal or j <= i) and in_window)


@given(MASKS, DOCUMENTS, st.integers(0, 2))
def test_spans_are_the_definition(mask: Mask, documents: Documents, head: int) -> None:
    n = documents.length
    visible = mask.spans(np.arange(n), documents, head).visible(np.arange(n))
    expected = [[defined(mask, documents, head, q, k) for k in range(n)] for q in range(n)]
    assert visible.tolist() == expected


@given(MASKS, DOCUMENTS, st.data())
def test_blocks_agree_with_the_dense_mask(
    mask: Mask, documents: Documents, data: st.DataObject
) -> None:
    n = documents.length
    queries = data.draw(st.lists(st.integers(0, max(n - 1, 0)), max_size=5 if n else 0))
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    spans = mask.spans(queries, documents)
    dense = spans.visible(np.arange(start, stop))
    assert spans.seen(start, stop).tolist() == dense.sum(axis=1).tolist()
    expected = EMPTY if not dense.any() else FULL if dense.all() else PARTIAL
    assert spans.block(start, stop) is expected


@given(MASKS, DOCUMENTS)
def test_reach_bounds_every_visible_pair(mask: Mask, documents: Documents) -> None:
    n = documents.length
    left, right = mask.reach
    for head in range(mask.heads or 1):
        dense = mask.spans(np.arange(n), documents, head).visible(np.arange(n))
        for query, key in np.argwhere(dense):
            assert left is None or query - key <= left
            assert right is None or key - query <= right


def test_runs_of_a_span_are_disjoint_and_an_int_window_follows_causal() -> None:
    assert Mask(window=3).sides() == (3, 0)
    assert Mask(causal=False, window=3).sides() == (3, 3)
    assert Mask(causal=False, window=(2, None)).sides() == (2, None)
    assert Mask(window=[3, (4, 2), None]).sides(2) == (None, 0)
    assert Mask(window=[4, 2]) != Mask(window=(4, 2))


def test_head_groups_share_a_window() -> None:
    mask = Mask(window=[8, 8, None, 3])
    assert mask.head_groups(4) == [(0, 2), (2, 3), (3, 4)]
    assert Mask(window=8).head_groups(4) == [(0, 4)]
    assert mask.for_heads(1, 3).head_groups(2) == [(0, 1), (1, 2)]
    with pytest.raises(MaskError, match="4 windows for 3 heads"):
        mask.head_groups(3)


@pytest.mark.parametrize(
    "options",
    [
        {"window": -1},
        {"window": (1, -2)},
        {"window": (1, 2, 3)},
        {"window": 1.5},
        {"window": []},
        {"prefix": -1},
        {"chunk": 0},
        # Settings elsewhere say False for no window: here it would hide all but the token itself.
        {"window": False},
        {"window": (True, 2)},
        {"window": [None, False]},
        {"prefix": True},
        {"chunk": True},
    ],
)
def test_bad_masks_raise(options: dict[str, object]) -> None:
    with pytest.raises(MaskError):
        Mask(**options)


@pytest.mark.parametrize("far", [2**31, 2**62, 2**63 - 1, 10**30])
def test_sizes_beyond_any_sequence_are_no_limit(far: int) -> None:
    """A position added to them once passed 64 bits, and a query saw nothing."""
    documents, at = Documents.of([0, 4, 9], 9), np.arange(9)
    for mask, same in (
        (Mask(causal=False, window=far), Mask(causal=False)),
        (Mask(window=(None, far)), Mask()),
        (Mask(chunk=far), Mask()),
        (Mask(prefix=far), Mask(causal=False)),
        (Mask(window=[far, 2]), Mask(window=[None, 2])),
    ):
        for head in range(mask.heads or 1):
            wanted = same.spans(at, documents, head).visible(at)
            assert (mask.spans(at, documents, head).visible(at) == wanted).all(), mask
