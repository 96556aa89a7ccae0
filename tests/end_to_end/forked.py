"""Runs whose ranks do something bad at a named point: forked from one process that loaded torch.

The loading costs seconds, so it is done once for all runs; each rank then is a process of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NoReturn

from tests.end_to_end.training import config_of, status_of
from tests.launchers.conftest import PATHS
from xdist.config import Config

TWO = ("parallel.ulysses=2", "launch.ranks=2")


@dataclass
class Case:
    """One run; in its `count`-th passing of `point`, rank `rank` does `act`.

    `settled`: the ranks that must end by themselves (None: all); the others are killed then.
    """

    name: str
    settings: list[str] = field(default_factory=list)
    ranks: int = 2
    rank: int = 1
    act: str = ""
    point: str = ""
    count: int = 1
    settled: list[int] | None = None


@dataclass
class Ended:
    """Exit codes by rank (None: it had to be killed), seconds from the act to the last end of a
    rank that ended by itself, and what each rank printed."""

    codes: list[int | None]
    seconds: float
    said: list[str]


class Helper:
    """The process that loaded torch and forks ranks. It starts with the first `drive`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def drive(
        self, folder: pathlib.Path, cases: list[Case], *, at_once: int = 3
    ) -> dict[str, Ended]:
        """Make all runs, a few at a time; how they ended, by name. Nothing is left running."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        asked = {
            "folder": str(folder),
            "cases": [asdict(case) for case in cases],
            "at_once": at_once,
        }
        try:
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            assert answer, f"the helper ended with {process.wait()}"
        except BaseException:
            # A test's time limit too: its ranks would go on beside the next test.
            self.close()
            raise
        found = {name: Ended(**fields) for name, fields in json.loads(answer).items()}
        for name, ended in found.items():
            print(f"--- {name}: {ended.codes} {ended.seconds:.1f} s", *ended.said, sep="\n")
        return found

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.end_to_end import forked; forked.serve()"],
            env=os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        return self._process

    def close(self) -> None:
        """End the process, and the ranks it forked."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
            self._process = None


def load() -> None:
    """Load, but do not use, what ranks need: no threads, no state."""
    import safetensors.torch  # noqa: F401
    import torch._dynamo  # noqa: F401 - torch's optimizers import it when they are made
    import zarr  # noqa: F401

    import xdist.models.hybrid_lm
    import xdist.plan.step
    import xdist.train.engines.fsdp
    import xdist.train.report
    import xdist.train.text_work  # noqa: F401


def serve() -> None:
    """The helper process: a line with cases comes in, a line with how they ended goes out."""
    load()
    for line in sys.stdin:
        print(json.dumps(_ended(json.loads(line))), flush=True)


def _ended(asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    folder = pathlib.Path(asked["folder"])
    waiting = [Case(**fields) for fields in asked["cases"]]
    running: list[_Running] = []
    ended: dict[str, dict[str, Any]] = {}
    while waiting or running:
        while waiting and len(running) < asked["at_once"]:
            running.append(_Running(folder, waiting.pop(0)))
        for one in list(running):
            if one.has_ended():
                running.remove(one)
                ended[one.case.name] = asdict(one.outcome())
        time.sleep(0.02)
    return ended


class _Running:
    def __init__(self, folder: pathlib.Path, case: Case) -> None:
        self.folder, self.case = folder, case
        self.codes: list[int | None] = [None] * case.ranks
        self.ended_at = 0.0
        port = free_port()
        self.pids = [
            fork(partial(_be_rank, folder, case, rank, port)) for rank in range(case.ranks)
        ]

    def has_ended(self) -> bool:
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None and (status := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(status[1])
                self.ended_at = time.time()
        settled = range(self.case.ranks) if self.case.settled is None else self.case.settled
        return all(self.codes[rank] is not None for rank in settled)

    def outcome(self) -> Ended:
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        acted = self.folder / f"{self.case.name}.acted"
        began = acted.stat().st_mtime if acted.exists() else self.ended_at
        said = [_log(self.folder, self.case, r).read_text() for r in range(self.case.ranks)]
        return Ended(self.codes, self.ended_at - began, said)


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def fork(body: Callable[[], NoReturn]) -> int:
    """Run `body` in a child process; its process id."""
    child = os.fork()
    if child == 0:
        try:
            body()
        finally:
            os._exit(1)
    return child


def be(rank: int, ranks: int, port: int, log: pathlib.Path) -> None:
    """Give this process a rank's variables, and its output a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}


def _log(folder: pathlib.Path, case: Case, rank: int) -> pathlib.Path:
    return folder / f"{case.name}.{rank}.log"


def _be_rank(folder: pathlib.Path, case: Case, rank: int, port: int) -> NoReturn:
    code = 1
    try:
        be(rank, case.ranks, port, _log(folder, case, rank))
        from xdist.checkpoint.points import Cut, ignore
        from xdist.errors import XdistError
        from xdist.train import run

        more = TWO if case.ranks == 2 else (f"parallel.ulysses={case.ranks}",)
        config = config_of(folder, case.name, *(more if case.ranks > 1 else ()), *case.settings)
        on_point, build = ignore, None
        act = Act(folder / f"{case.name}.acted", case.act)
        if case.act in MODELS:
            build = MODELS[case.act](rank == case.rank, case.count, act)
        elif rank == case.rank and case.point == "data":
            act.before_reading(case.count)
        elif rank == case.rank and case.point == "evaluation":
            act.before_evaluating(case.count)
        elif case.act == "term_twice_later" and rank != case.rank:
            # The peer of the rank that is told twice: lets it wait in its move until it ends.
            on_point = Cut(case.point, case.count, lambda name: _await_end(config))
        elif rank == case.rank and case.act:
            on_point = Cut(case.point, case.count, act)
        try:
            code = run(config, build=build, on_point=on_point)
        except XdistError as error:
            print(error)
            code = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _await_end(config: Config, seconds: float = 30.0) -> None:
    """Do nothing until the run said that it was stopped, and its process had time to end."""
    stop_at = time.monotonic() + seconds
    while time.monotonic() < stop_at and status_of(config)["state"] != "preempted":
        time.sleep(0.05)
    time.sleep(0.5)


class Act:
    """What a bad rank does. Leaves a file that says when."""

    def __init__(self, note: pathlib.Path, name: str) -> None:
        self.note, self.name = note, name

    def __call__(self, point: str) -> None:
        """Do it."""
        self.note.touch()
        kind, _, seconds = self.name.partition(" ")
        getattr(self, kind)(float(seconds or 0))

    def sleep(self, seconds: float) -> None:
        """Do nothing for a while."""
        time.sleep(seconds)

    def stop(self, _: float) -> None:
        """As a debugger or a batch system does it."""
        os.kill(os.getpid(), signal.SIGSTOP)

    def kill(self, _: float) -> None:
        """As the kernel does it."""
        os.kill(os.getpid(), signal.SIGKILL)

    def hold_lock(self, seconds: float) -> None:
        """A native call that keeps Python's lock."""
        ctypes.PyDLL(None).sleep(int(seconds))

    def little_memory(self, megabytes: float) -> None:
        """Allow this process only so much more memory."""
        pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + int(megabytes * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    def full_disk(self, seconds: float) -> None:
        """No file grows any more; then as `sleep`."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        time.sleep(seconds)

    def term(self, _: float) -> None:
        """Ask this rank alone to stop."""
        os.kill(os.getpid(), signal.SIGTERM)

    def term_twice(self, _: float) -> None:
        """Ask this rank alone to stop, and ask again."""
        for _i in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            # A handler runs between two instructions.
            time.sleep(0.01)

    def term_twice_later(self, _: float) -> None:
        """Have another process ask twice, when this one waits in a move."""
        pid = os.getpid()

        def ask() -> NoReturn:
            for _i in range(2):
                time.sleep(1.0)
                os.kill(pid, signal.SIGTERM)
            os._exit(0)

        fork(ask)

    def before_evaluating(self, count: int) -> None:
        """Do it before the `count`-th batch of evaluations."""
        from xdist.train import evaluate

        evaluate.read_batch = self._before(evaluate.read_batch, count)

    def before_reading(self, count: int) -> None:
        """Do it in the reading thread, before the `count`-th batch (a signal: in this process)."""
        from xdist.data import loader

        loader.read_batch = self._before(loader.read_batch, count)

    def _before(self, function: Callable[..., Any], count: int) -> Callable[..., Any]:
        calls = [0]

        def other(*args: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == count:
                self(self.name)
            return function(*args, **more)

        return other

    def term_and_sleep(self, seconds: float) -> None:
        """Ask this rank to stop while it waits for what never comes."""
        os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(OSError):
            time.sleep(seconds)


def _odd_model(change: str) -> Callable[..., Any]:
    """A builder of models of which one rank's makes another move in one call."""

    def build(bad: bool, count: int, act: Act) -> Callable[[Any], Any]:
        import torch
        from torch import nn

        import xdist
        from xdist import comm

        class Odd(nn.Module):
            def __init__(self, config: Any) -> None:
                super().__init__()
                self.table = nn.Embedding(config.model.vocab_size, 8)
                self.head = nn.Parameter(0.1 * torch.randn(config.model.vocab_size, 8))
                self.calls = 0

            def loss(self, tokens: Any, labels: Any, shard: Any, *, valid_tokens: int) -> Any:
                self.calls += 1
                group, hidden = shard.mesh.sequence_group, self.table(tokens)
                now = bad and self.calls == count
                if now:
                    act.note.touch()
                if now and change == "other":
                    comm.switch(hidden.detach(), group, from_dim=1, to_dim=2)
                elif now and change == "shape":
                    comm.gather(hidden.detach()[:, :, :4], group, dim=1)
                elif not (now and change == "skip"):
                    comm.gather(hidden.detach(), group, dim=1)
                return xdist.cross_entropy(
                    hidden, self.head, labels, shard, valid_tokens=valid_tokens
                )

        return Odd

    return build


MODELS = {f"{change}_a_move": _odd_model(change) for change in ("skip", "other", "shape")}
