"""A request to stop: SIGTERM or SIGUSR1 asks the run to end after the step it is in."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Stop:
    """Catches the signals while it is open. Off the main thread no signal can be caught."""

    def __init__(self) -> None:
        self.asked = False
        self.reason = ""
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        self.asked = True
        self.reason = f"received {signal.Signals(number).name}"
