"""Models of HuggingFace Transformers under a shard equal the unmodified models."""

from __future__ import annotations

import pytest

from tests.multirank.transformers_cases import FAMILIES, PACKED, Case, errors, on_rank, reference
from xdist.testing import RankPool

pytest.importorskip("transformers")

LAYOUTS = ("contiguous", "zigzag", "drawn")
STRATEGIES = ("auto", "ulysses", "ring", "gather")


def family_cases(parts: int) -> list[Case]:
    """Every family dense and packed; layouts and strategies take turns."""
    return [
        Case(family, LAYOUTS[(i + packed) % 3], PACKED if packed else None, STRATEGIES[turn % 4])
        for i, family in enumerate(FAMILIES)
        for packed in (0, 1)
        for turn in [i + 2 * packed + parts]
    ]


def check(pool: RankPool, cases: list[Case], degrees: tuple[int, int]) -> None:
    answers = pool.run(on_rank, cases, degrees)
    for number, case in enumerate(cases):
        want = reference(case)
        for name, error in errors(case, [answer[number] for answer in answers], want).items():
            assert error <= 1e-10, (name, error, case)


def test_two_ranks_equal_the_unmodified_models(pool2: RankPool) -> None:
    check(pool2, family_cases(2), (2, 1))
