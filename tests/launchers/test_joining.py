"""Ranks that do not belong together, or do not come, where no launcher of xdist watches."""

from __future__ import annotations

import pathlib
import sys

import pytest

from tests.launchers.runs import Small
from tests.launchers.test_cli import XDIST
from tests.launchers.test_mpi import start
from xdist_launchers.rank_env import free_port

pytestmark = pytest.mark.timeout(250)

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
# Rank 1 is there, as torchrun sees it, but never joins.
ABSENT = 'if [[ $RANK == 1 ]]; then exec sleep 120; fi; exec "$@"'


def _meeting() -> dict[str, str]:
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}


@pytest.mark.slow
def test_a_rank_with_another_config_is_refused_and_both_are_named(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path)
    meeting = _meeting()
    more = ((), ("train.accumulation=2", "optimizer.clip_norm=2.0"))
    ranks = [
        start(*XDIST, "train", *small.words("run", *more[rank]), **meeting, RANK=str(rank))
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=150)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [3, 3], outputs
    for out in outputs:
        assert "xdist: rank 1 on " in out
        assert "does not run what rank 0 runs" in out
        assert "train.accumulation = 2 (rank 0: 1)" in out
        assert "optimizer.clip_norm = 2.0 (rank 0: 1.0)" in out
    assert small.status()["exit_code"] == 3


def test_failure_4_by_hand_a_rank_that_never_comes_is_named(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path)
    words = small.words("run", "launch.init_timeout_s=2.0")
    rank = start(*XDIST, "train", *words, **_meeting(), RANK="0")
    out, _ = rank.communicate(timeout=150)
    assert rank.returncode == 3, out
    assert "xdist: 1 of 2 ranks joined; missing rank 1" in out
    assert "waited 2 s" in out


@pytest.mark.slow
def test_failure_4_under_torchrun_waits_for_init_timeout_s(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path)
    words = small.words("run", "launch.init_timeout_s=3.0", "train.step_timeout_s=900.0")
    process = start(*TORCHRUN, "--no-python", "bash", "-c", ABSENT, "bash", *XDIST, "train", *words)
    out, _ = process.communicate(timeout=150)
    assert process.returncode == 1, out
    assert "1 of 2 ranks joined; missing rank 1" in out
    assert "waited 3 s" in out
    assert "exitcode  : 3" in out
    assert small.status()["exit_code"] == 3
