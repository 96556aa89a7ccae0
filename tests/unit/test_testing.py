"""The harness's own pieces: the grid of layouts, the error measure, poisoned memory."""

from __future__ import annotations

import pytest
import torch

from xdist.testing import layouts, poisoned_empty, relative_error


@pytest.mark.parametrize("n", [0, 1, 3, 17, 64])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_grid_has_empty_and_uneven_shares(n: int, parts: int) -> None:
    grid = layouts(n, parts, seed=1)
    assert list(grid) == ["contiguous", "zigzag", "drawn", "uneven", "empty"]
    for layout in grid.values():
        assert (layout.length, layout.parts) == (n, parts)
    if parts > 1:
        assert grid["empty"].local_length(parts - 1) == 0


def test_relative_error_is_infinite_for_holes() -> None:
    assert relative_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.25
    assert relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) == float("inf")
    assert relative_error(torch.tensor([1e-30]), torch.zeros(1)) == float("inf")
    assert relative_error(torch.zeros(0), torch.zeros(0)) == 0.0
    with pytest.raises(ValueError, match="shapes"):
        relative_error(torch.zeros(2), torch.zeros(1, 2))


def test_poisoned_memory_is_nan_inside_only() -> None:
    with poisoned_empty():
        assert torch.empty(4).isnan().all()
        assert torch.zeros(3).new_empty(4).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
