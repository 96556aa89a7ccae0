"""Ulysses a few heads at a time: the same results, and memory of those heads alone."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import xdist
from tests.multirank.attention_cases import Case, errors, run_cases, segments, shards
from tests.multirank.attention_peaks import Peaks, peaks
from tests.multirank.test_attention_chunks import problem
from xdist.cost.attention_memory import ulysses_memory
from xdist.layout import Layout
from xdist.mask import Mask
from xdist.parallel.attention_parts import common
from xdist.parallel.attention_switch import Switch
from xdist.testing import RankPool, layouts
from xdist_kernels.attention import flash, pieces

MASKS = (Mask(), Mask(causal=False), Mask(prefix=3), Mask(chunk=7))
HEADS = ((6, 6), (6, 2), (12, 3), (8, 1), (5, 5), (9, 3), (2, 1))


@contextmanager
def head_by_head() -> Iterator[list[int]]:
    """Inside, no head is too short for a unit of its own; gives how many units switches had."""
    counts: list[int] = []
    real = Switch._units_of

    def counting(switch: Switch, chunk: int) -> Any:
        found = real(switch, chunk)
        counts.append(len(found))
        return found

    with (
        mock.patch.object(flash, "_CHUNK_ELEMENTS", 0),
        mock.patch.object(pieces, "MIN_ROWS", 2),
        mock.patch.object(pieces, "MIN_KEYS", 1),
        mock.patch.object(Switch, "_units_of", counting),
    ):
        yield counts


def results(cases: list[Case]) -> tuple[list[list[dict[str, Tensor]]], int]:
    """On one rank: every case's results, and the most units that any had."""
    with head_by_head() as counts:
        return run_cases(cases), max(counts)


def cases(parts: int, n: int = 23) -> list[Case]:
    found = []
    for turn, (heads, groups) in enumerate(HEADS):
        for which in (0, 1)[turn % 3 == 2 :]:
            mask = MASKS[(turn + 2 * which) % len(MASKS)]
            layout = list(layouts(n, parts, seed=turn).values())[(turn + 3 * which) % 5]
            case = Case("ulysses", segments(layout), mask, n, heads, groups, value_dim=4)
            cuts = (0, 0, 2, 9, 9, 17, n) if which else None
            found.append(replace(case, documents=cuts, sinks=turn % 3 == which, batch=1 + turn % 2))
    keys = segments(layouts(17, parts, seed=2)["drawn"])
    crossed = replace(found[2], mask=Mask(causal=False), documents=None, m=17)
    return [*found, replace(crossed, keys=keys), replace(crossed, keys="replicated")]


@pytest.mark.parametrize("parts", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_units_equal_one_device(parts: int, pool2: RankPool, pool3: RankPool) -> None:
    """Law 1; a key head that units share is added up."""
    some = cases(parts)[:: 2 if parts == 2 else 1]
    answers = {2: pool2, 3: pool3}[parts].run(results, some)
    assert max(most for _, most in answers) == 12 // parts
    for number, case in enumerate(some):
        for name, error in errors(case, [found[number][0] for found, _ in answers]).items():
            assert error <= 1e-10, (name, error, case)


def test_more_threads_make_larger_units() -> None:
    with mock.patch.object(torch, "get_num_threads", return_value=3):
        assert flash.heads_at_once(1, 1 << 20, 64) == 3
        assert flash.heads_at_once(2, 1 << 20, 64) == 3
        assert flash.heads_at_once(1, 1024, 64) == 8


def measured_cases(parts: int) -> list[Case]:
    layout = segments(Layout.zigzag(512, parts))
    base = Case("ulysses", layout, Mask(), 512, 8, 8, batch=1, dim=64, value_dim=64)
    return [
        replace(base, groups=groups, dtype=dtype)
        for groups in (8, 2)
        for dtype in (torch.bfloat16, torch.float32)
    ]


def measure(some: list[Case]) -> list[tuple[Peaks, Peaks]]:
    """(all heads at once, one at a time)"""
    whole = [peaks(case) for case in some]
    with head_by_head():
        return list(zip(whole, [peaks(case) for case in some], strict=True))


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_memory_of_units_is_that_of_the_formula(
    parts: int, pool2: RankPool, pool4: RankPool
) -> None:
    """Within 2 %, all heads at once and one by one, which takes less."""
    some = measured_cases(parts)
    for rank, found in enumerate({2: pool2, 4: pool4}[parts].run(measure, some)):
        for case, both in zip(some, found, strict=True):
            for got, most in zip(both, (None, 1), strict=True):
                alone, kept = (
                    ulysses_memory(problem(case), rank, keep=k, heads_at_once=most)
                    for k in (False, True)
                )
                for ours, said in (
                    (got.alone, alone.forward_bytes),
                    (got.forward, kept.forward_bytes),
                    (got.backward, kept.backward_bytes),
                    (got.kept, kept.kept_bytes),
                ):
                    assert said <= ours * 1.02, (case, most, got, alone, kept)
                    assert ours <= said * 1.02, (case, most, got, alone, kept)
            assert both[1].backward < 0.95 * both[0].backward


def test_the_closed_form_of_units() -> None:
    for parts in (2, 4):
        case = replace(measured_cases(parts)[1], heads=16, groups=16)
        for units in (2, 4):
            out = 4 * case.n * 16 // parts * case.dim
            x, lse = 3 * out, 4 * case.n * 16 // parts
            most = 16 // parts // units
            found = ulysses_memory(problem(case), 1, keep=True, heads_at_once=most)
            flight = (2 * parts - 1) * out // parts
            assert found.backward_bytes == max(out + (x + lse) // units, flight)
            # Nine tensors of a share are what others hold: what is kept, and these beside it.
            assert found.kept_bytes + found.backward_bytes + out <= 7.5 * out + 2 * lse


def tables() -> list[Tensor]:
    return [x for x in gc.get_objects() if type(x) is Tensor and x.dtype == torch.int64]


def tables_at_work(case: Case) -> list[int]:
    """How many integers lie in tensors of a token or more each, whenever a kernel works."""
    shard, _ = shards(case)
    others = tables()  # of tests before this one; held, so that no other object gets their ids
    known = {id(x) for x in others}
    found: list[int] = []

    def noting(kernel: Any) -> Any:
        def work(*args: Any, **options: Any) -> Any:
            held = [x for x in tables() if id(x) not in known]
            found.append(sum(x.numel() for x in held if x.numel() >= case.n))
            return kernel(*args, **options)

        return work

    q = torch.randn(1, shard.local_length, case.heads, 8, requires_grad=True)
    with (
        mock.patch.object(flash, "_CHUNK_ELEMENTS", 0),
        mock.patch.object(flash, "_forward", noting(flash._forward)),
        mock.patch.object(flash, "_backward", noting(flash._backward)),
    ):
        out = xdist.attention(q, q, q, shard, mask=case.mask, strategy="ulysses")
        out.sum().backward()
    return found


def test_no_table_of_positions_is_there_while_a_kernel_works(pool2: RankPool) -> None:
    """What masks, documents and segments say is in a few pieces of keys then."""
    layout = segments(Layout.zigzag(1000, 2))
    for cuts, mask in ((None, Mask()), ((0, 375, 375, 1000), Mask(chunk=250))):
        case = Case("ulysses", layout, mask, 1000, 4, 4, documents=cuts)
        for found in pool2.run(tables_at_work, case):
            assert len(found) >= 4
            assert set(found) == {0}


def test_common_heads_in_runs() -> None:
    assert common([1, 2, 3, 5], {2: 0, 3: 1, 4: 2, 5: 3}) == [
        (slice(1, 3), slice(0, 2)),
        (slice(3, 4), slice(3, 4)),
    ]
    assert common([0, 2], {0: 0, 1: 1, 2: 2}) == [
        (slice(0, 1), slice(0, 1)),
        (slice(1, 2), slice(2, 3)),
    ]
    assert common([], {1: 0}) == common([1], {}) == []
    assert common(range(4, 8), {head: head for head in range(9)}) == [(slice(0, 4), slice(4, 8))]


def test_forward_twice_and_backward_twice_use_what_is_kept(pool2: RankPool) -> None:
    """With retain_graph nothing is freed, and a second backward gives the same."""
    case = Case("ulysses", segments(Layout.contiguous(22, 2)), Mask(), 22, 4, 2, value_dim=4)
    assert pool2.run(twice, case) == [True, True]


def twice(case: Case) -> bool:
    shard, _ = shards(case)
    q = torch.randn(1, shard.local_length, 4, 4, requires_grad=True)
    with head_by_head():
        out = xdist.attention(q, q, q, shard, mask=case.mask, strategy="ulysses")
        first, second = (
            torch.autograd.grad(out.square().sum(), q, retain_graph=keep)[0]
            for keep in (True, False)
        )
    return torch.equal(first, second)
