"""The routes of grid_scan in integers: figures by hand, balance, the least of all candidates."""

from __future__ import annotations

import random

import pytest

from xdist.cost.grid_scan import (
    GridScanProblem,
    choose_route,
    grid_scan_bytes,
    scan_layout,
    spread_windows,
)
from xdist.cost.recurrent import Problem, TokenInput
from xdist.documents import Documents
from xdist.layout import Layout


def problem(
    sizes: tuple[int, ...], dim: int, order: tuple[int, ...], ranks: int, *, channels: int = 8,
    states: int = 4, strategy: str = "auto",
) -> GridScanProblem:  # fmt: skip
    """A selective scan, float32: u, delta [.., C], B, C [.., N]; a state [C, N] and its C sums."""
    inputs = (TokenInput(channels, 1, 4),) * 2 + (TokenInput(1, states, 4),) * 2
    call = Problem(
        Layout.contiguous(1, 1), Documents.of(None, 1), 1, channels, states, 1, 1, "scalar", 4,
        inputs, algorithm="gather",
    )  # fmt: skip
    return GridScanProblem(sizes, dim, ranks, order, (call,), inputs, strategy)


def sent(one: GridScanProblem, *, backward: bool) -> list[int]:
    return [grid_scan_bytes(one, r, backward=backward).sent_bytes for r in range(one.ranks)]


def test_figures_by_hand() -> None:
    """Two ranks over [8, 6, 4]: 4 bytes an element."""
    state, sums = 4 * 8 * 4, 4 * 8
    # Outermost: rank 0 sends its state.
    whole = problem((8, 6, 4), 0, (0, 1, 2), 2)
    assert sent(whole, backward=False) == [state, 0]
    assert sent(whole, backward=True) == [0, state]
    # Rows: one state for each of 24 rows.
    rows = problem((8, 6, 4), 0, (0,), 2, strategy="scan")
    assert sent(rows, backward=False) == [24 * state, 0]
    # Of three ranks the document passes through the middle one alone: both others get its sums.
    three = problem((9, 6, 4), 0, (0, 1, 2), 3)
    assert sent(three, backward=False) == [2 * state, state + 2 * sums, 0]
    # Not scanned: nothing.
    assert sent(problem((8, 6, 4), 1, (0, 2), 2), backward=False) == [0, 0]
    # Inside: half of a rank's 96 tokens, 24 numbers in and 8 out, each way.
    inside = problem((8, 6, 4), 1, (0, 1), 2)
    assert choose_route(inside).dim == 2
    assert sent(inside, backward=False) == [96 * (24 + 8) * 4 // 2] * 2
    assert sent(inside, backward=True) == [96 * (24 + 8) * 4 // 2] * 2


def test_a_switch_costs_what_dsp_says() -> None:
    """2 (P-1)/P^2 of the tokens' elements a rank, there and back (MATH: rule R6)."""
    for ranks in (2, 4, 8):
        one = problem((64, 16, 32), 1, (0, 1), ranks)
        elements = 64 * 16 * 32 * (24 + 8)
        each = elements * 4 * (ranks - 1) // ranks**2
        assert sent(one, backward=False) == [each] * ranks


@pytest.mark.parametrize("seed", range(20))
def test_the_route_is_the_least_and_what_is_sent_is_received(seed: int) -> None:
    draw = random.Random(seed)
    dims = draw.randint(1, 4)
    sizes = tuple(draw.randint(1, 9) for _ in range(dims))
    order = tuple(draw.sample(range(dims), draw.randint(1, dims)))
    one = problem(
        sizes, draw.randrange(dims), order, draw.randint(1, 5), channels=draw.randint(1, 9)
    )
    route = choose_route(one)
    assert route.total_bytes[route.dim] == min(route.total_bytes.values())
    for backward in (False, True):
        moved = [grid_scan_bytes(one, r, backward=backward) for r in range(one.ranks)]
        assert sum(m.sent_bytes for m in moved) == sum(m.received_bytes for m in moved)
    total = sum(sum(sent(one, backward=way)) for way in (False, True))
    assert total == route.total_bytes[route.dim]
    assert f"dim {route.dim}" in str(route)


def test_layouts_and_windows() -> None:
    layout = scan_layout((5, 4, 3), (0, 2), 3)
    assert [layout.segments(r) for r in range(3)] == [[(0, 6)], [(6, 12)], [(12, 15)]]
    assert scan_layout((2, 3), (0, 1), 3).segments(2) == []
    assert spread_windows(7, 2, 3) == [(0, 2), (1, 3), (2, 4)]
    assert spread_windows(2, 2, 3) == [(0, 1), (0, 1), (0, 0)]
