"""One rank under Ray: an actor that runs it as a child process and answers for it.

The rank has a process of its own, as under every launcher: its exit code, its signals and its
memory are its own, and nothing of Ray is loaded into it. Nothing here imports Ray.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xdist_launchers.doctor import memory_bytes
from xdist_launchers.processes import rss_bytes

_SIOCGIFADDR = 0x8915
_SAID_BYTES = 1 << 16  # of a rank's output, in one answer

# A worker of Ray has threads, so nothing may run between fork and exec: the child itself asks the
# kernel to die with the actor, then becomes the rank. argv: the actor's pid, then the command.
TIE = (
    "import ctypes, os, sys\n"
    "ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)\n"
    "if os.getppid() != int(sys.argv[1]): os._exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


@dataclass(frozen=True)
class Answer:
    """What an actor says of its rank. `said` is what it printed since the last answer."""

    exit_code: int | None
    killed_by: int | None
    rss_bytes: int
    memory_share: float
    said: bytes

    @property
    def ended(self) -> bool:
        return self.exit_code is not None or self.killed_by is not None


def interface_of(address: str) -> str:
    """The network interface that has this IPv4 address; "" when none has it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return ""


class RankActor:
    """The body of the actor. It has one thread: calls are answered one after another."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._log = pathlib.Path()
        self._read_bytes = 0

    def cards(self) -> str:
        """The cards that Ray gave this actor, as CUDA_VISIBLE_DEVICES has them."""
        return os.environ.get("CUDA_VISIBLE_DEVICES", "")

    def free_port(self, address: str) -> int:
        """A TCP port that is free at an address of this host now."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
            return int(probe.getsockname()[1])

    def start(
        self, words: Sequence[str], env: Mapping[str, str], folder: str, log: str, address: str
    ) -> int:
        """Start the rank in `folder`; returns its process id.

        `words` is the command without its interpreter, which is this actor's. `address` is that of
        this node when ranks of other hosts must reach it, "" when they are all on one.
        """
        # The rank needs nothing of Ray's, least of all the token of its cluster.
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("RAY_") and name != "PYTHONBREAKPOINT"
        }
        given = dict(env)
        if address and (interface := interface_of(address)):
            given |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
        self._log = pathlib.Path(folder, log)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._log.unlink(missing_ok=True)
        handle = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        python = sys.executable
        try:
            self._process = subprocess.Popen(
                [python, "-IS", "-c", TIE, str(os.getpid()), python, *words],
                cwd=folder,
                env=inherited | given,
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            os.close(handle)
        return self._process.pid

    def poll(self, wait_s: float, listen: bool) -> Answer:
        """How the rank is, after at most `wait_s` seconds; sooner when it ends."""
        if self._process is None:
            return Answer(None, None, 0, 0.0, b"")
        # Memory is sampled while it runs: a killed process has freed its own.
        rss = rss_bytes(self._process.pid)
        available, total = memory_bytes()
        stop_at = time.monotonic() + wait_s
        while not self._ended() and time.monotonic() < stop_at:
            time.sleep(0.02)
        exit_code, killed_by = self._outcome()
        said = self._said() if listen else b""
        return Answer(exit_code, killed_by, rss, 1 - available / total, said)

    def send(self, number: int) -> None:
        """Signal the rank's whole group."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def stop(self, term_s: float) -> Answer:
        """End the rank: SIGTERM, after `term_s` seconds SIGKILL for its whole group."""
        if self._process is None:
            return Answer(None, None, 0, 0.0, b"")
        if not self._ended():
            self.send(signal.SIGTERM)
            # A stopped process acts on SIGTERM only when it runs again.
            self.send(signal.SIGCONT)
        stop_at = time.monotonic() + term_s
        while not self._ended() and time.monotonic() < stop_at:
            time.sleep(0.02)
        self.send(signal.SIGKILL)
        self._process.wait()
        exit_code, killed_by = self._outcome()
        return Answer(exit_code, killed_by, 0, 0.0, self._said())

    def _ended(self) -> bool:
        """Looked at, not reaped: its group keeps its number until `stop`."""
        assert self._process is not None
        if self._process.returncode is not None:
            return True
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, flags) is not None

    def _outcome(self) -> tuple[int | None, int | None]:
        """Exit code, or the signal that killed it; both None while it runs."""
        assert self._process is not None
        if self._process.returncode is not None:
            code = self._process.returncode
            return (code, None) if code >= 0 else (None, -code)
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        state = os.waitid(os.P_PID, self._process.pid, flags)
        if state is None:
            return None, None
        exited = state.si_code == os.CLD_EXITED
        return (state.si_status, None) if exited else (None, state.si_status)

    def _said(self) -> bytes:
        with self._log.open("rb") as log:
            log.seek(self._read_bytes)
            said = log.read(_SAID_BYTES)
        self._read_bytes += len(said)
        return said
