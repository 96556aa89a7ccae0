"""While states and their gradients travel, the local part that needs none of them is computed."""

from __future__ import annotations

import pytest

from tests.multirank import test_linear_attention as linear
from tests.multirank.recurrence_cases import check_overlap
from xdist.testing import RankPool


@pytest.mark.parametrize("algorithm", ["gather", "chain", "pipelined"])
def test_local_work_is_done_while_states_travel(algorithm: str, pool2: RankPool) -> None:
    check_overlap(linear.OP, pool2, algorithm)
