"""Packed documents, empty ones included."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xdist.documents import Documents
from xdist.errors import DocumentsError


@st.composite
def packed(draw: st.DrawFn) -> Documents:
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=12))
    cuts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    return Documents.of(cuts, cuts[-1])


@given(packed())
def test_positions_know_their_document(documents: Documents) -> None:
    owner = [
        number
        for number, (start, stop) in enumerate(pairwise(documents.cu_seqlens))
        for _ in range(start, stop)
    ]
    positions = np.arange(documents.length)
    assert documents.index(positions).tolist() == owner
    assert documents.starts(positions).tolist() == [documents.cu_seqlens[i] for i in owner]
    assert documents.stops(positions).tolist() == [documents.cu_seqlens[i + 1] for i in owner]
    for position in range(documents.length + 1):
        same = 0 < position < documents.length and owner[position] == owner[position - 1]
        assert documents.continues(position) is same


@given(packed(), st.data())
def test_runs_cut_a_stretch_at_document_ends(documents: Documents, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, documents.length))
    stop = data.draw(st.integers(start, documents.length))
    position = start
    for low, high, number in documents.runs(start, stop):
        assert low == position < high
        assert documents.cu_seqlens[number] <= low
        assert high <= documents.cu_seqlens[number + 1]
        position = high
    assert position == stop


def test_of_accepts_lists_arrays_tensors_and_nothing() -> None:
    expected = Documents((0, 3, 3, 7))
    for given_ in ([0, 3, 3, 7], np.array([0, 3, 3, 7]), torch.tensor([0, 3, 3, 7]), expected):
        assert Documents.of(given_, 7) == expected
    assert Documents.of(None, 7) == Documents((0, 7))
    assert Documents.of(None, 0).count == 1


@pytest.mark.parametrize(
    ("given_", "numbers"),
    [
        ([0, 4], "ends at 4"),
        ([1, 7], "starts at 1"),
        ([0, 5, 4, 7], "entry 1 is 5, entry 2 is 4"),
        ([7], "at least two"),
        ([0.0, 7.0], "integer"),
        ([False, 7], "integer"),
        (torch.tensor([0.0, 7.0]), "integer"),
        (3, "integer"),
    ],
)
def test_bad_documents_raise_with_the_numbers(given_: object, numbers: str) -> None:
    with pytest.raises(DocumentsError, match=numbers):
        Documents.of(given_, 7)
