"""Law 1 for xdist.delta_rule: any layout, documents, decay and strategy equals one device."""

from __future__ import annotations

import pytest
import torch

from tests.multirank.delta_cases import OP
from tests.multirank.recurrence_cases import WAYS, check_law_1, check_law_1_in_bfloat16, grid
from xdist.testing import RankPool

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def check(parts: int, dtype: torch.dtype, pool: RankPool | None) -> None:
    each = 2 if dtype == torch.float64 else 1
    check_law_1(OP, grid(OP, parts, dtype, each=each), pool)


@DTYPES
def test_law_1_on_one_rank(dtype: torch.dtype) -> None:
    check(1, dtype, None)


@DTYPES
def test_law_1_on_two_ranks(dtype: torch.dtype, pool2: RankPool) -> None:
    check(2, dtype, pool2)


@DTYPES
def test_law_1_on_three_ranks(dtype: torch.dtype, pool3: RankPool) -> None:
    check(3, dtype, pool3)


@DTYPES
def test_law_1_on_four_ranks(dtype: torch.dtype, pool4: RankPool) -> None:
    check(4, dtype, pool4)


@pytest.mark.slow
def test_law_1_in_bfloat16(pool3: RankPool) -> None:
    check_law_1_in_bfloat16(OP, pool3, 3, (("scan", "gather"), ("scan", "chain"), WAYS[-1]))


@pytest.mark.slow
@DTYPES
def test_law_1_on_four_ranks_with_every_variant(
    dtype: torch.dtype, pool4: RankPool, pool8: RankPool
) -> None:
    check_law_1(OP, grid(OP, 4, dtype), pool4)
    check_law_1(OP, grid(OP, 8, dtype, each=1), pool8)
