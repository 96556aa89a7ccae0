"""Child processes of Linux that cannot outlive their launcher, and what killed them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Make this process the parent of what its dead children leave behind."""
    if _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def children() -> set[int]:
    """Process ids of this process's children, adopted ones included."""
    found = set()
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # The name in parentheses may hold blanks: fields are counted from the last ")".
                fields = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                if int(fields[1]) == os.getpid():
                    found.add(int(entry.name))
    return found


def kill_orphans(spare: set[int], patience_s: float = 5.0) -> None:
    """Kill and reap adopted children, but for those in `spare`."""
    stop_at = time.monotonic() + patience_s
    while (left := children() - spare) and time.monotonic() < stop_at:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def _tied_to(parent: int) -> Callable[[], None]:
    def tie() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # The parent may have died before the line above took effect.
        if os.getppid() != parent:
            os._exit(1)

    return tie


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask the kernel to send this process a signal when its parent dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)


class Child:
    """A process in a session of its own, killed by the kernel when this process dies."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        output: IO[bytes] | None,
        errors: IO[bytes] | None = None,
    ) -> None:
        """`output` gets both streams (None: those of this process), or `errors` the second."""
        self._process = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors or (subprocess.STDOUT if output is not None else None),
            start_new_session=True,
            preexec_fn=_tied_to(os.getpid()),  # noqa: PLW1509 - launchers have one thread
        )
        self.pid = self._process.pid
        self.exit_code: int | None = None
        self.killed_by: int | None = None

    @property
    def ended(self) -> bool:
        """Whether it has ended; sets `exit_code` or `killed_by`.

        The process is looked at, not reaped: its group keeps its number until `finish`.
        """
        if self.exit_code is None and self.killed_by is None:
            state = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if state is not None and state.si_code == os.CLD_EXITED:
                self.exit_code = state.si_status
            elif state is not None:
                self.killed_by = state.si_status
        return self.exit_code is not None or self.killed_by is not None

    def send(self, number: int) -> None:
        """Signal its whole group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def finish(self) -> None:
        """Kill what is left of its group, then reap it."""
        self.send(signal.SIGKILL)
        self._process.wait()


def stop(
    running: Iterable[Child],
    *,
    term_s: float,
    hurry: Callable[[], bool] = lambda: False,
    hurry_s: float = 0.0,
) -> None:
    """End children: SIGTERM, after `term_s` SIGKILL. Reaps them all.

    As soon as `hurry()`: SIGTERM again, which ends a run that saved not long ago at once, and
    SIGKILL `hurry_s` later.
    """
    left = [child for child in running if not child.ended]
    for child in left:
        child.send(signal.SIGTERM)
        # A stopped process acts on SIGTERM only when it runs again.
        child.send(signal.SIGCONT)
    stop_at = time.monotonic() + term_s
    while not all(child.ended for child in left) and time.monotonic() < stop_at:
        time.sleep(0.02)
        if hurry():
            for child in left:
                child.send(signal.SIGTERM)
            stop_at, hurry = min(stop_at, time.monotonic() + hurry_s), lambda: False
    for child in running:
        child.finish()


def rss_bytes(pid: int) -> int:
    """Resident memory of a process, 0 when it is gone."""
    try:
        pages = pathlib.Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
