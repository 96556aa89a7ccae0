"""Where crops lie: a pure function of seed and cursor, inside the sample or inside a box of it."""

from __future__ import annotations

import pytest

from xdist.data.grid_order import crop_origin
from xdist.errors import DataError


def test_crops_fill_their_box_to_its_borders_and_never_leave_it() -> None:
    box = (2, 7, 0, 4, 3, 9)
    found = [crop_origin(5, cursor, (9, 4, 9), (3, 4, 2), box) for cursor in range(300)]
    for dim, (first, last) in enumerate(((2, 4), (0, 0), (3, 7))):
        starts = {origin[dim] for origin in found}
        assert starts == set(range(first, last + 1))
    assert found == [crop_origin(5, cursor, (9, 4, 9), (3, 4, 2), box) for cursor in range(300)]


def test_without_a_box_a_crop_lies_anywhere_in_its_sample() -> None:
    found = {crop_origin(0, cursor, (5, 3), (2, 3)) for cursor in range(100)}
    assert found == {(start, 0) for start in range(4)}


@pytest.mark.parametrize("box", [(0, 10, 0, 4), (0, 2, 0, 4), (0, 9), (0, 9, 0)])
def test_a_box_that_no_crop_fits_is_refused_with_the_numbers(box: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"crops lie in \["):
        crop_origin(0, 0, (9, 4), (3, 4), box)
