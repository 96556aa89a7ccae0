"""Masks that cuDNN and flash attention know are recognised exactly; all others are refused."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from xdist_kernels.attention.blocks import Spans, visible
from xdist_kernels.attention.library_masks import Sequences, find_sequences

Call = dict[str, Any]


def spans_of(
    n: int, *, cuts: tuple[int, ...] = (), causal: bool = True, left: int | None = None,
    right: int | None = None, chunk: int | None = None, prefix: int = 0,
) -> tuple[Spans, Tensor]:  # fmt: skip
    """Spans of n queries in position order, and the positions of n keys."""
    at = torch.arange(n)
    start, stop = torch.zeros_like(at), torch.full_like(at, n)
    for a, b in pairwise((0, *cuts, n)):
        start[a:b], stop[a:b] = a, b
    if chunk is not None:
        start = start + (at - start) // chunk * chunk
        stop = torch.minimum(stop, start + chunk)
    lo = start if left is None else torch.maximum(start, at - left)
    hi = stop if right is None else torch.minimum(stop, at + 1 + right)
    hi = torch.minimum(hi, at + 1) if causal else hi
    zero = torch.zeros_like(at)
    if not prefix:
        return (lo, hi, zero, zero), at
    seen = torch.minimum(start + prefix, stop)
    return (torch.maximum(lo, seen), hi, start, seen), at


def moved(made: tuple[Spans, Tensor], queries: Tensor, keys: Tensor) -> Call:
    """The call whose queries and keys lie in these orders."""
    spans, at = made
    return {"spans": tuple(s[queries] for s in spans), "k_positions": at[keys]}


def seen_by(plan: Sequences, n: int, m: int) -> Tensor:
    """Bool `[n,m]`: what queries see where a library is given `plan`, by its own rule."""
    found = torch.zeros(n, m, dtype=torch.bool)
    q_order = torch.arange(n) if plan.q_order is None else plan.q_order
    k_order = torch.arange(m) if plan.k_order is None else plan.k_order
    q_ends, k_ends = plan.q_starts.tolist(), plan.k_starts.tolist()
    for (a, b), (c, d) in zip(pairwise(q_ends), pairwise(k_ends), strict=True):
        at = torch.arange(b - a).unsqueeze(1) + (d - c) - (b - a)
        key = torch.arange(d - c)
        seen = torch.ones(b - a, d - c, dtype=torch.bool)
        if plan.left >= 0:
            seen &= key >= at - plan.left
        if plan.right >= 0:
            seen &= key <= at + plan.right
        rows, columns = q_order[a:b], k_order[plan.first_key + c : plan.first_key + d]
        found[rows.unsqueeze(1), columns] = seen
    return found


SERVED: dict[str, tuple[Call, tuple[int, int, int]]] = {
    "causal": ({}, (1, -1, 0)),
    "bidirectional": ({"causal": False}, (1, -1, -1)),
    "window": ({"left": 7}, (1, 7, 0)),
    "two-sided window": ({"causal": False, "left": 7, "right": 3}, (1, 7, 3)),
    "window to the right": ({"causal": False, "right": 3}, (1, -1, 3)),
    "documents": ({"cuts": (11, 12, 40)}, (4, -1, 0)),
    "bidirectional documents": ({"cuts": (11, 40), "causal": False}, (3, -1, -1)),
    "documents with a window": ({"cuts": (3, 40), "left": 9}, (3, 9, 0)),
    "chunks": ({"chunk": 16}, (4, -1, 0)),
    "chunks in documents": ({"chunk": 16, "cuts": (5, 40)}, (6, -1, 0)),
}


@pytest.mark.parametrize("order", ["as is", "zigzag", "drawn"])
@pytest.mark.parametrize("name", SERVED)
def test_masks_that_libraries_know_are_found_in_any_order(name: str, order: str) -> None:
    options, wanted = SERVED[name]
    n = 64
    here = torch.arange(n)
    if order == "zigzag":
        here = torch.cat([torch.cat([here[8 * i :][:8], here[56 - 8 * i :][:8]]) for i in range(4)])
    elif order == "drawn":
        here = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    call = moved(spans_of(n, **options), here, here)
    plan = find_sequences(**call)
    assert isinstance(plan, Sequences), plan
    assert (plan.count, plan.left, plan.right) == wanted
    assert torch.equal(seen_by(plan, n, n), visible(call["spans"], slice(0, n), here))
    if order == "as is" or name == "bidirectional":
        assert plan.q_order is None
        assert plan.k_order is None


def drawn_call(seed: int) -> Call:
    """Any mask: documents, causal or not, windows, chunks, prefixes, blind queries, and queries and
    keys that are a part of all, in drawn segments."""
    made = torch.Generator().manual_seed(seed)

    def some(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=made))

    n = some(1, 50)
    cuts = tuple(sorted({some(0, n + 1) for _ in range(some(0, 3))} - {0, n}))
    options: Call = {"cuts": cuts, "causal": bool(some(0, 2))}
    options |= {"left": some(0, 20)} if some(0, 2) else {}
    options |= {"right": some(0, 9)} if not options["causal"] and some(0, 2) else {}
    options |= {"chunk": some(1, 20)} if some(0, 4) == 0 else {}
    options |= {"prefix": some(1, 9)} if some(0, 5) == 0 else {}
    made_spans, at = spans_of(n, **options)
    if some(0, 5) == 0:
        made_spans[1][some(0, n)] = 0

    def part() -> Tensor:
        if some(0, 2):
            return torch.arange(n)
        a = some(0, n)
        segments = [torch.arange(a, n), torch.arange(0, some(0, a + 1))]
        return torch.cat(segments)

    return moved((made_spans, at), part(), part())


def test_what_is_found_is_exactly_the_mask_and_the_rest_is_refused() -> None:
    found = 0
    reasons: set[str] = set()
    for seed in range(600):
        call = drawn_call(seed)
        n, m = len(call["spans"][0]), len(call["k_positions"])
        plan = find_sequences(**call)
        if isinstance(plan, str):
            reasons.add(plan)
            continue
        found += 1
        seen = visible(call["spans"], slice(0, n), call["k_positions"])
        assert torch.equal(seen_by(plan, n, m), seen), seed
        assert int(plan.q_starts[-1]) == n
    assert 200 < found < 550
    assert reasons - {"there are no queries or no keys"} == {
        "some queries see no key",
        "some queries see two runs of keys",
        "some keys between those that are seen are seen by none",
        "what queries see moves by no one window",
    }


def test_keys_before_the_queries_and_keys_that_nobody_sees() -> None:
    """A halo: queries 40..63 with a window of 9, the keys 20..63 at hand."""
    spans, at = spans_of(64, left=9)
    call: Call = {"spans": tuple(s[40:] for s in spans), "k_positions": at[20:]}
    plan = find_sequences(**call)
    assert isinstance(plan, Sequences)
    assert (plan.left, plan.right, plan.first_key) == (9, 0, 11)
    assert plan.k_starts.tolist() == [0, 33]
    assert not plan.square
    assert torch.equal(seen_by(plan, 24, 44), visible(call["spans"], slice(0, 24), at[20:]))
    twice = find_sequences(spans, torch.cat([at[:10], at[:54]]))
    assert twice == "two keys have one position"
    assert find_sequences(spans, at[:0]) == "there are no queries or no keys"


def test_sequences_too_short_or_too_unlike_are_left_to_other_kernels() -> None:
    def plan_of(lengths: list[int]) -> Sequences:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return Sequences(ends, ends, -1, 0)

    assert plan_of([4096]).idle is None
    assert plan_of([100] * 50).idle is None
    assert "too short" in str(plan_of([20] * 50 + [30]).idle)
    assert "idle" in str(plan_of([8192] + [64] * 50).idle)
    assert plan_of([1000, 2000, 1500, 700]).idle is None
