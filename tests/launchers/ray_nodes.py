"""A Ray cluster of several nodes on this host, on loopback alone, owned by the test.

Each node is a `ray start --block` of its own with its own ports. All of them end with the test
process, killed included. Whoever talks to the cluster needs `env`.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

import psutil

from tests.launchers.conftest import PATHS, wait_until
from xdist_launchers.ray_actor import TIE
from xdist_launchers.ray_private import (
    READY,
    choose_ports,
    head_words,
    loopback_env,
    node_words,
    port_count,
    port_env,
    ray_program,
    security_env,
    write_token,
)

# Ray lets a second node take part only where this host has another address than 127.0.0.1.
_JOIN = """
import ray._private.ray_constants as constants
import ray._private.services as services
constants.ENABLE_RAY_CLUSTER = True
services.get_node_ip_address = lambda *_: "127.0.0.1"
from ray.scripts.scripts import main
main()
"""


class RayNodes:
    """A head and further nodes; a context manager."""

    def __init__(self, cpus: int) -> None:
        # Not under pytest's folder: the path of a socket has at most 107 characters.
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="rays-"))
        write_token(self.folder / "token")
        self.env = security_env(str(self.folder / "token")) | loopback_env()
        self._nodes: list[subprocess.Popen[bytes]] = []
        try:
            # The same number of CPUs whatever the host has: placement is part of what is tested.
            first = self._start(
                cpus, lambda port, place: [ray_program(), *_head(port, cpus, place)]
            )
        except BaseException:
            self.close()
            raise
        self.address = f"127.0.0.1:{first}"
        self.dashboard = f"http://127.0.0.1:{first + 1}"

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, cpus: int) -> int:
        """Start another node; its number."""

        def words(port: int, place: str) -> list[str]:
            start = node_words(self.address, port, cpus, 0, place, "127.0.0.1")
            return [sys.executable, "-c", _JOIN, *start]

        self._start(cpus, words)
        return len(self._nodes) - 1

    def _start(self, cpus: int, words: Callable[[int, str], list[str]]) -> int:
        """Start a node and wait for it; its first port. On a busy host Ray gives up after 30 s."""
        number = len(self._nodes)
        for attempt in range(3):
            place = self.folder / f"n{number}.{attempt}"
            place.mkdir(mode=0o700)
            log = self.folder / f"n{number}.{attempt}.log"
            first = choose_ports(port_count(cpus))
            command = _exec(words(first, str(place)))
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, "-IS", "-c", TIE, str(os.getpid()), sys.executable, *command],
                    env=os.environ
                    | self.env
                    | port_env(first)
                    | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._nodes[number:] = [process]
            wait_until(lambda: process.poll() is not None or READY in log.read_bytes(), 180)  # noqa: B023
            if process.poll() is None:
                return first
        raise AssertionError(log.read_text())

    def processes(self, number: int) -> list[psutil.Process]:
        """The processes of a node: its head process first."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._nodes[number].pid)
            return [top, *top.children(recursive=True)]
        return []

    def kill(self, number: int) -> None:
        """A node goes away at once, with all that runs on it."""
        for process in self.processes(number):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self._nodes[number].wait()

    def close(self) -> None:
        """End every process of every node; remove the folder."""
        left = [process for number in range(len(self._nodes)) for process in self.processes(number)]
        for node in self._nodes:
            node.terminate()
        psutil.wait_procs(left, timeout=10)
        for number in range(len(self._nodes)):
            self.kill(number)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _head(port: int, cpus: int, place: str) -> list[str]:
    return head_words(port, cpus, 0, place)


def _exec(words: list[str]) -> list[str]:
    """The words of a Python program, without the interpreter."""
    return words[1:] if words[0] == sys.executable else words
