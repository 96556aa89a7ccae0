"""Failure 3: launchers that contradict each other, and the many that do not."""

from __future__ import annotations

import pathlib
import resource
import socket
import subprocess
import sys

import pytest

from tests.launchers.test_cli import xdist
from xdist.errors import LaunchError
from xdist_launchers import environment

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_PROCID": "0"}
STEP = BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "4"}
HERE = socket.gethostname()


def ranks(rank: int, world: int, **more: str) -> dict[str, str]:
    """RANK and WORLD_SIZE as a script would set them."""
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "n0", **more}


REFUSED = {
    "a Slurm job of 4 tasks, one process by hand": (BATCH, "4 tasks, but this process would"),
    "the same with a world of one": (BATCH | ranks(0, 1), "train as one rank alone"),
    "srun without ranks": (STEP | {"SLURM_PROCID": "3"}, "Slurm step says rank 3 of 4, but this"),
    "mpirun without ranks": (OPEN_MPI, "Open MPI says rank 1 of 4, but this process would train"),
    "MPICH without ranks": (PMI, "MPI (PMI) says rank 1 of 4"),
    "RANK and PMI_RANK": (ranks(2, 4) | PMI, "says rank 2 of 4, MPI (PMI) says rank 1 of 4"),
    "RANK and Open MPI": (ranks(1, 2) | OPEN_MPI, "rank 1 of 2, Open MPI says rank 1 of 4"),
    "RANK and SLURM_PROCID": (ranks(1, 4) | STEP, "rank 1 of 4, Slurm step says rank 0 of 4"),
    "WORLD_SIZE and the step": (ranks(0, 2) | STEP, "rank 0 of 2, Slurm step says rank 0 of 4"),
    "xdist's own Slurm script is asked too": (
        ranks(1, 4, XDIST_LAUNCHER="slurm") | STEP,
        "launchers disagree",
    ),
    "two nodes of a step meet on the loopback": (
        ranks(0, 4) | STEP | {"MASTER_ADDR": "127.0.0.1", "SLURMD_NODENAME": HERE},
        "each node's own loopback",
    ),
    "two nodes by hand meet on the loopback": (
        ranks(0, 4, LOCAL_WORLD_SIZE="2") | {"MASTER_ADDR": "localhost"},
        "MASTER_ADDR=localhost is each node's own loopback",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_failure_3_contradictions_are_refused_with_the_table(name: str) -> None:
    environ, message = REFUSED[name]
    with pytest.raises(LaunchError) as caught:
        environment.check(environ)
    assert message in caught.value.what
    assert caught.value.exit_code == 3
    lines = caught.value.why.splitlines()
    assert lines[0] == "variables seen:"
    assert lines[-1].startswith("in force: ")
    for variable, value in environ.items():
        if variable != "SLURM_STEP_NUM_NODES":
            assert f"  {variable:<22} {value}" in lines
    assert caught.value.do


LOCAL = {"XDIST_LAUNCHER": "local", "MASTER_ADDR": "127.0.0.1"}
ACCEPTED = {
    "nothing at all": {},
    "one task of Slurm": {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"},
    "a job that names no number of tasks": {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"},
    "a step of one task": STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},
    "a shell of srun --pty": STEP | {"SLURM_PTY_PORT": "4711"},
    "launch local in a batch job": BATCH | ranks(1, 2) | LOCAL,
    "launch local of one rank in a batch job": BATCH | ranks(0, 1) | LOCAL,
    "launch local in the shell of a step": STEP | ranks(1, 2) | LOCAL,
    "torchrun, once a node by srun": STEP | ranks(5, 8, TORCHELASTIC_RUN_ID="x"),
    "torchrun meets on the loopback": ranks(1, 4, LOCAL_WORLD_SIZE="2", TORCHELASTIC_RUN_ID="x")
    | {"MASTER_ADDR": "127.0.0.1"},
    "a script in a batch job": BATCH | ranks(3, 8),
    "srun and its ranks": STEP | ranks(2, 4) | {"SLURM_PROCID": "2"},
    "srun with PMI": STEP | ranks(1, 4) | {"SLURM_PROCID": "1"} | PMI,
    "mpirun and its ranks": ranks(1, 4) | OPEN_MPI,
    "mpirun in a Slurm job: the step is that of its daemons": ranks(1, 4) | OPEN_MPI | STEP,
    "an MPI of one process around a script": ranks(1, 4) | {"PMI_RANK": "0", "PMI_SIZE": "1"},
    "two slurmd of one host": STEP
    | ranks(2, 4)
    | {"SLURM_PROCID": "2", "MASTER_ADDR": "127.0.0.1", "SLURMD_NODENAME": f"not-{HERE}"},
    "one host by hand": ranks(1, 2) | {"MASTER_ADDR": "127.0.0.1"},
    "a word where a number should be": {"SLURM_NTASKS": "four"},
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_fits_together_is_left_alone(name: str) -> None:
    environment.check(ACCEPTED[name])


@pytest.mark.parametrize("environ", [STEP, OPEN_MPI, PMI])
def test_several_copies_of_a_launcher_are_refused(environ: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match="4 copies of `xdist launch local`"):
        environment.check_launcher("xdist launch local", environ)


@pytest.mark.parametrize("environ", [{}, BATCH, STEP | {"SLURM_PTY_PORT": "4711"}])
def test_one_launcher_in_a_job_is_right(environ: dict[str, str]) -> None:
    environment.check_launcher("xdist launch local", environ)


def test_mpi_singletons_are_refused() -> None:
    for environ, wanted in ((STEP, 4), (PMI, 4), ({}, 2)):
        with pytest.raises(LaunchError, match="mpi4py belongs to another MPI") as caught:
            environment.check_mpi(0, 1, wanted, environ)
        assert "mpi-lib-version" in caught.value.do
    environment.check_mpi(0, 1, 1, {})
    environment.check_mpi(1, 4, 4, OPEN_MPI)


COMMANDS = {
    "train in a job": (["train"], BATCH),
    "train by mpirun": (["train"], OPEN_MPI),
    "RANK and PMI_RANK": (["train"], ranks(0, 2, MASTER_PORT="1") | PMI),
    "launch local by srun": (["launch", "local"], STEP),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_failure_3_ends_commands_with_3_before_torch_is_loaded(
    name: str, tmp_path: pathlib.Path
) -> None:
    words, environ = COMMANDS[name]
    config = tmp_path / "train.toml"
    config.write_text('[data]\nstore = "no.zarr"\n')
    # A torch that cannot be imported stands in front of the real one.
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = xdist(
        *words,
        str(config),
        cwd=tmp_path,
        **environ,
        PYTHONPATH=f"{tmp_path}:{':'.join(sys.path)}",
    )
    assert done.returncode == 3, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time, which a busy machine does not stretch.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert "variables seen:" in done.stderr
    assert "torch was imported" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_no_import_of_torch_to_judge_an_environment() -> None:
    code = "import sys, xdist_launchers.environment; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "False\n"
