"""Layouts cover every position once, whatever the length, the ranks and the cut."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xdist import Layout
from xdist.errors import LayoutError

LENGTHS = st.integers(0, 70)
PARTS = st.integers(1, 9)


@st.composite
def drawn_layouts(draw: st.DrawFn) -> Layout:
    """Segments cut anywhere, dealt to ranks in any order; some ranks may hold none."""
    length, parts = draw(LENGTHS), draw(PARTS)
    cuts = sorted({0, length, *draw(st.lists(st.integers(0, length), max_size=8))})
    runs = draw(st.permutations(list(itertools.pairwise(cuts))))
    held: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for run in runs:
        held[draw(st.integers(0, parts - 1))].append(run)
    return Layout.from_segments(length, held)


ANY = st.one_of(
    st.builds(Layout.contiguous, LENGTHS, PARTS),
    st.builds(Layout.zigzag, LENGTHS, PARTS),
    drawn_layouts(),
)


@given(ANY)
def test_every_position_has_one_owner(layout: Layout) -> None:
    held = np.concatenate([layout.positions(rank) for rank in range(layout.parts)])
    assert sorted(held.tolist()) == list(range(layout.length))
    assert [layout.local_length(r) for r in range(layout.parts)] == list(layout.local_lengths)


@given(ANY)
def test_pieces_are_in_position_order_and_point_into_local_tensors(layout: Layout) -> None:
    position = 0
    for piece in layout.pieces:
        assert piece.start == position < piece.stop
        local = layout.positions(piece.rank)
        run = local[piece.offset : piece.offset + piece.stop - piece.start]
        assert run.tolist() == list(range(piece.start, piece.stop))
        assert layout.segments(piece.rank)[piece.number] == (piece.start, piece.stop)
        position = piece.stop
    assert position == layout.length


@given(ANY, st.integers(-3, 73), st.integers(-3, 73))
def test_owners_clip_to_the_asked_run(layout: Layout, start: int, stop: int) -> None:
    covered = []
    for piece in layout.owners(start, stop):
        local = layout.positions(piece.rank)
        covered += local[piece.offset : piece.offset + piece.stop - piece.start].tolist()
    assert covered == list(range(max(start, 0), min(stop, layout.length)))


@given(LENGTHS, PARTS)
def test_contiguous_shares_are_those_of_tensor_split(length: int, parts: int) -> None:
    layout = Layout.contiguous(length, parts)
    expected = torch.arange(length).tensor_split(parts)
    for rank, share in enumerate(expected):
        assert layout.positions(rank).tolist() == share.tolist()


@given(LENGTHS, PARTS)
def test_zigzag_pairs_early_and_late_shares_of_tensor_split(length: int, parts: int) -> None:
    layout = Layout.zigzag(length, parts)
    shares = torch.arange(length).tensor_split(2 * parts)
    for rank in range(parts):
        expected = torch.cat([shares[rank], shares[2 * parts - 1 - rank]]).tolist()
        assert layout.positions(rank).tolist() == expected


def test_from_segments_keeps_the_given_order() -> None:
    layout = Layout.from_segments(9, [[(6, 9), (0, 2)], [], [(2, 4), (4, 6)]])
    assert layout.positions(0).tolist() == [6, 7, 8, 0, 1]
    assert layout.segments(1) == []
    assert layout.segments(2) == [(2, 4), (4, 6)]
    assert layout != Layout.from_segments(9, [[(0, 2), (6, 9)], [], [(2, 4), (4, 6)]])
    assert hash(layout) == hash(Layout.from_segments(9, [[(6, 9), (0, 2)], [], [(2, 4), (4, 6)]]))


@pytest.mark.parametrize(
    ("length", "segments", "numbers"),
    [
        (8, [[(0, 4)], [(5, 8)]], r"\[4, 5\)"),
        (8, [[(0, 4)], [(3, 8)]], "position 3 of rank 1 is held twice"),
        (8, [[(0, 4)], [(4, 7)]], r"\[7, 8\)"),
        (8, [[(0, 4)], [(4, 9)]], "stop <= 8"),
        (8, [[(4, 0)], [(4, 8)]], r"\(4, 0\)"),
        (8, [[(0, 4.5)], [(4, 8)]], "integers"),
        (8, [], "at least one rank"),
    ],
)
def test_bad_segments_raise_with_the_numbers(
    length: int, segments: list[list[tuple[int, int]]], numbers: str
) -> None:
    with pytest.raises(LayoutError, match=numbers):
        Layout.from_segments(length, segments)


@pytest.mark.parametrize(("length", "parts"), [(-1, 2), (4, 0), (2.5, 1)])
def test_bad_sizes_raise(length: int, parts: int) -> None:
    for make in (Layout.contiguous, Layout.zigzag):
        with pytest.raises(LayoutError):
            make(length, parts)


def test_an_unknown_rank_raises() -> None:
    with pytest.raises(LayoutError, match="rank 2"):
        Layout.contiguous(4, 2).segments(2)
