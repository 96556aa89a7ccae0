"""What a batch script of Slurm calls: before the ranks (`begin`), as each rank, and after (`end`).

`begin KIND NODE_ADDRESS CONFIG [key=value ...]` prints where the ranks meet;
`rank CONFIG ...` is one task of srun; `end CODE ASKED CONFIG ...` says what comes next.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from xdist.config import Config, load
from xdist.config_checks import Problem, raise_problems, store_problem, world_problem
from xdist.errors import LaunchError
from xdist.rank import is_loopback
from xdist_launchers import slurm_env
from xdist_launchers.failure import Failure, failure_of, read_failure, tell
from xdist_launchers.job import error_file
from xdist_launchers.rank_env import PORT_TRIES, new_nonce
from xdist_launchers.run_state import Progress, replace_status
from xdist_launchers.slurm_rank import run_task

PREEMPTED = 75
_SIGABRT = 6


def begin(kind: str, node_address: str, path: str, overrides: Sequence[str]) -> int:
    """Check the job, clear what an earlier start left, and print address, port and nonce.

    `kind` is "own" for a script that was rendered for this config, "any" for slurm/train.sh.
    """
    config = load(path, overrides)
    job, nodes = int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_JOB_NUM_NODES"])
    tasks = int(os.environ["SLURM_NTASKS"])
    _check(config, path, tasks, kind)
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    logs = config.run_directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    attempt = _Attempt(logs)
    _refuse_two_jobs(attempt.job, job, config.run_directory)
    for pattern in ("rank-*.error.json", "rank-*.started", "rank-*.ended"):
        for stale in logs.glob(pattern):
            stale.unlink()
    attempt.begin(job, start, Progress(config.run_directory))
    address = slurm_env.master_address(node_address, config.slurm.interface, nodes)
    port = slurm_env.free_port(address, job, attempt.number)
    text = f"xdist: job {job}, start {start + 1}"
    text += f" (requeued {start} times)" if start else ""
    text += f", attempt {attempt.number + 1}" if attempt.number else ""
    _say(f"{text}, {time.strftime('%Y-%m-%d %H:%M:%S %z')}")
    where = os.environ.get("SLURM_JOB_NODELIST", socket.gethostname())
    _say(f"{tasks} rank(s) on {nodes} node(s) {where}, meeting at {address} port {port}; {logs}/")
    if not is_loopback(address):
        _say("c10d is not authenticated: the network of the nodes must be private")
    print(address, port, new_nonce())
    return 0


def _check(config: Config, path: str, tasks: int, kind: str) -> None:
    world = world_problem(config, tasks)
    if world is not None:
        options = f"--nodes={config.slurm.nodes} --ntasks={config.ranks}"
        options += " --gpus-per-task=1" if config.slurm.gpus_per_task else ""
        do = f"xdist launch slurm {path}, or sbatch {options} slurm/train.sh {path}"
        world = Problem(world.keys, world.what, world.why, do, world.kind)
    found = [problem for problem in (world, store_problem(config)) if problem is not None]
    if kind == "any":
        differing = _differing(config)
        lost = [key for key in differing if key in ("slurm.modules", "slurm.container")]
        if lost:
            what = f"slurm/train.sh does not apply {' and '.join(lost)}"
            do = f"use `xdist launch slurm {path}`, which renders a script with these settings"
            keys = tuple(tuple(key.split(".")) for key in lost)
            found.append(Problem(keys, what, "it was rendered without this config", do))
        elif differing:
            _say(
                f"not applied by slurm/train.sh, which was rendered without this config: "
                f"{', '.join(differing)}; give them to sbatch, or use xdist launch slurm {path}"
            )
    raise_problems(found, path)


def _refuse_two_jobs(other: int, job: int, directory: pathlib.Path) -> None:
    """Refuse to write into the folder of a run that another job is writing to.

    Inside a container there is often no squeue; then nothing is known of the other job.
    """
    squeue = shutil.which("squeue")
    if squeue is None or other in (0, job):
        return
    words = ["--noheader", f"--job={other}", "--states=RUNNING,SUSPENDED", "--format=%i"]
    done = subprocess.run([squeue, *words], capture_output=True, text=True, check=False)
    if done.stdout.strip():
        raise LaunchError(
            f"job {other} is running in {directory}",
            f"job {job} would write the same metrics and checkpoints",
            f"give this one another run.name, or end the other: scancel {other}",
        )


def _differing(config: Config) -> list[str]:
    """Settings of [slurm] that only a rendered script applies, and that are not the defaults."""
    default = Config().slurm
    applied = ("interface", "requeue")
    return [
        f"slurm.{name}"
        for name in type(default).model_fields
        if name not in applied and getattr(config.slurm, name) != getattr(default, name)
    ]


class _Attempt:
    """logs/slurm.json: which start of which job this is, and how far the run was before it."""

    def __init__(self, logs: pathlib.Path) -> None:
        self._path = logs / "slurm.json"
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else "{}"
        self._values: dict[str, Any] = json.loads(text)

    @property
    def job(self) -> int:
        """The job that began here last, 0 when there was none."""
        return int(self._values.get("job", 0))

    @property
    def number(self) -> int:
        """Starts of the ranks before this one within the same start of the job."""
        return int(self._values.get("attempt", 0))

    @property
    def restarts(self) -> int:
        """Those of them that followed a lost rank."""
        return int(self._values.get("restarts", 0))

    def begin(self, job: int, start: int, progress: Progress) -> None:
        """Note what is known now; the counts go on only within one start of one job."""
        same = (self._values.get("job"), self._values.get("start")) == (job, start)
        kept = {key: self._values[key] for key in ("attempt", "restarts") if same}
        self._write({"attempt": 0, "restarts": 0, **kept, "job": job, "start": start})
        self._write({**self._values, "step": progress.step, "checkpoint": progress.checkpoint})

    def again(self, *, lost_rank: bool) -> None:
        """Count one more start."""
        counts = {"attempt": self.number + 1, "restarts": self.restarts + lost_rank}
        self._write({**self._values, **counts})

    def made_progress(self, now: Progress) -> bool:
        """Whether a checkpoint was saved since this start began."""
        return bool(now.checkpoint) and now.checkpoint != self._values.get("checkpoint")

    def _write(self, values: dict[str, Any]) -> None:
        self._values = values
        beside = self._path.with_name(".slurm.json.new")
        beside.write_text(json.dumps(values) + "\n", encoding="utf-8")
        beside.replace(self._path)


def end(code: int, asked: bool, path: str, overrides: Sequence[str]) -> int:
    """Tell how the ranks ended, given srun's exit code; print what the batch script does next.

    Prints "end", "start" (the ranks start again in this job) or "requeue"; returns the exit code
    of the run: that of the rank that failed first, 7 where ranks were killed, 75 when they saved.
    """
    config = load(path, overrides)
    directory = config.run_directory
    first = _first(directory)
    codes = [int(file.read_text() or 1) for file in (directory / "logs").glob("rank-*.ended")]
    if first is None and len(codes) == int(os.environ["SLURM_NTASKS"]):
        # What srun says is also about tasks that it ended itself.
        code = max(codes)
    if code == 0 and first is None:
        print("end")
        return 0
    if code == PREEMPTED and first is None:
        requeue = asked and config.slurm.requeue
        _say("stopped and saved" + ("; requeued, to go on by itself" if requeue else ""))
        print("requeue" if requeue else "end")
        return PREEMPTED
    failure = first or _unexplained(code)
    replace_status(directory, failure)
    attempt = _Attempt(directory / "logs")
    next_step = _next(config, failure, attempt)
    details = error_file(directory, failure.rank)
    tell(failure, str(details) if details.exists() else "")
    print(next_step)
    return failure.exit_code


def _first(directory: pathlib.Path) -> Failure | None:
    """The failure that caused the others."""
    files = (directory / "logs").glob("rank-*.error.json")
    records = [record for record in map(read_failure, files) if record is not None]

    def order(record: Failure) -> tuple[bool, bool, float]:
        # gloo ends a process with SIGABRT when it loses a peer at a bad moment.
        aborted = record.why.startswith(f"killed by signal {_SIGABRT} ")
        return (record.is_consequence, aborted, record.time_s)

    return min(records, key=order, default=None)


def _unexplained(code: int) -> Failure:
    """No rank left a reason: srun could not start them, or all were killed at once."""
    host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    if code > 128:
        what, number = "the ranks were killed", code - 128
        why = (
            f"srun ended with {code}: signal {number}; their step was cancelled or a node was lost"
        )
        do = "submit the job again; it resumes from the newest checkpoint"
        return Failure(0, host, 7, "StepKilled", what, why, do, "", time.time())
    what = "the ranks did not start"
    why = f"srun ended with exit code {code}, and no rank left a reason"
    do = "read the lines of srun and Python above; docs/slurm.md lists what they mean"
    return Failure(0, host, 3, "LaunchError", what, why, do, "", time.time())


def _next(config: Config, failure: Failure, attempt: _Attempt) -> str:
    """Whether the ranks start again: after a lost rank as launch.max_restarts says, and while
    another process has the port."""
    if failure.kind == "PortError" and attempt.number + 1 < PORT_TRIES:
        attempt.again(lost_rank=False)
        return "start"
    progress = attempt.made_progress(Progress(config.run_directory))
    if failure.exit_code == 7 and attempt.restarts < config.launch.max_restarts and progress:
        attempt.again(lost_rank=True)
        _say(f"{failure.what}; restart {attempt.restarts} of {config.launch.max_restarts}")
        return "start"
    return "end"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(words: Sequence[str]) -> int:
    """`python -m xdist_launchers.slurm_job begin|rank|end ...`, for batch scripts only."""
    os.umask(0o077)
    try:
        match words:
            case ["begin", kind, node_address, path, *overrides]:
                return begin(kind, node_address, path, overrides)
            case ["rank", path, *overrides]:
                return run_task(path, overrides)
            case ["end", code, asked, path, *overrides]:
                return end(int(code), asked == "yes", path, overrides)
        _say(__doc__ or "")
        return 2
    except (Exception, KeyboardInterrupt) as error:
        failure = failure_of(error)
        tell(failure)
        return failure.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
