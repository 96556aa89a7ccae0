"""Strategy 2d: ulysses inside rows of ranks, ring between rows; the degrees are the mesh's."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

import xdist
from tests.multirank.attention_cases import Case, segments, visible
from tests.multirank.test_attention import (
    HEADS,
    MASKS,
    ODD_HEADS,
    PACKED,
    check,
    cross_grid,
    rounds_as_one_rank,
)
from tests.multirank.test_attention_strategies import count_cases
from xdist.cost.attention import attention_cost, check_strategy
from xdist.cost.attention_keys import Problem
from xdist.documents import Documents
from xdist.errors import StrategyError
from xdist.layout import Layout
from xdist.mask import Mask
from xdist.testing import RankPool, layouts


def cases_2d(parts: int, inner: int, n: int = 23) -> list[Case]:
    """Every mask on every kind of layout; heads, documents, soft-cap and sinks take turns."""
    cases = []
    for i, (name, mask) in enumerate(MASKS.items()):
        kinds = layouts(n, parts, seed=n + i)
        for j, layout in enumerate(kinds.values()):
            turn = i + j
            heads, groups = HEADS[i % 3] if name == "per_head" else (HEADS + ODD_HEADS)[turn % 10]
            cases.append(
                Case(
                    "2d",
                    segments(layout),
                    mask,
                    n,
                    heads,
                    groups,
                    documents=PACKED[n] if turn % 2 else None,
                    softcap=2.0 if turn % 3 == 0 else None,
                    sinks=turn % 4 < 2,
                    ulysses=inner,
                )
            )
    crossed = [replace(c, strategy="2d", ulysses=inner) for c in cross_grid(parts)[:12:2]]
    return [*cases, *crossed]


def test_rows_of_two_equal_one_device(pool4: RankPool) -> None:
    check(cases_2d(4, 2)[::2], pool4)


def test_one_row_and_rows_of_one_equal_one_device(pool3: RankPool) -> None:
    check([*cases_2d(3, 1)[::4], *cases_2d(3, 3)[2::4]], pool3)


@pytest.mark.slow
def test_eight_ranks_in_rows_equal_one_device(pool8: RankPool) -> None:
    check([*cases_2d(8, 2)[::2], *cases_2d(8, 4)[1::3]], pool8)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_that_of_one_rank(pool4: RankPool, dtype: torch.dtype) -> None:
    """Medians over 5 seeds of every mask, on zigzag and drawn segments in turn."""
    kinds = [layouts(24, 4, seed=3)[name] for name in ("zigzag", "drawn")]
    cases = [
        Case(
            "2d", segments(kinds[i % 2]), mask, 24, documents=PACKED[24] if i % 3 else None,
            dtype=dtype, sinks=dtype == torch.float32, ulysses=2,
        )
        for i, mask in enumerate(MASKS.values())
    ]  # fmt: skip
    rounds_as_one_rank(pool4, cases)


def test_dropout_is_that_of_one_device(pool4: RankPool) -> None:
    drop = xdist.Dropout(0.4, seed=3, step=7, layer=2)
    layout = segments(layouts(23, 4, seed=8)["drawn"])
    case = Case("2d", layout, Mask(), 23, 5, 5, ulysses=2, dropout=drop)
    check([case, replace(case, heads=6, groups=2, mask=Mask(window=5))], pool4)


def test_ledger_formula_and_dispatch_mode_count_the_same_bytes(pool4: RankPool) -> None:
    cases = cases_2d(4, 2, 24)[1::3]
    for i in range(0, len(cases), 3):
        cases[i] = replace(cases[i], dtype=torch.bfloat16)
    answers = pool4.run(count_cases, cases)
    for number, case in enumerate(cases):
        ranks = [answer[number][0] for answer in answers]
        for ledger, seen, formula in ranks:
            assert ledger == seen == formula, case
        assert sum(r[0][0] for r in ranks) == sum(r[0][1] for r in ranks)
        assert sum(r[0][2] for r in ranks) == sum(r[0][3] for r in ranks)
        assert {m for answer in answers for m in answer[number][1]} <= {"switch", "ring"}


def test_a_column_receives_only_keys_that_its_heads_see(pool4: RankPool) -> None:
    """Two narrow heads and two without a limit: between rows the narrow column gets less."""
    mask = Mask(window=[1, 1, None, None])
    case = Case("2d", segments(Layout.contiguous(24, 4)), mask, 24, 4, 4, ulysses=2)
    answers = pool4.run(count_cases, [case])
    seen = visible(case)
    for rank, answer in enumerate(answers):
        (row, column), (counts, _) = divmod(rank, 2), answer[0]
        inside = 2 * (2 * 4 + 3 + 3) * 6 * 2 * 8  # q, k, v in and out back: 6 tokens, 2 heads
        own = slice(12 * row, 12 * row + 12)
        other = slice(12 * (1 - row), 12 * (1 - row) + 12)
        heads = slice(2 * column, 2 * column + 2)
        tokens = int(seen[heads, own, other].any(0).any(0).sum())
        assert counts[0][1] == inside + tokens * 2 * 2 * (4 + 3) * 8
    assert int(seen[:2, 12:, :12].any(0).any(0).sum()) == 1


def problem(parts: int, inner: int, mask: Mask, heads: tuple[int, int]) -> Problem:
    layout = Layout.zigzag(48, parts)
    documents = Documents.of(None, 48)
    return Problem(
        layout, documents, mask, layout, documents, False, 1, *heads, 8, 4, 2, ulysses=inner
    )


def test_a_degree_of_one_is_the_other_strategy() -> None:
    for mask, heads in product(MASKS.values(), ((4, 2), (4, 1), (4, 4))):
        for inner, same in ((1, "ring"), (4, "ulysses")):
            call = problem(4, inner, mask, heads)
            for rank in range(4):
                assert attention_cost(call, "2d", rank) == attention_cost(call, same, rank)


def test_it_can_move_less_than_ulysses_and_ring() -> None:
    """The numbers of docs/strategies/2d.md."""
    layout, documents = Layout.zigzag(4096, 8), Documents.of(None, 4096)
    call = Problem(
        layout, documents, Mask(), layout, documents, False, 1, 32, 4, 64, 64, 2, ulysses=4
    )
    moved = {
        name: max(attention_cost(call, name, rank).bytes for rank in range(8))
        for name in ("2d", "ulysses", "ring")
    }
    assert moved == {"2d": 17_301_504, "ulysses": 20_185_088, "ring": 22_020_096}


def test_the_same_work_in_rows() -> None:
    for mask, heads in product(MASKS.values(), ((4, 2), (4, 1), (4, 4))):
        both = [problem(6, inner, mask, heads) for inner in (1, 2, 3)]
        flops = [sum(attention_cost(p, "2d", r).forward_flops for r in range(6)) for p in both]
        assert flops == flops[:1] * 3


def test_rows_that_do_not_divide_the_ranks_raise() -> None:
    with pytest.raises(StrategyError, match="rows of 4 ranks do not divide 6"):
        check_strategy(problem(6, 4, Mask(), (4, 4)), "2d")
