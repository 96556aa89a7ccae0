"""One Ray node of a Slurm allocation; slurm/ray.sh runs it once on every node.

The first node is the head: it leaves its address in the shared folder, where the others wait for
it. Everything else of a node lies in a private folder on its own disk. A node ends when this
process does.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import sys
import time
from types import FrameType

from xdist.errors import LaunchError
from xdist.rank import is_loopback
from xdist_launchers.failure import failure_of, tell
from xdist_launchers.ray_private import (
    LOOPBACK,
    head_words,
    loopback_env,
    node_words,
    port_count,
    private_folder,
    running_node,
    security_env,
)

HEAD_S = 180.0  # for the head to start


def main(shared: pathlib.Path) -> int:
    """Run this node until a file named stop or a signal ends it, or Ray ends by itself."""
    asked: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, note)
    try:
        return _run(shared, asked)
    except LaunchError as error:
        if asked:
            return 0
        failure = failure_of(error)
        tell(failure)
        return failure.exit_code


def _run(shared: pathlib.Path, asked: list[int]) -> int:
    is_head = os.environ["SLURM_NODEID"] == "0"
    alone = os.environ["SLURM_NNODES"] == "1"
    cpus = int(os.environ["SLURM_CPUS_ON_NODE"])
    ip = LOOPBACK if alone else address_of(os.environ["SLURMD_NODENAME"])
    env = security_env(str(shared / "token")) | (loopback_env() if alone else {})
    target = shared / "address"
    head = "" if is_head else _wait_for(target, asked)

    def words(first: int, place: str) -> list[str]:
        if is_head:
            return head_words(first, cpus, None, place, ip)
        return node_words(head, first, cpus, None, place, ip)

    with (
        private_folder() as folder,
        running_node(folder, env, words, port_count(cpus), lambda: bool(asked)) as (first, node),
    ):
        if is_head:
            beside = target.with_name(".address")
            beside.write_text(f"{ip or own_address()}:{first}", encoding="ascii")
            beside.replace(target)
        while not asked and not node.ended and not (shared / "stop").exists():
            time.sleep(0.2)
        if node.ended and not asked:
            raise LaunchError(
                f"Ray ended on node {socket.gethostname()}", f"exit code {node.exit_code}"
            )
    return 0


def address_of(name: str) -> str:
    """The address of this node by its name; "" when the name stands for no address of a network."""
    with contextlib.suppress(OSError):
        found = socket.gethostbyname(name)
        return "" if is_loopback(found) else found
    return ""


def own_address() -> str:
    """The address by which other hosts reach this one, as Ray finds it; loopback without one."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: the kernel only chooses the interface.
        probe.connect(("8.8.8.8", 80))
        return str(probe.getsockname()[0])
    return LOOPBACK


def _wait_for(target: pathlib.Path, asked: list[int]) -> str:
    until = time.monotonic() + HEAD_S
    while not target.exists():
        if asked or time.monotonic() > until:
            raise LaunchError(
                f"the head did not start within {HEAD_S:g} s",
                f"{target} is not there",
                "read what the first node said; the folder must be shared by all nodes",
            )
        time.sleep(0.2)
    return target.read_text(encoding="ascii")


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
