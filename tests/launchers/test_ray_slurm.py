"""slurm/ray.sh on a real Slurm of two nodes: Ray inside the allocation, a save, a requeue."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

from tests.launchers.conftest import PATHS, wait_until
from tests.launchers.runs import Small
from tests.launchers.slurm_cluster import ROOT, SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1400)]

PATIENCE_S = 400.0
STEPS = 60


def test_ray_in_an_allocation_saves_is_requeued_and_loses_no_bit(
    slurm: SlurmCluster, tmp_path: pathlib.Path
) -> None:
    small = Small.make(tmp_path, steps=STEPS)
    # A short path: sockets of Ray lie in it.
    temporary = pathlib.Path(tempfile.mkdtemp(prefix="xs-", dir="/tmp"))
    words = small.words("ray", "parallel.ring=2", "checkpoint.every_steps=5", degree=1)
    options = ["-N2", "--ntasks-per-node=1", "--cpus-per-task=1", f"--output={tmp_path}/log"]
    number = int(
        slurm.run(
            *("sbatch", "--parsable", *options, str(ROOT / "slurm" / "ray.sh"), *words),
            cwd=tmp_path,
            env={"PYTHONPATH": PATHS, "XDIST_PYTHON": sys.executable, "TMPDIR": str(temporary)},
        )
    )
    log, metrics = tmp_path / "log", small.run("ray") / "metrics.jsonl"
    try:
        wait_until(lambda: _ended(slurm, number) or _lines(metrics) >= 4, PATIENCE_S)
        assert not _ended(slurm, number), log.read_text()
        (shared,) = tmp_path.glob(".xdist-ray-*")
        assert shared.stat().st_mode & 0o077 == 0
        assert (shared / "token").stat().st_mode & 0o077 == 0
        # What Slurm does before the time limit: the batch script alone gets the signal.
        slurm.run("scancel", "--batch", "--signal=USR1", str(number))
        job = slurm.wait_for(number, seconds=PATIENCE_S)
    finally:
        slurm.cancel(number)
        left = [path.name for path in temporary.glob("xray-*")]
        shutil.rmtree(temporary, ignore_errors=True)
    said = log.read_text()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), said
    assert "stopping after this step" in said
    assert "resuming from step-" in said
    assert small.status("ray")["state"] == "finished"
    assert list(tmp_path.glob(".xdist-ray-*")) == []
    assert left == []
    plain = small.words("plain", "parallel.ring=2", degree=1)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "xdist_launchers.cli", "launch", "local", *plain],
        env=os.environ | {"PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert small.losses("ray") == small.losses("plain")


def _ended(slurm: SlurmCluster, number: int) -> bool:
    return slurm.job(number)["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING")


def _lines(metrics: pathlib.Path) -> int:
    return metrics.read_text().count("\n") if metrics.exists() else 0
