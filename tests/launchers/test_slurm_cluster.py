"""The private Slurm of the tests: whoever opens it may die, and nothing of it is left."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests.launchers.conftest import alive, wait_until
from tests.launchers.slurm_cluster import ROOT, SlurmCluster

pytestmark = pytest.mark.slow

# Opens a cluster, starts a job whose process leaves its session, and is killed.
KILLED = """
import os, pathlib, signal, sys
from tests.launchers.slurm_cluster import SlurmCluster
cluster = SlurmCluster().__enter__()
print(cluster.folder, flush=True)
pids = sys.argv[1]
wrap = f"setsid sleep 1000 & echo $! $$ $PPID > {pids}.new; mv {pids}.new {pids}; wait"
cluster.run("sbatch", "--output=/dev/null", "--wrap", wrap)
while not pathlib.Path(sys.argv[1]).exists():
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_when_its_opener_is_killed(tmp_path: pathlib.Path) -> None:
    pids = tmp_path / "pids"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(pids)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    folder = pathlib.Path(done.stdout.strip())
    assert done.returncode == -9
    wait_until(lambda: not folder.exists(), 60)
    for pid in pids.read_text().split():
        wait_until(lambda pid=int(pid): not alive(pid), 60)
    assert (
        str(folder)
        not in subprocess.run(
            ["ps", "-eo", "args"], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
    )


def test_two_nodes_run_tasks_side_by_side(slurm: SlurmCluster) -> None:
    out = slurm.run("srun", "--mpi=none", "-N2", "-n2", "printenv", "SLURMD_NODENAME", "SLURM_CONF")
    assert sorted(out.split()) == sorted(["n0", "n1", *[str(slurm.folder / "slurm.conf")] * 2])
