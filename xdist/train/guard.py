"""What a run is guarded by: signals, time limits, and a record of what this rank is doing."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from xdist.comm.recorder import RECORDER
from xdist.config import Config
from xdist.console import say
from xdist.errors import PeerLost, XdistError
from xdist.mesh import Mesh
from xdist.train.engines.protocol import Engine
from xdist.train.failures import record_failure
from xdist.train.out_of_memory import is_out_of_memory, out_of_memory
from xdist.train.record import Record
from xdist.train.setup import resolved
from xdist.train.stop import Stop
from xdist.train.watchdog import Limits, Watchdog

PREEMPTED = 75
MOVE_GRACE_S = 60.0  # from a step's time limit to that of a single move

OnAbort = Callable[[XdistError], None]


def print_error(error: XdistError) -> None:
    """Tell the verdict of a hang, from the one rank that is to tell it."""
    if not getattr(error, "agreed", False):
        say(str(error), sys.stderr)


class Guard:
    """One for each run: the loop tells it where it is, and asks it whether to stop."""

    def __init__(self, config: Config, record: Record, on_abort: OnAbort = print_error) -> None:
        self.stop = Stop()
        self.stop.again = self._leave
        self.step = 0  # steps made
        self._record, self._on_abort = record, on_abort
        self._every, self._saved = config.checkpoint.every_steps, -1
        self._leaving = threading.Lock()
        self._config = config
        self.planned = True  # whether the plan knows the model
        self.notes: list[str] = []  # to be told when the run starts
        train = config.train
        limits = Limits(train.first_step_timeout_s, train.step_timeout_s)
        # A move cannot take longer than its step: the watchdog, who knows more, speaks first.
        self.move_timeout_s = max(limits.first_s, limits.later_s) + MOVE_GRACE_S
        self._watchdog = Watchdog(
            record.directory, record.rank, limits, on_abort=self._abort, poll=self.stop.look
        )

    def open(self, mesh: Mesh) -> None:
        """Catch signals, start the watchdog, say that the ranks have met; every rank calls it."""
        self.stop.__enter__()
        self._config = resolved(self._config, mesh.world_size)
        RECORDER.enter("set-up")
        note = self._watchdog.open(mesh)
        self.notes += [note] if note else []
        # From here on the watchdog bounds what happens, a long resume too, and no launcher does.
        self._record.met()

    def close(self) -> None:
        """Stop watching; signals do again what they did before."""
        self._watchdog.close()
        self.stop.__exit__()
        RECORDER.enter("")

    @property
    def asked(self) -> bool:
        """Whether a signal asked this rank to stop."""
        return self.stop.asked

    def span(self, kind: str, step: int) -> None:
        """A step, an evaluated sequence or a save begins: its time limit starts anew."""
        self._watchdog.span(kind, step)

    def enter(self, phase: str) -> None:
        """What this rank does from now on: data, forward, backward, reduce, update, ..."""
        RECORDER.enter(phase)

    def asked_elsewhere(self) -> None:
        """Some rank was asked to stop; if it is another one, say so."""
        if not self.stop.asked:
            self.stop.reason = "another rank was asked to stop"

    def resumed(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`; 0 is a fresh start."""
        self.step = step
        self._saved = step if step else -1

    def saved(self, step: int) -> None:
        """A checkpoint of `step` is safe on disk."""
        self._saved = step

    def understood(self, error: BaseException, engine: Engine | None) -> BaseException:
        """What to raise for `error`: told as failure 9, with what a lost rank was doing, or itself.

        Where the watchdog is about to end this process its verdict comes first.
        """
        if not isinstance(error, Exception):
            return error
        if isinstance(error, XdistError):
            self._watchdog.hold_if_firing()
        elif is_out_of_memory(error):
            return out_of_memory(
                error,
                self._config,
                engine,
                RECORDER.phase,
                self.step,
                planned=self.planned,
            )
        if isinstance(error, PeerLost) and error.rank is not None:
            last = self._watchdog.last_seen(error.rank)
            if last:
                error.why = f"{last}; {error.why}" if error.why else last
        return error

    def _abort(self, error: XdistError) -> None:
        """The watchdog's verdict, before it ends this process."""
        record_failure(error, self._record, self.step)
        self._on_abort(error)

    def _leave(self) -> None:
        """A second signal: end at once if a checkpoint is younger than the interval of saves."""
        if self._saved < 0 or self.step - self._saved > self._every:
            return
        if self._leaving.acquire(blocking=False):
            self._leave_now()

    def _leave_now(self) -> NoReturn:
        age = self.step - self._saved
        old = f"{age} step{'s' if age != 1 else ''} old"
        reason = f"{self.stop.reason}: ended at once; the last checkpoint is {old}"
        self._record.status(
            "preempted", self.step, exit_code=PREEMPTED, reason=reason, durable=False
        )
        os._exit(PREEMPTED)
