"""While states and their gradients travel, the local part that needs none of them is computed."""

from __future__ import annotations

import pytest

from tests.multirank import delta_cases, test_linear_attention, test_selective_scan, test_ssd
from tests.multirank.recurrence_cases import Op, check_overlap
from xdist.testing import RankPool

OPS = (test_linear_attention.OP, delta_cases.OP, test_ssd.OP, test_selective_scan.OP)


@pytest.mark.parametrize("algorithm", ["gather", "chain", "pipelined"])
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_local_work_is_done_while_states_travel(op: Op, algorithm: str, pool2: RankPool) -> None:
    """Start of the exchange, local work, wait; forward and backward, on both ranks."""
    check_overlap(op, pool2, algorithm)
