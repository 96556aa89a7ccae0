"""A Ray cluster of one node that this process owns: started, kept on loopback, ended.

Everything it needs lies in a private folder that goes with it: the token (0600), Ray's files and
its sockets. Nothing outside is looked for, joined or stopped.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from xdist.errors import LaunchError
from xdist_launchers.failure import say
from xdist_launchers.processes import Child, adopt_orphans, children, kill_orphans, stop
from xdist_launchers.rank_env import LOOPBACK, PORT_TRIES

READY = b"Ray runtime started"
START_S = 120.0
STOP_S = 15.0  # for the keeper, which ends the others
_KEEPER = (sys.executable, "-P", "-m", "xdist_launchers.ray_keeper")
WORKER_PORTS = 60  # beyond one for each CPU: workers that start while others still end
OBJECT_STORE_BYTES = 100 << 20  # ranks keep nothing there
# The path of a Unix socket has at most 107 characters; Ray's own part takes up to 70 of them.
_SOCKET_PATH = 107 - 70
# In the order of the ports: one option or variable each, then the workers' range.
_HEAD_OPTIONS = ("port", "dashboard-port", "ray-client-server-port")
_OPTIONS = (
    *("object-manager-port", "node-manager-port", "dashboard-agent-listen-port"),
    *("dashboard-agent-grpc-port", "runtime-env-agent-port", "metrics-export-port"),
)
_VARIABLES = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")
_FIXED = len(_HEAD_OPTIONS) + len(_OPTIONS) + len(_VARIABLES)


def security_env(token: str) -> dict[str, str]:
    """What every process of Ray gets: the token's file, no telemetry."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        # Of two readings of num_gpus=0, the one in which Ray leaves CUDA_VISIBLE_DEVICES alone.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def loopback_env() -> dict[str, str]:
    """What makes Ray take 127.0.0.1 for this host's address, and listen there alone.

    Ray replaces 127.0.0.1 by the address of a network interface unless clusters of several nodes
    are switched off; the switch is named after the systems where off is the default.
    """
    return {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def port_count(cpus: int) -> int:
    """Ports that a node of so many CPUs needs."""
    return _FIXED + cpus + WORKER_PORTS


def head_words(
    first_port: int, cpus: int, gpus: int | None, folder: str, ip: str = LOOPBACK
) -> list[str]:
    """`ray start` of a head: every port is named, from `first_port` on.

    `gpus` None lets Ray find the cards, `ip` "" this host's address. The dashboard is on loopback.
    """
    ports = zip(_HEAD_OPTIONS, range(first_port, 65536), strict=False)
    return [
        *("start", "--head", "--block"),
        *(f"--{name}={port}" for name, port in ports),
        f"--dashboard-host={LOOPBACK}",
        "--disable-usage-stats",
        *_node_options(first_port, cpus, gpus, folder, ip),
    ]


def node_words(
    head: str, first_port: int, cpus: int, gpus: int | None, folder: str, ip: str
) -> list[str]:
    """`ray start` of a further node of the cluster at `head`; otherwise as `head_words`."""
    return [
        *("start", f"--address={head}", "--block"),
        *_node_options(first_port, cpus, gpus, folder, ip),
    ]


def _node_options(first_port: int, cpus: int, gpus: int | None, folder: str, ip: str) -> list[str]:
    first, workers = first_port + len(_HEAD_OPTIONS), first_port + _FIXED
    ports = zip(_OPTIONS, range(first, 65536), strict=False)
    return [
        *([f"--node-ip-address={ip}"] if ip else []),
        *(f"--{name}={port}" for name, port in ports),
        f"--min-worker-port={workers}",
        f"--max-worker-port={first_port + port_count(cpus) - 1}",
        f"--num-cpus={cpus}",
        *([] if gpus is None else [f"--num-gpus={gpus}"]),
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        f"--temp-dir={folder}",
        "--log-style=record",
        "--log-color=false",
    ]


def port_env(first_port: int) -> dict[str, str]:
    """The ports that Ray takes from variables."""
    first = first_port + _FIXED - len(_VARIABLES)
    return {name: str(first + index) for index, name in enumerate(_VARIABLES)}


def ephemeral_start() -> int:
    """The first port that the kernel hands out by itself."""
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
        return int(text.split()[0])
    return 32768


def choose_ports(count: int, draw: random.Random | None = None) -> int:
    """The first of `count` neighbouring ports that are free on loopback, below the ephemeral ones.

    Raises:
        LaunchError: a hundred places were tried and each had a port in use.
    """
    draw = draw or random.Random(secrets.randbits(64))
    top = min(ephemeral_start(), 65536) - count
    for _ in range(100):
        first = draw.randrange(10000, max(10001, top))
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind((LOOPBACK, port))
            return first
    raise LaunchError(
        f"no {count} neighbouring ports are free for a private Ray cluster",
        f"looked at 100 places from 10000 to {top}",
        "name a running cluster with ray.address=HOST:PORT, or end what holds the ports",
    )


def ray_program() -> str:
    """Ray's command of this very installation."""
    beside = pathlib.Path(sys.executable).with_name("ray")
    found = str(beside) if beside.exists() else shutil.which("ray")
    if found is None:
        raise LaunchError(
            "Ray's command `ray` is not installed",
            f"looked beside {sys.executable} and in PATH",
            "pip install 'xdist-train[ray]'",
        )
    return found


@contextlib.contextmanager
def private_folder() -> Iterator[pathlib.Path]:
    """A folder of mode 0700 with a short path, removed at the end."""
    parent = tempfile.gettempdir()
    if len(parent) + len("/xray-12345678/r1") > _SOCKET_PATH:
        parent = "/tmp"
    folder = pathlib.Path(tempfile.mkdtemp(prefix="xray-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_token(path: pathlib.Path) -> None:
    """A new token in a file that only this user can read."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(secrets.token_hex(32))


@contextlib.contextmanager
def private_cluster(
    cpus: int, gpus: int | None, stopped: Callable[[], bool] = lambda: False
) -> Iterator[tuple[str, dict[str, str], Child]]:
    """Start a head on loopback; yields its address, the variables that reach it, its process.

    Call it before any other thread runs. On the way out every process of it is ended.

    Raises:
        LaunchError: it did not start, three times, or `stopped()` became true meanwhile.
    """
    with private_folder() as folder:
        token = folder / "token"
        write_token(token)
        env = security_env(str(token)) | loopback_env()

        def words(first: int, place: str) -> list[str]:
            return head_words(first, cpus, gpus, place)

        with running_node(folder, env, words, port_count(cpus), stopped) as (first, head):
            yield f"{LOOPBACK}:{first}", env, head


@contextlib.contextmanager
def running_node(
    folder: pathlib.Path,
    env: Mapping[str, str],
    words: Callable[[int, str], list[str]],
    ports: int,
    stopped: Callable[[], bool],
) -> Iterator[tuple[int, Child]]:
    """A node that `words(first port, folder)` starts; yields its first port and its process.

    On the way out every process of it is ended.

    Raises:
        LaunchError: it did not start, three times, or `stopped()` became true meanwhile.
    """
    mine = children()
    adopt_orphans()
    node: Child | None = None
    try:
        first, node = _start(folder, env, words, ports, stopped)
        yield first, node
    finally:
        stop([node] if node else [], term_s=STOP_S)
        kill_orphans(mine)


def _start(
    folder: pathlib.Path,
    env: Mapping[str, str],
    words: Callable[[int, str], list[str]],
    ports: int,
    stopped: Callable[[], bool],
) -> tuple[int, Child]:
    said = ""
    for attempt in range(1, PORT_TRIES + 1):
        # Ray's files of each try lie apart: it reads ports of an earlier one from them.
        place = folder / f"r{attempt}"
        place.mkdir(mode=0o700)
        log = folder / f"start-{attempt}.log"
        first = choose_ports(ports)
        keeper = [*_KEEPER, str(os.getpid()), str(folder)]
        command = [*keeper, ray_program(), *words(first, str(place))]
        mask = os.umask(0o077)
        try:
            with log.open("wb") as output:
                node = Child(command, os.environ | dict(env) | port_env(first), output)
        finally:
            os.umask(mask)
        if _ready(node, log, stopped):
            return first, node
        stop([node], term_s=STOP_S)
        said = log.read_text(encoding="utf-8", errors="replace")[-1500:]
        if stopped():
            break
        say(f"xdist: Ray did not start on ports from {first} (try {attempt} of {PORT_TRIES})")
    raise LaunchError(
        "Ray did not start",
        f"{PORT_TRIES} tries on other ports; it said at last:\n{said.strip()}",
        "read that, or name a running cluster with ray.address=HOST:PORT",
    )


def _ready(node: Child, log: pathlib.Path, stopped: Callable[[], bool]) -> bool:
    until = time.monotonic() + START_S
    while not node.ended and not stopped() and time.monotonic() < until:
        if READY in log.read_bytes():
            return True
        time.sleep(0.05)
    return False


def open_beyond_loopback(ports: Sequence[int] | range) -> list[int]:
    """Those of `ports` on which some process of this host listens for other hosts."""
    found = set()
    for table, loopback in (
        ("tcp", ("0100007F",)),
        ("tcp6", ("0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F")),
    ):
        with contextlib.suppress(OSError):
            lines = pathlib.Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()
            for fields in map(str.split, lines[1:]):
                address, _, port = fields[1].partition(":")
                if fields[3] == "0A" and address not in loopback:
                    found.add(int(port, 16))
    return sorted(found & set(ports))
