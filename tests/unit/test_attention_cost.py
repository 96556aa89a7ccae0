"""Attention's costs as pure integers: needs against dense visibility, formulas, the choice."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdist.cost.attention import STRATEGIES, attention_cost, check_strategy, unable
from xdist.cost.attention_keys import Problem, all_keys, needs_of, spans_of
from xdist.documents import Documents
from xdist.errors import StrategyError
from xdist.layout import Layout
from xdist.mask import Mask

MASKS = (
    Mask(),
    Mask(causal=False),
    Mask(window=6),
    Mask(causal=False, window=(2, 9)),
    Mask(prefix=4, window=3),
    Mask(chunk=5),
    Mask(prefix=2, chunk=9, window=1),
)


def problem(
    layout: Layout, mask: Mask, cuts: list[int] | None = None, heads: tuple[int, int] = (4, 2)
) -> Problem:
    documents = Documents.of(cuts, layout.length)
    sizes = {"batch": 1, "heads": heads[0], "groups": heads[1], "dim": 8, "value_dim": 4}
    return Problem(
        layout, documents, mask, layout, documents, cross=False, element_bytes=2, **sizes
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_needs_are_exactly_the_keys_that_are_seen(data: st.DataObject) -> None:
    n, parts = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 4))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    runs = [(a, b) for a, b in zip([0, *cuts], [*cuts, n], strict=True) if b > a]
    held: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    for run in data.draw(st.permutations(runs)):
        held[data.draw(st.integers(0, parts - 1))].append(run)
    layout = Layout.from_segments(n, held)
    packed = sorted(data.draw(st.lists(st.integers(0, n), max_size=4)))
    call = problem(layout, data.draw(st.sampled_from(MASKS)), [0, *packed, n])
    needs = needs_of(call)
    for user, owner in product(range(parts), range(parts)):
        spans = spans_of(call, layout.positions(user))
        seen = spans.visible(layout.positions(owner)).any(axis=0)
        said = np.zeros(layout.local_length(owner), dtype=bool)
        for start, stop in needs.ranges[user][owner]:
            said[start:stop] = True
        assert np.array_equal(said, seen)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_what_is_sent_is_received(mask: Mask) -> None:
    for layout, heads in product(
        (Layout.contiguous(37, 3), Layout.zigzag(40, 4), Layout.contiguous(2, 4)),
        ((4, 2), (3, 1), (5, 5), (9, 3)),
    ):
        call = problem(layout, mask, heads=heads)
        for strategy in STRATEGIES:
            if unable(call, strategy):
                continue
            costs = [attention_cost(call, strategy, rank) for rank in range(layout.parts)]
            forward = [(c.forward_sent_bytes, c.forward_received_bytes) for c in costs]
            backward = [(c.backward_sent_bytes, c.backward_received_bytes) for c in costs]
            for moved in (forward, backward):
                assert sum(sent for sent, _ in moved) == sum(received for _, received in moved)
            # However the work is split, it is the same work.
            alone = attention_cost(
                problem(Layout.contiguous(layout.length, 1), mask, None, heads), "ring", 0
            )
            assert sum(c.forward_flops for c in costs) == alone.forward_flops
            assert sum(c.backward_flops for c in costs) == alone.backward_flops


def test_a_full_mask_gives_the_formulas_of_the_field() -> None:
    """Even shares, no mask, MHA: ring and gather 2 k S/P (P-1), Ulysses 4 d S/P (P-1)/P."""
    parts, n, heads, dim = 4, 64, 8, 16
    layout = Layout.contiguous(n, parts)
    documents = Documents.of(None, n)
    call = Problem(
        layout, documents, Mask(causal=False), layout, documents, False,
        1, heads, heads, dim, dim, 2,
    )  # fmt: skip
    width, share = heads * dim, n // parts
    for strategy in ("ring", "gather"):
        got = attention_cost(call, strategy, 1).forward_received_bytes
        assert got == 2 * 2 * width * share * (parts - 1)
    got = attention_cost(call, "ulysses", 1).forward_received_bytes
    assert got == 2 * 4 * width * share * (parts - 1) // parts


def test_fewer_key_heads_than_ranks_are_sent_once_a_rank() -> None:
    """8 query heads over 1 key head on 4 ranks: each rank receives that head once."""
    layout = Layout.contiguous(64, 4)
    documents = Documents.of(None, 64)
    call = Problem(layout, documents, Mask(), layout, documents, False, 1, 8, 1, 16, 16, 2)
    queries_and_outputs = 2 * 48 * 2 * 16 + 2 * 16 * 6 * 16
    got = attention_cost(call, "ulysses", 2).forward_received_bytes
    assert got == queries_and_outputs + 2 * 2 * 16 * 1 * 48


def test_gather_needs_everything() -> None:
    call = problem(Layout.contiguous(10, 3), Mask(window=1))
    assert [all_keys(call).received(rank) for rank in range(3)] == [6, 7, 7]


def test_unknown_or_impossible_strategies_raise_with_what_exists() -> None:
    call = problem(Layout.contiguous(8, 2), Mask())
    with pytest.raises(StrategyError, match="auto, ulysses, halo, ring, gather, 2d"):
        check_strategy(call, "megatron")
    with pytest.raises(StrategyError, match="unlimited to the left"):
        check_strategy(call, "halo")
