"""RankPool and run_ranks: results, failures, no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import xdist
from xdist.comm import collectives, ledger
from xdist.testing import RankFailed, RankPool, count_c10d_bytes, run_ranks


def _swap(x: torch.Tensor) -> tuple[int, int, torch.Tensor, int, int]:
    mesh = xdist.init_mesh(ring=2)
    other = 1 - mesh.sequence_rank
    with ledger() as moved, count_c10d_bytes() as counted:
        got = collectives.start_pairs(
            {other: x + mesh.sequence_rank},
            {other: (tuple(x.shape), x.dtype)},
            mesh.sequence_group,
            move="ring",
        ).wait()
    assert (moved.sent_bytes, moved.received_bytes) == (
        counted.sent_bytes,
        counted.received_bytes,
    )
    return mesh.sequence_rank, os.getpid(), got[other], moved.sent_bytes, moved.calls


def _fail(ranks: list[int]) -> int:
    rank = int(os.environ["RANK"])
    if rank in ranks:
        raise ValueError(f"deliberate on {rank}")
    return rank


def test_results_come_by_rank_and_processes_are_kept(pool2: RankPool) -> None:
    x = torch.arange(3, dtype=torch.bfloat16)
    first, second = pool2.run(_swap, x), pool2.run(_swap, x)
    assert [r[0] for r in first] == [0, 1]
    assert [r[1] for r in first] == [r[1] for r in second]
    for rank, result in enumerate(first):
        assert torch.equal(result[2], x + 1 - rank)
        assert result[3:] == (6, 1)


@pytest.mark.parametrize("ranks", [[0, 1], [1]])
def test_a_failure_carries_rank_and_traceback_and_the_pool_lives_on(
    pool2: RankPool, ranks: list[int]
) -> None:
    with pytest.raises(RankFailed, match=r"deliberate on \d") as caught:
        pool2.run(_fail, ranks)
    assert caught.value.rank in ranks
    assert caught.value.kind == "ValueError"
    assert f"[rank {caught.value.rank}]" in str(caught.value)
    assert [r[0] for r in pool2.run(_swap, torch.ones(2))] == [0, 1]
