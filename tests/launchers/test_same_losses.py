"""One config under every launcher of this machine: the same losses, bit for bit."""

from __future__ import annotations

import json
import pathlib
import signal
import subprocess
import sys

import pytest

from tests.launchers.conftest import wait_until
from tests.launchers.runs import Small
from tests.launchers.test_cli import XDIST
from tests.launchers.test_mpi import start
from xdist_launchers.rank_env import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
STEPS = 4


def _end(process: subprocess.Popen[str], code: int = 0) -> str:
    out, _ = process.communicate(timeout=150)
    assert process.returncode == code, out
    return out


def _by_hand(small: Small, name: str) -> None:
    """What a script of one's own does: torchrun's variables and one process a rank."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        start(*XDIST, "train", *small.words(name), **meeting, RANK=str(rank)) for rank in (0, 1)
    ]
    for rank in ranks:
        _end(rank)


def test_two_ranks_give_equal_losses_under_local_torchrun_mpi_and_by_hand(
    tmp_path: pathlib.Path,
) -> None:
    small = Small.make(tmp_path, STEPS)
    _end(start(*XDIST, "launch", "local", *small.words("local")))
    _end(start(*XDIST, "launch", "mpi", *small.words("mpi")))
    torchrun = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "--no-python")
    _end(start(*torchrun, *XDIST, "train", *small.words("torchrun")))
    _by_hand(small, "hand")
    losses = small.losses("local")
    assert len(losses) == STEPS
    for name in ("mpi", "torchrun", "hand"):
        assert small.losses(name) == losses, name


def test_one_rank_gives_equal_losses_as_a_plain_process_and_under_launchers(
    tmp_path: pathlib.Path,
) -> None:
    small = Small.make(tmp_path, STEPS)
    _end(start(*XDIST, "train", *small.words("plain", degree=1)))
    _end(start(*XDIST, "launch", "local", *small.words("local", degree=1)))
    _end(start(*XDIST, "launch", "mpi", *small.words("mpi", degree=1)))
    _end(start(*XDIST, "launch", "local", *small.words("two")))
    losses = small.losses("plain")
    assert len(losses) == STEPS
    assert small.losses("local") == losses
    assert small.losses("mpi") == losses
    # Other degrees add up in another order.
    for one, two in zip(losses, small.losses("two"), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_torchrun_ends_sensibly_at_a_signal_and_the_same_command_goes_on(
    tmp_path: pathlib.Path,
) -> None:
    small = Small.make(tmp_path, 5000)
    torchrun = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "--no-python")
    process = start(*torchrun, *XDIST, "train", *small.words())
    metrics = small.run() / "metrics.jsonl"
    wait_until(
        lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 2000),
        150,
    )
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    # torchrun has an exit code of its own; status.json carries that of the run.
    assert process.returncode != 0, out
    status = small.status()
    assert (status["state"], status["exit_code"]) == ("preempted", 75), out
    step = int(str(status["step"]))
    more = small.words("run", f"train.curriculum.0.steps={step + 2}")
    out = _end(start(*torchrun, *XDIST, "train", *more), 0)
    assert "resumed" in out
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps[-1] == step + 2


def test_torchruns_summary_says_why_a_rank_failed(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path, STEPS)
    small.damage()
    torchrun = (*TORCHRUN, "--standalone", "--nproc-per-node=2", "--no-python")
    out = _end(start(*torchrun, *XDIST, "train", *small.words()), 1)
    assert small.status()["exit_code"] == 5
    summary = out[out.index("Root Cause") :]
    assert "exitcode  : 5" in summary
    assert str(small.status()["reason"]).splitlines()[0] in summary
    assert "To enable traceback see" not in summary
