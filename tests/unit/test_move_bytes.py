"""Formulas of the moves: sent = received over all ranks, and the figures of the design's table."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdist.cost import moves
from xdist.layout import Layout
from xdist.testing import layouts


def _balanced(per_rank: list[moves.Moved]) -> None:
    assert sum(m.sent_bytes for m in per_rank) == sum(m.received_bytes for m in per_rank)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=6),
    st.integers(0, 40),
    st.integers(0, 12),
    st.integers(0, 12),
)
def test_every_byte_sent_is_received(sizes: list[int], n: int, before: int, after: int) -> None:
    parts = len(sizes)
    everyone = range(parts)
    to = list(reversed(sizes))
    _balanced([moves.switch_bytes(sizes, to, r, 3, 4) for r in everyone])
    _balanced([moves.gather_bytes(sizes, r, 3, 4) for r in everyone])
    _balanced([moves.reduce_scatter_bytes(sizes, r, 3, 2) for r in everyone])
    _balanced([moves.reduce_bytes(n, parts, r, 4) for r in everyone])
    _balanced([moves.broadcast_bytes(n, parts, r, 0, 4) for r in everyone])
    _balanced([moves.ring_bytes(sizes, [[0]] * parts, r, 3, 4) for r in everyone])
    for layout in layouts(n, parts, seed=n).values():
        _balanced([moves.halo_bytes(layout, r, before, after, 3, 4) for r in everyone])
        target = Layout.zigzag(n, parts)
        _balanced([moves.relayout_bytes(layout, target, r, 3, 4) for r in everyone])
        cuts = [0, n // 2, n]
        for kind in moves.TRANSITIONS:
            for backward in (False, True):
                _balanced(
                    [
                        moves.scan_bytes(layout, cuts, r, (2, 3, 4), kind, 4, backward=backward)
                        for r in everyone
                    ]
                )


def test_figures_of_even_shares() -> None:
    # Local tensor x (P-1)/P for a switch; (P-1) shares for a gather; width x C for a halo.
    assert moves.switch_bytes([8] * 4, [2] * 4, 1, 5, 4) == (8 * 6 * 5 * 4, 24 * 2 * 5 * 4)
    assert moves.gather_bytes([8] * 4, 1, 5, 2) == (3 * 80, 3 * 80)
    layout = Layout.contiguous(64, 4)
    assert moves.halo_bytes(layout, 1, 3, 0, 5, 4) == (60, 60)
    assert moves.halo_bytes(layout, 0, 3, 0, 5, 4) == (60, 0)


@pytest.mark.parametrize("n", [64, 64_000_000])
def test_a_scan_does_not_depend_on_the_length(n: int) -> None:
    layout = Layout.contiguous(n, 4)
    state = 2 * 3 * 4 * 4
    received = [
        moves.scan_bytes(layout, [0, n], r, (2, 3, 4), "none", 4).received_bytes for r in range(4)
    ]
    assert received == [0, state, 2 * state, 3 * state]
    halves = Layout.contiguous(n, 4)
    assert moves.scan_bytes(halves, [0, n // 2, n], 2, (2, 3, 4), "none", 4).received_bytes == 0


def test_a_wide_halo_takes_each_token_once() -> None:
    layout = Layout.zigzag(32, 2)
    assert moves.halo_bytes(layout, 0, 100, 100, 1, 1).received_bytes == 16
