"""The seven moves and broadcast on 1, 2, 3 and 4 ranks, forward and backward.

For every case: the result, the gradient, and ledger = formula = bytes seen by a dispatch mode.
"""

from __future__ import annotations

import pytest

from tests.multirank.comm_cases import CASES, run_case
from xdist.testing import RankPool


@pytest.mark.parametrize("name", sorted(CASES))
def test_one_rank_moves_nothing(name: str) -> None:
    assert run_case(name, 1)


@pytest.mark.parametrize("name", sorted(CASES))
def test_two_ranks(pool2: RankPool, name: str) -> None:
    assert pool2.run(run_case, name, 2) == [True] * 2


@pytest.mark.parametrize("name", sorted(CASES))
def test_three_ranks(pool3: RankPool, name: str) -> None:
    assert pool3.run(run_case, name, 3) == [True] * 3


@pytest.mark.parametrize("name", sorted(CASES))
def test_four_ranks(pool4: RankPool, name: str) -> None:
    assert pool4.run(run_case, name, 4) == [True] * 4
