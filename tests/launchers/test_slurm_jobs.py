"""Jobs on a real Slurm of two nodes: they train, save at the time limit, go on, and fail loudly."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.end_to_end.training import make_store
from tests.launchers.conftest import alive, wait_until
from tests.launchers.slurm_cluster import PATHS, ROOT, SlurmCluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = "configs/quickstart.toml"
TRAIN = str(ROOT / "slurm" / "train.sh")
# The quickstart's model and optimizer; shorter sequences, fewer steps, nothing saved on the way.
SHORT = (
    "train.curriculum=[{length=64,batch=1,steps=12},{length=128,batch=1,steps=8}]",
    "train.tile_tokens=64",
    "evaluate.length=100",
    "evaluate.tokens=200",
    "certify.length=64",
)
LONG = (
    "train.curriculum=[{length=64,batch=1,steps=100000}]",
    "checkpoint.every_steps=5",
    *SHORT[1:],
)
PATIENCE_S = 200.0
# Before the limit. Of a limit within the next three minutes Slurm warns at once; two are left.
WARNING_S = 150


@dataclass
class Job:
    """A submitted job, its run and its log."""

    cluster: SlurmCluster
    number: int
    run: pathlib.Path
    log: pathlib.Path

    def pid(self, rank: int) -> int:
        """The process that trains as `rank`, 0 while there is none."""
        # Another cluster on this host may have a job of this number.
        cluster = f"SLURM_CONF={self.cluster.env['SLURM_CONF']}"
        words = (cluster, f"SLURM_JOB_ID={self.number}", f"RANK={rank}")
        wanted = {word.encode() for word in words}
        for entry in pathlib.Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and wanted <= {
                    *(entry / "environ").read_bytes().split(b"\0")
                }:
                    return int(entry.name)
            except OSError:
                continue
        return 0

    def environment(self, rank: int) -> dict[str, str]:
        """The variables of that process."""
        text = pathlib.Path(f"/proc/{self.pid(rank)}/environ").read_text()
        return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)

    def steps(self) -> list[dict[str, Any]]:
        """The steps on record."""
        path = self.run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if "loss" in line]

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.steps()]

    def wait_for_step(self, step: int) -> None:
        """Until that step is on record; what the job printed if it ends before."""

        def reached() -> bool:
            assert self.cluster.job(self.number)["JobState"] in ("PENDING", "RUNNING"), self.said()
            return len(self.steps()) >= step

        wait_until(reached, PATIENCE_S)

    def end(self) -> tuple[str, str]:
        """State and exit code once it has ended for good."""
        job = self.cluster.wait_for(self.number)
        return job["JobState"], job["ExitCode"].split(":")[0]

    def status(self) -> dict[str, Any]:
        return json.loads((self.run / "status.json").read_text())

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else "(no log)"


@dataclass
class Place:
    """Where jobs are submitted: a cluster, and a folder with a store and the runs."""

    cluster: SlurmCluster
    folder: pathlib.Path
    env: dict[str, str]

    def settings(self, name: str, *settings: str) -> list[str]:
        runs = [f"run.directory={self.folder / 'runs'}", f"run.name={name}"]
        return [f"data.store={self.folder / 'store.zarr'}", *runs, *settings]

    def sbatch(self, name: str, *settings: str, options: tuple[str, ...] = ()) -> Job:
        """`sbatch slurm/train.sh CONFIG ...`."""
        log = f"--output={self.folder}/{name}-%j.log"
        words = [*options, log, TRAIN, CONFIG, *self.settings(name, *settings)]
        out = self.cluster.run("sbatch", "--parsable", *words, cwd=ROOT, env=self.env)
        return self._job(int(out), name, self.folder / f"{name}-{out.strip()}.log")

    def launch(self, name: str, *settings: str, env: dict[str, str] | None = None) -> Job:
        """`xdist launch slurm CONFIG ...`."""
        words = ["-P", "-m", "xdist_launchers.cli", "launch", "slurm", CONFIG]
        words += self.settings(name, *settings)
        out = self.cluster.run(sys.executable, *words, cwd=ROOT, env=self.env | (env or {}))
        number = int(out.split(":")[0].removeprefix("job "))
        job = self._job(number, name, self.folder / "runs" / name / "logs" / f"slurm-{number}.log")
        assert str(job.log) in out
        return job

    def _job(self, number: int, name: str, log: pathlib.Path) -> Job:
        return Job(self.cluster, number, self.folder / "runs" / name, log)


@pytest.fixture(scope="module")
def place(slurm: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("slurm")
    make_store(folder)
    # Slurm hands the environment of sbatch on to the job.
    env = {"PYTHONPATH": PATHS, "XDIST_PYTHON": sys.executable}
    yield Place(slurm, folder, env)
    for line in slurm.run("squeue", "--noheader", "--format=%i").split():
        slurm.cancel(int(line))


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> Job:
    """The quickstart's model on two nodes, by `sbatch slurm/train.sh`."""
    job = place.sbatch("undisturbed", *SHORT, options=("-N2", "--ntasks=2"))
    assert job.end() == ("COMPLETED", "0"), job.said()
    return job


def test_sbatch_on_two_nodes_trains_the_quickstart_model(undisturbed: Job) -> None:
    assert [line["step"] for line in undisturbed.steps()] == list(range(1, 21))
    assert undisturbed.status()["state"] == "finished"
    said = undisturbed.said()
    assert f"xdist: job {undisturbed.number}, start 1, " in said
    assert "2 rank(s) on 2 node(s) n[0-1], meeting at 127.0.0.1 port " in said
    assert "step 20/20" in said
    log = undisturbed.run / "logs" / "rank-1.log"
    assert log.read_text().startswith(f"== job {undisturbed.number}, start 1, rank 1 on n1\n")
    assert log.stat().st_mode & 0o077 == 0


def _signals_pending(pid: int) -> int:
    """Signals that wait for a stopped process, as a mask."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return int(fields["ShdPnd"], 16) | int(fields["SigPnd"], 16)


def _limit(job: Job, minutes: int) -> None:
    words = ["update", f"JobId={job.number}", f"TimeLimit={minutes}"]
    job.cluster.run("scontrol", *words)


MODULE = """() {  echo "$@" >> "$MODULES_LOADED"
}"""


def test_at_its_time_limit_a_job_saves_is_requeued_resumes_and_loses_no_bit(
    place: Place, undisturbed: Job
) -> None:
    modules = place.folder / "modules"
    job = place.launch(
        "limited",
        *SHORT,
        "slurm.nodes=2",
        "slurm.time_minutes=10",
        f"slurm.signal_s={WARNING_S}",
        'slurm.modules=["cuda/12.4", "nccl"]',
        "slurm.container=env 'INSIDE=a b $HOME'",
        "slurm.interface=lo",
        'slurm.options=["--comment=two words; $(touch x) `id`", "--nice=0"]',
        env={"BASH_FUNC_module%%": MODULE, "MODULES_LOADED": str(modules)},
    )
    job.wait_for_step(3)
    shown = place.cluster.job(job.number)
    assert (shown["TimeLimit"], shown["NumNodes"], shown["Requeue"]) == ("00:10:00", "2", "1")
    hours, minutes, _ = map(int, shown["RunTime"].split(":"))
    # A step that takes until the limit is near: rank 1 stands still until Slurm's signal,
    # which the batch script hands on, has reached it.
    pid = job.pid(1)
    seen = job.environment(1)
    os.kill(pid, signal.SIGSTOP)
    try:
        # The limit comes so soon, on any machine, that Slurm warns when it looks for the next
        # time, which it does twice a minute.
        _limit(job, 60 * hours + minutes + 3)
        wait_until(lambda: bool(_signals_pending(pid) >> (signal.SIGUSR1 - 1) & 1), PATIENCE_S)
    finally:
        os.kill(pid, signal.SIGCONT)
    comment = place.cluster.run("squeue", "--noheader", "--format=%k", "--job", str(job.number))
    assert comment.strip() == "two words; $(touch x) `id`"
    wait_until(lambda: place.cluster.job(job.number)["Restarts"] == "1", PATIENCE_S)
    _limit(job, 60)
    saved = job.status()
    assert (saved["state"], saved["exit_code"]) == ("preempted", 75)
    assert 3 <= saved["step"] < 20

    assert job.end() == ("COMPLETED", "0"), job.said()
    assert job.losses() == undisturbed.losses()
    said = job.said()
    assert f"xdist: job {job.number}, start 1, " in said
    assert "stopped and saved; requeued, to go on by itself" in said
    assert f"xdist: job {job.number}, start 2 (requeued 1 times), " in said
    assert said.index("start 1") < said.index("stopped and saved") < said.index("start 2")
    log = (job.run / "logs" / "rank-1.log").read_text()
    assert log.count(f"== job {job.number}, start ") == 2
    assert seen["INSIDE"] == "a b $HOME"
    assert (seen["GLOO_SOCKET_IFNAME"], seen["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")
    assert (seen["OMP_NUM_THREADS"], seen["CUDA_VISIBLE_DEVICES"]) == ("1", "")
    assert seen["PATH"].startswith(f"{pathlib.Path(sys.executable).parent}:")
    assert modules.read_text() == "load cuda/12.4 nccl\n" * 2
    assert not (ROOT / "x").exists()
    assert job.log.stat().st_mode & 0o077 == 0


@pytest.fixture(scope="module")
def side_by_side(place: Place) -> dict[str, Job]:
    """Two jobs at once on the same nodes; of each a rank is lost in another way."""
    options = ("-N2", "--ntasks=2")
    jobs = {name: place.sbatch(name, *LONG, options=options) for name in ("killed", "cancelled")}
    for job in jobs.values():
        job.wait_for_step(6)  # the checkpoint of step 5 is there
    ports = {job.environment(0)["MASTER_PORT"] for job in jobs.values()}
    assert len(ports) == 2
    os.kill(jobs["killed"].pid(1), signal.SIGKILL)
    jobs["killed"].end()
    # The other job did not notice.
    jobs["cancelled"].wait_for_step(len(jobs["cancelled"].steps()) + 2)
    place.cluster.run("scancel", f"{jobs['cancelled'].number}.0")
    jobs["cancelled"].end()
    return jobs


def test_a_killed_rank_ends_the_job_with_7_and_is_named(side_by_side: dict[str, Job]) -> None:
    job = side_by_side["killed"]
    assert job.end() == ("FAILED", "7"), job.said()
    status = job.status()
    assert (status["state"], status["exit_code"], status["rank"]) == ("failed", 7, 1)
    assert status["host"] == "n1"
    assert "rank 1 on n1 was killed; killed by signal 9 (SIGKILL), host memory" in status["reason"]
    assert status["last_checkpoint"].rpartition("/")[2].startswith("step-")
    held = float(re.search(r"rank 1 held (\d+\.\d\d) GiB", status["reason"])[1])  # type: ignore[index]
    assert 0.05 < held < 5
    assert "xdist: rank 1 on n1 was killed\nkilled by signal 9 (SIGKILL)" in job.said()
    assert not any(alive(pid) for pid in (job.pid(0), job.pid(1)) if pid)


def test_a_cancelled_step_ends_the_job_with_7(side_by_side: dict[str, Job]) -> None:
    job = side_by_side["cancelled"]
    assert job.end() == ("FAILED", "7"), job.said()
    assert job.status()["exit_code"] == 7
    assert job.status()["state"] == "failed"


def test_two_jobs_at_once_do_not_collide(side_by_side: dict[str, Job]) -> None:
    killed, cancelled = (side_by_side[name].losses() for name in ("killed", "cancelled"))
    both = min(len(killed), len(cancelled))
    assert both >= 2
    assert killed[:both] == cancelled[:both]


def test_a_lost_rank_is_restarted_within_the_job(place: Place, undisturbed: Job) -> None:
    settings = ("checkpoint.every_steps=2", "launch.max_restarts=1")
    job = place.sbatch("restarted", *SHORT, *settings, options=("-N2", "--ntasks=2"))
    job.wait_for_step(5)
    os.kill(job.pid(0), signal.SIGKILL)
    assert job.end() == ("COMPLETED", "0"), job.said()
    assert "restart 1 of 1" in job.said()
    assert job.losses() == undisturbed.losses()


def test_a_second_job_of_a_run_is_refused_and_scancel_saves_without_requeue(place: Place) -> None:
    job = place.launch("stopped", *LONG, "slurm.nodes=2")
    job.wait_for_step(2)
    second = place.sbatch("stopped", *LONG, options=("-N2", "--ntasks=2"))
    assert second.end() == ("FAILED", "3"), second.said()
    assert f"xdist: job {job.number} is running in {job.run}" in second.said()
    steps = len(job.steps())
    job.wait_for_step(steps + 1)
    place.cluster.run("scancel", str(job.number))
    assert job.end()[0] == "CANCELLED"
    wait_until(lambda: job.status()["state"] == "preempted", 30)
    assert place.cluster.job(job.number)["Restarts"] == "0"
    wait_until(lambda: not job.pid(0) and not job.pid(1), 30)


def test_each_rank_sees_all_cards_of_its_node_and_has_one_of_its_own(place: Place) -> None:
    options = ("-N2", "--ntasks=4", "--ntasks-per-node=2", "--gpus-per-task=1")
    job = place.sbatch("cards", *LONG, "parallel.ulysses=4", "launch.ranks=4", options=options)
    job.wait_for_step(1)
    seen = [job.environment(rank) for rank in range(4)]
    assert [env["LOCAL_RANK"] for env in seen] == ["0", "1", "0", "1"]
    assert [env["LOCAL_WORLD_SIZE"] for env in seen] == ["2"] * 4
    assert [env["CUDA_VISIBLE_DEVICES"] for env in seen] == ["0,1"] * 4
    place.cluster.cancel(job.number)


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ((), (), "this config needs 2 ranks, and 1 is running"),
        (("slurm.container=env A=1",), ("-n2",), "slurm/train.sh does not apply slurm.container"),
        (("model.dims=3",), ("-n2",), "unknown key model.dims"),
    ],
)
def test_a_wrong_job_ends_with_2_before_any_rank_is_started(
    place: Place, settings: tuple[str, ...], options: tuple[str, ...], said: str
) -> None:
    job = place.sbatch("wrong", *SHORT, *settings, options=options)
    assert job.end() == ("FAILED", "2"), job.said()
    assert job.said().count(said) == 1
    assert "srun" not in job.said()
    assert "sbatch --nodes=1 --ntasks=2 slurm/train.sh" in job.said() or settings


def test_shellcheck_finds_nothing(tmp_path: pathlib.Path) -> None:
    words = ["-P", "-m", "xdist_launchers.cli", "launch", "slurm", "--print", CONFIG]
    words += ["slurm.nodes=2", 'slurm.modules=["a", "b/1"]', "slurm.container=run image.sif"]
    words += ["slurm.interface=ib0", 'slurm.options=["--qos=long"]', "slurm.gpus_per_task=1"]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": PATHS},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    (tmp_path / "own.sh").write_text(done.stdout)
    for script in (TRAIN, str(tmp_path / "own.sh")):
        checked = subprocess.run(["shellcheck", script], stdout=subprocess.PIPE, check=False)
        assert checked.returncode == 0, checked.stdout.decode()
