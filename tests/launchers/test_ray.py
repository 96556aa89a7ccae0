"""`xdist launch ray` on real clusters: two nodes on loopback, private ones, Ray jobs."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from tests.launchers.conftest import PATHS, wait_until
from tests.launchers.ray_nodes import RayNodes
from tests.launchers.runs import Small

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

XDIST = (sys.executable, "-P", "-m", "xdist_launchers.cli")
STEPS = 40
PATIENCE_S = 400.0
_LOOPBACK = ("127.0.0.1", "::ffff:127.0.0.1", "::1")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small.make(tmp_path_factory.mktemp("ray"), steps=STEPS)


@pytest.fixture(scope="module")
def reference(small: Small) -> list[float]:
    """The losses of an undisturbed run under the local launcher, two ring ranks."""
    words = small.words("reference", "parallel.ring=2", degree=1)
    done = subprocess.run(
        [*XDIST, "launch", "local", *words],
        env=os.environ | {"PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return small.losses("reference")


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    """A head and a second node with one CPU each: two ranks are spread over both."""
    with RayNodes(cpus=1) as cluster:
        cluster.add(cpus=1)
        yield cluster


class Launch:
    """A driver of `xdist launch ray`, and what it printed."""

    def __init__(self, small: Small, name: str, *settings: str, **env: str) -> None:
        self.small, self.name = small, name
        self.output = small.folder / f"{name}.out"
        words = small.words(name, "parallel.ring=2", "checkpoint.every_steps=3", degree=1)
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [*XDIST, "launch", "ray", *words, *settings],
                env=os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"} | env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def steps(self) -> int:
        file = self.small.run(self.name) / "metrics.jsonl"
        return file.read_text().count('"loss"') if file.exists() else 0

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.process.poll() is not None or self.steps() >= step, PATIENCE_S)
        assert self.process.poll() is None, self.said()

    def end(self) -> int:
        return self.process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def intruder(small: Small, nodes: RayNodes) -> Iterator[Launch]:
    """A driver with another token; it tries for long, so that it starts before other tests."""
    wrong = small.folder / "wrong-token"
    wrong.write_text("0" * 64)
    env = nodes.env | {"RAY_AUTH_TOKEN_PATH": str(wrong)}
    with Launch(small, "intruder", f"ray.address={nodes.address}", **env) as launch:
        yield launch


def ranks_of(run: pathlib.Path) -> dict[int, psutil.Process]:
    """The processes that train for a run, by rank."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        for word in words:
            if word.startswith(str(run)) and word.endswith(".error.json"):
                found[int(word.rpartition("rank-")[2].split(".")[0])] = process
    return found


def test_a_node_killed_in_mid_step_is_replaced_and_the_losses_are_the_same(
    small: Small, nodes: RayNodes, reference: list[float]
) -> None:
    settings = (f"ray.address={nodes.address}", "launch.max_restarts=1", "ray.heartbeat_s=8")
    with Launch(small, "killed", *settings, **nodes.env) as launch:
        launch.wait_for_step(7)
        ranks = ranks_of(small.run("killed"))
        parents = {rank: process.parent() for rank, process in ranks.items()}
        second = {process.pid for process in nodes.processes(1)}
        (lost,) = [rank for rank, parent in parents.items() if parent and parent.pid in second]
        nodes.kill(1)
        # Of two nodes with one CPU each one is left: the driver waits for another.
        wait_until(lambda: "waiting for room" in launch.said(), PATIENCE_S)
        nodes.add(cpus=1)
        assert launch.end() == 0, launch.said()
    said = launch.said()
    (line,) = [line for line in said.splitlines() if "restart 1 of 1" in line]
    assert line.startswith(f"rank {lost} on ")
    assert " died after step " in line
    assert "Ray node " in line
    assert "127.0.0.1" in line
    assert "resuming from step-" in said
    assert small.losses("killed") == reference
    assert small.status("killed")["state"] == "finished"


def test_a_silent_actor_counts_as_lost_and_a_killed_rank_too(
    small: Small, nodes: RayNodes, reference: list[float]
) -> None:
    settings = (f"ray.address={nodes.address}", "launch.max_restarts=1", "ray.heartbeat_s=4")
    with Launch(small, "silent", *settings, **nodes.env) as launch:
        launch.wait_for_step(4)
        actor = ranks_of(small.run("silent"))[1].parent()
        assert actor is not None
        actor.suspend()
        try:
            wait_until(lambda: "restart 1 of 1" in launch.said(), PATIENCE_S)
            (line,) = [line for line in launch.said().splitlines() if "restart 1 of 1" in line]
            assert line.startswith("rank 1 on ")
            assert "was silent for ray.heartbeat_s = 4 s" in line
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                actor.resume()
        done = launch.steps()
        wait_until(lambda: len(ranks_of(small.run("silent"))) == 2, PATIENCE_S)
        launch.wait_for_step(min(done + 3, STEPS - 3))
        ranks_of(small.run("silent"))[0].kill()
        # The only restart is used up.
        assert launch.end() == 7, launch.said()
    assert "rank 0 on " in launch.said()
    assert "killed by signal 9 (SIGKILL)" in launch.said()
    status = small.status("silent")
    assert (status["state"], status["exit_code"], status["rank"]) == ("failed", 7, 0)
    with Launch(small, "silent", *settings, **nodes.env) as launch:
        assert launch.end() == 0, launch.said()
    assert small.losses("silent") == reference


@pytest.mark.usefixtures("intruder")
def test_a_ray_job_prepares_trains_and_leaves_the_true_exit_code(
    small: Small, nodes: RayNodes, tmp_path: pathlib.Path
) -> None:
    from xdist.data.prepare import prepare_text

    sources = json.dumps(
        [str(path) for path in sorted(pathlib.Path(PATHS.split(":")[0]).glob("xdist/c*.py"))]
    )
    made = tmp_path / "made.zarr"

    def command(name: str, *more: str) -> list[str]:
        words = small.words(name, "parallel.ring=2", *more, degree=1)
        words = [word for word in words if not word.startswith("data.store=")]
        steps = "train.curriculum=[{length=128,batch=1,steps=2}]"
        return [*XDIST, "launch", "ray", *words, f"data.store={made}", steps]

    # The cluster that runs the job is the one that is meant; no address is given.
    done = _submit(nodes, command("job", "ray.prepare=true", f"ray.sources={sources}"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert small.status("job")["state"] == "finished"
    prepare_text(json.loads(sources), tmp_path / "plain.zarr")
    for path in sorted((tmp_path / "plain.zarr").rglob("*")):
        if path.is_file():
            twin = made / path.relative_to(tmp_path / "plain.zarr")
            assert twin.read_bytes() == path.read_bytes()
    for chunk in (made / "train" / "tokens" / "c").iterdir():
        chunk.unlink()
    done = _submit(nodes, command("bad"))
    # `ray job submit` says 1 for every failure; status.json holds the true code.
    assert done.returncode == 1, done.stdout + done.stderr
    assert small.status("bad")["exit_code"] == 5


def _submit(nodes: RayNodes, entry: list[str]) -> subprocess.CompletedProcess[str]:
    ray = pathlib.Path(sys.executable).with_name("ray")
    return subprocess.run(
        [ray, "job", "submit", f"--address={nodes.dashboard}", "--", *entry],
        env=os.environ | nodes.env | {"PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_a_private_cluster_is_private_stops_with_75_and_leaves_nothing(
    small: Small, tmp_path: pathlib.Path
) -> None:
    temporary = pathlib.Path("/tmp") / f"x{os.getpid()}"
    temporary.mkdir(mode=0o755)
    env = {"TMPDIR": str(temporary), "HOME": str(tmp_path)}
    try:
        with Launch(small, "private", **env) as launch:
            launch.wait_for_step(3)
            top = psutil.Process(launch.process.pid)
            everyone = [top, *top.children(recursive=True)]
            _check_sockets(everyone)
            _check_secrets(everyone, temporary, launch)
            top.terminate()
            assert launch.end() == 75, launch.said()
        assert small.status("private")["state"] == "preempted"
        assert small.status("private")["exit_code"] == 75
        _, left = psutil.wait_procs(everyone, timeout=20)
        assert not left
        assert list(temporary.glob("xray-*")) == []
        # Nothing of Ray's was left at home either, no token least of all.
        assert not (tmp_path / ".ray").exists()
        with Launch(small, "private", **env) as launch:
            assert launch.end() == 0, launch.said()
        assert "resuming from step-" in launch.said()
        assert len(small.losses("private")) == STEPS
        assert list(temporary.glob("xray-*")) == []
    finally:
        subprocess.run(["rm", "-rf", str(temporary)], check=True)


def test_a_killed_driver_leaves_nothing(small: Small) -> None:
    temporary = pathlib.Path("/tmp") / f"k{os.getpid()}"
    temporary.mkdir()
    try:
        with Launch(small, "orphans", TMPDIR=str(temporary)) as launch:
            launch.wait_for_step(2)
            everyone = psutil.Process(launch.process.pid).children(recursive=True)
            launch.process.kill()
        _, left = psutil.wait_procs(everyone, timeout=120)
        assert not left
        assert list(temporary.glob("xray-*")) == []
    finally:
        subprocess.run(["rm", "-rf", str(temporary)], check=True)


def _check_sockets(everyone: list[psutil.Process]) -> None:
    """Every listening socket is on loopback: Ray's daemons, workers, driver and ranks."""
    listening = {}
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            for socket in process.net_connections("inet"):
                if socket.status == psutil.CONN_LISTEN:
                    listening[socket.laddr] = process.name()
    assert {"raylet", "gcs_server"} <= set(listening.values())
    beyond = {at: name for at, name in listening.items() if at.ip not in _LOOPBACK}
    assert not beyond


def _check_secrets(everyone: list[psutil.Process], temporary: pathlib.Path, launch: Launch) -> None:
    """The token is in one file of mode 0600 in a folder of mode 0700, and nowhere else."""
    (folder,) = temporary.glob("xray-*")
    token = folder / "token"
    secret = token.read_text()
    assert len(secret) == 64
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            assert secret not in " ".join(process.cmdline())
            env = process.environ()
            assert secret not in env.values()
            if process.name() in ("raylet", "gcs_server"):
                assert env["RAY_AUTH_MODE"] == "token"
                assert env["RAY_USAGE_STATS_ENABLED"] == "0"
    files = [file for file in folder.rglob("*") if file.is_file() and file != token]
    files += [file for file in launch.small.run(launch.name).rglob("*") if file.is_file()]
    for file in [*files, launch.output]:
        with contextlib.suppress(FileNotFoundError):
            assert secret.encode() not in file.read_bytes(), file


def test_a_cluster_lets_nobody_in_without_its_token(
    small: Small, nodes: RayNodes, intruder: Launch
) -> None:
    assert intruder.end() == 3, intruder.said()
    said = f"the Ray cluster at {nodes.address} did not let this driver in"
    assert said in intruder.said()
    assert not small.run("intruder").exists()
