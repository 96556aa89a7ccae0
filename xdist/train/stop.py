"""A request to stop: SIGTERM, SIGUSR1 or SIGINT asks the run to end after the step it is in.

A second one asks it to end at once; a second SIGINT (Ctrl-C) does end it. The main thread may then
wait inside a move, where Python calls no handler: the watchdog's thread looks for it too, through
the file descriptor into which the interpreter writes the number of every signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NOT_OURS = (signal.SIG_IGN, None)  # None: of a program in C, which could not be given back
_STDERR = 2
_TOLD = b"\nxdist: stopping after this step; a second Ctrl-C stops at once\n"


class Stop:
    """Catches the signals while it is open. Off the main thread no signal can be caught.

    `again` is called, in any thread, when a second signal came; it may return. A second SIGINT
    then raises KeyboardInterrupt in the main thread. Where SIGINT is ignored, as a shell has it for
    a job in the background of a script, it stays so.
    """

    def __init__(self) -> None:
        self.asked = False
        self.reason = ""
        self.again: Callable[[], None] = lambda: None
        self._seen = 0
        self._before: dict[signal.Signals, Any] = {}
        self._numbers: socket.socket | None = None
        self._wakes: socket.socket | None = None
        self._wakes_before = -1

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._numbers, self._wakes = socket.socketpair()
            self._numbers.setblocking(False)
            self._wakes.setblocking(False)
            self._wakes_before = signal.set_wakeup_fd(
                self._wakes.fileno(), warn_on_full_buffer=False
            )
            for number in SIGNALS:
                if number != signal.SIGINT or signal.getsignal(number) not in _NOT_OURS:
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._wakes is not None and self._numbers is not None:
            signal.set_wakeup_fd(self._wakes_before)
            self._wakes.close()
            self._numbers.close()
            self._wakes = self._numbers = None

    def look(self) -> None:
        """Notice signals that the main thread has had no time for; for another thread."""
        numbers = b""
        if self._numbers is not None:
            with contextlib.suppress(OSError):
                numbers = self._numbers.recv(4096)
        self._seen += sum(number in self._before for number in numbers)
        if self._seen > 1:
            self.again()

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self.reason = f"received {name}" if not self.asked else f"{self.reason}, then {name}"
        first, self.asked = not self.asked, True
        if not first:
            self.again()
            if number == signal.SIGINT:
                raise KeyboardInterrupt
        elif number == signal.SIGINT:
            # Not by print: the handler may have come in the middle of one.
            with contextlib.suppress(OSError):
                os.write(_STDERR, _TOLD)
