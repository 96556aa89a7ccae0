"""The command line under fire: started again and again, killed from outside at random instants."""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import uuid

from tests.end_to_end.training import TEXT, config_of
from tests.launchers.conftest import PATHS, wait_until
from xdist.train.record import read_metrics

STEPS = 90
LONG = (
    f"train.curriculum=[{{length=61,batch=2,steps={STEPS // 2}}},"
    f"{{length=96,batch=2,steps={STEPS // 2}}}]",
    "checkpoint.every_steps=5",
    "evaluate.every_steps=7",
)
# Every process that descends from a command carries it in its environment.
MARK = "XDIST_TEST_KILL"
XDIST = (sys.executable, "-P", "-m", "xdist_launchers.cli")


def marked(mark: str) -> dict[int, int | None]:
    """Processes that run and inherited the mark, whoever their parent is by now, and their rank."""
    found: dict[int, int | None] = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                items = (entry / "environ").read_bytes().split(b"\0")
                if f"{MARK}={mark}".encode() in items:
                    ranks = [int(item[5:]) for item in items if item.startswith(b"RANK=")]
                    found[int(entry.name)] = ranks[0] if ranks else None
    return found


class Command:
    """`xdist launch local` on two ranks, or `xdist train` for one, started again and again."""

    def __init__(self, folder: pathlib.Path, name: str, ranks: int, *settings: str) -> None:
        more = ("parallel.ulysses=2",) if ranks == 2 else ()
        self.config = config_of(folder, name, *LONG, *more, *settings)
        self.ranks, self.mark, self.code = ranks, uuid.uuid4().hex, 0
        where = (f"run.directory={folder / 'runs'}", f"run.name={name}")
        store = f"data.store={folder / 'store.zarr'}"
        start = ("launch", "local") if ranks == 2 else ("train",)
        count = ("--ranks", "2") if ranks == 2 else ()
        file = folder / "tiny.toml"
        file.write_text(TEXT)
        self._words = [*XDIST, *start, str(file), *count, *where, store, *LONG, *more, *settings]
        self._log = folder / f"{name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.began = 0.0
        self.restarts = 0  # starts of new ranks by the launcher that was running

    def start(self) -> None:
        """Start it, unless it runs."""
        if self.process is None or self.ended:
            env = os.environ | {"PYTHONPATH": PATHS, MARK: self.mark}
            with self._log.open("ab") as log:
                self.process = subprocess.Popen(
                    self._words, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            self.began = time.monotonic()

    @property
    def ended(self) -> bool:
        """Whether the process that was started has ended."""
        assert self.process is not None
        return self.process.poll() is not None

    @property
    def step(self) -> int:
        """The last step on record."""
        lines = read_metrics(self.config.run_directory)
        return lines[-1]["step"] if lines else 0

    def finish(self) -> int:
        """Wait for its end, which leaves no process behind; its exit code."""
        assert self.process is not None
        code = self.process.wait(timeout=240)
        wait_until(lambda: not marked(self.mark), 60)
        return code

    def clear(self) -> None:
        """After a failure of the test: end what is left."""
        for pid in marked(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    @property
    def said(self) -> str:
        """All that was printed."""
        return self._log.read_text(errors="replace")

    def wait_for_instant(self, draw: random.Random) -> None:
        """Return at a random instant: of the start, or of steps that are new. Or at the end.

        With restarts always of new steps: without one the launcher gives up.
        """
        if draw.random() < 0.3 and not self.config.launch.max_restarts:
            until, first = time.monotonic() + draw.uniform(0.0, 6.0), 0
        else:
            until, first = 0.0, self.step + draw.randint(1, 10)
        delay = draw.uniform(0.0, 0.3)
        while not self.ended and (time.monotonic() < until or self.step < first):
            time.sleep(0.01)
        time.sleep(delay)

    def strike(self, draw: random.Random) -> str:
        """SIGKILL a rank, the launcher or all of them; what was killed, "" when it had ended."""
        assert self.process is not None
        found = marked(self.mark)
        ranks = {rank: pid for pid, rank in found.items() if rank is not None}
        all_of_them = ("rank 0", "rank 1", "launcher", "everything")
        whom = draw.choice(all_of_them[:2] if self.config.launch.max_restarts else all_of_them)
        if whom.startswith("rank") and int(whom[-1]) in ranks:
            chosen = [ranks[int(whom[-1])]]
        else:
            whom = "everything" if whom == "everything" else "the started process"
            chosen = [self.process.pid]
            chosen += [pid for pid in found if whom == "everything" and pid not in chosen]
        if self.ended:
            return ""
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.config.launch.max_restarts and whom.startswith("rank"):
            # The launcher starts new ranks, or gives up when no step was made since the last.
            old = set(found)
            wait_until(lambda: self.ended or len(_new_ranks(self.mark, old)) == self.ranks, 240)
            if not self.ended:
                self.restarts += 1
                return whom
        code = 7 if whom.startswith("rank") else -signal.SIGKILL
        assert self.finish() == code, whom
        return whom


def _new_ranks(mark: str, but: set[int]) -> list[int]:
    return [pid for pid, rank in marked(mark).items() if rank is not None and pid not in but]
