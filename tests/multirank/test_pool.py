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


def _one_dies() -> str:
    mesh = xdist.init_mesh(ring=2, device="cpu")
    if mesh.sequence_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        collectives.barrier(mesh.sequence_group)
        collectives.barrier(mesh.sequence_group)
    except xdist.errors.PeerLost as lost:
        return f"rank {lost.rank} during {lost.move}"
    return "nothing noticed"


def test_a_killed_rank_is_reported_with_what_the_others_saw() -> None:
    with RankPool(2) as pool:
        with pytest.raises(RankFailed, match="killed by signal 9") as caught:
            pool.run(_one_dies)
        assert caught.value.rank == 1
        assert caught.value.results == {0: "rank 1 during control"}
        assert pool.run(_fail, []) == [0, 1]


SCRIPT = """
import os, sys, time
from xdist.testing import RankPool, run_ranks

def place(path):
    assert not __import__("torch").distributed.is_initialized()
    with open(f"{path}.{os.environ['RANK']}", "w") as file:
        file.write(str(os.getpid()))
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

def stay(path):
    place(path)
    time.sleep(600)

if __name__ == "__main__":
    print(run_ranks(place, 2, sys.argv[1]), flush=True)
    RankPool(2).run(stay, sys.argv[1] + ".stay")
"""


def test_main_scripts_work_and_no_process_outlives_its_parent(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join(str(root / part) for part in (".", "kernels"))
    parent = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "pid")],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "[(0, 2), (1, 2)]\n"
        files = [tmp_path / f"pid.stay.{rank}" for rank in (0, 1)]
        while not all(file.exists() and file.read_text() for file in files):
            assert parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.communicate()
    pids = [int(file.read_text()) for file in [*files, tmp_path / "pid.0", tmp_path / "pid.1"]]
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=30)
    # In a container nobody may reap orphans: a zombie has ended.
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_run_ranks_stops_the_others_when_one_fails() -> None:
    with pytest.raises(RankFailed, match=r"\[rank 1\] Traceback(.|\n)*deliberate on 1"):
        run_ranks(_fail_while_others_wait, 2)


def _fail_while_others_wait() -> None:
    mesh = xdist.init_mesh(ring=2, device="cpu")
    if mesh.sequence_rank == 1:
        raise ValueError("deliberate on 1")
    collectives.barrier(mesh.sequence_group)
