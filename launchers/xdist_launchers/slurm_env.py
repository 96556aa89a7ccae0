"""What Slurm's variables say about one rank and about the meeting of all, in torchrun's words."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping

from xdist.errors import LaunchError
from xdist.rank import is_loopback
from xdist_launchers.rank_env import LOOPBACK, common_env, rank_env, rendezvous_env

# Below the ports that Linux gives to outgoing connections (32768 and up), and without 29500, which
# is everybody's default. Jobs with numbers that follow each other get blocks that do not meet.
PORTS = range(20000, 29500)
TRIES = 4

_NEEDED = (
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS"),
    *("SLURM_STEP_TASKS_PER_NODE", "MASTER_ADDR", "MASTER_PORT"),
)
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def rank_variables(environ: Mapping[str, str], *, threads: int, interface: str) -> dict[str, str]:
    """What one task of a step adds to its environment, to be a rank as under torchrun.

    MASTER_ADDR, MASTER_PORT and the nonce come from the batch script.

    Raises:
        LaunchError: a variable that srun sets for each task is missing.
    """
    missing = [name for name in _NEEDED if not environ.get(name)]
    if missing:
        raise LaunchError(
            f"this process is no task of a Slurm step: {', '.join(missing)} is not set",
            "srun sets these variables, and the batch script those of the meeting",
            "start it with `sbatch slurm/train.sh CONFIG` or `xdist launch slurm CONFIG`",
        )
    node = int(environ["SLURM_NODEID"])
    env = common_env(
        world_size=int(environ["SLURM_STEP_NUM_TASKS"]),
        local_world_size=tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])[node],
        threads=threads,
        launcher="slurm",
    )
    address = environ["MASTER_ADDR"]
    env |= rendezvous_env(address, int(environ["MASTER_PORT"]))
    env |= rank_env(int(environ["SLURM_PROCID"]), int(environ["SLURM_LOCALID"]))
    if interface:
        # "=" is NCCL's word for this very name, not for all that begin with it.
        env |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}
    elif address != LOOPBACK and "GLOO_SOCKET_IFNAME" not in environ:
        # Otherwise gloo takes the address of the host's own name, often 127.0.1.1.
        name = interface_towards(address)
        env |= {"GLOO_SOCKET_IFNAME": name} if name else {}
    if not environ.get("SLURM_GPUS_ON_NODE") and "CUDA_VISIBLE_DEVICES" not in environ:
        # Cards that Slurm did not give to this job may be another job's.
        env["CUDA_VISIBLE_DEVICES"] = ""
    # Programs of the virtual environment, e.g. ninja, as if it were activated.
    return env | {"PATH": f"{os.path.dirname(sys.executable)}:{environ.get('PATH', os.defpath)}"}


def tasks_per_node(text: str) -> list[int]:
    """`"2(x3),1"` as `[2, 2, 2, 1]`."""
    found = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            raise LaunchError(f"SLURM_STEP_TASKS_PER_NODE={text!r} is not a list of counts")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def ports(job: int) -> list[int]:
    """The ports on which the ranks of a job may meet, in the order they are tried."""
    first = job * TRIES % len(PORTS)
    return [PORTS[(first + index) % len(PORTS)] for index in range(TRIES)]


def free_port(address: str, job: int, attempt: int = 0) -> int:
    """The first free port of the job's own at `address`, an IPv4 number of this host.

    `attempt` counts earlier starts in this job: the search begins with another port.

    Raises:
        LaunchError: all of them are taken.
    """
    choices = ports(job)
    choices = choices[attempt % TRIES :] + choices[: attempt % TRIES]
    for port in choices:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise LaunchError(
        f"no port is free at {address} on {socket.gethostname()} for job {job}",
        f"tried {', '.join(map(str, choices))}",
        "submit again: the next job has other ports",
    )


def master_address(node_address: str, interface: str, nodes: int) -> str:
    """The IPv4 number at which rank 0, on this host, is reached by the others.

    That of `interface`; without one, what `node_address` (Slurm's NodeAddr of this host) stands
    for; the loopback when there is one node only.

    Raises:
        LaunchError: the interface has no address, or the name stands for none that others reach.
    """
    here = socket.gethostname()
    if interface:
        found = address_of(interface)
        if not found:
            raise LaunchError(
                f"slurm.interface = {interface!r} has no IPv4 address on {here}",
                f"interfaces with one: {_interfaces()}",
                "name one of these, the same on all nodes",
            )
        return found
    if nodes == 1:
        return LOOPBACK
    try:
        found = socket.gethostbyname(node_address)
    except OSError as error:
        raise LaunchError(
            f"the address {node_address!r} of the first node is unknown on {here}",
            str(error),
            f"set slurm.interface to one of: {_interfaces()}",
        ) from error
    if is_loopback(found) and not is_loopback(node_address):
        raise LaunchError(
            f"the name {node_address!r} of the first node stands for {found} on {here}",
            f"the other {nodes - 1} nodes cannot reach a loopback address",
            f"set slurm.interface to one of: {_interfaces()}",
        )
    return found


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface of this host, "" when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            request = struct.pack("256s", interface.encode()[:15])
            return socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24])
        except OSError:
            return ""


def interface_towards(address: str) -> str:
    """The interface by which this host reaches an IPv4 address, "" when it cannot be told."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # A datagram socket that connects sends nothing; the kernel only chooses the route.
            probe.connect((address, 9))
        except OSError:
            return ""
        mine = probe.getsockname()[0]
    return next((name for _, name in socket.if_nameindex() if address_of(name) == mine), "")


def _interfaces() -> str:
    found = [(name, address_of(name)) for _, name in socket.if_nameindex()]
    told = [
        f"{name} ({address})" for name, address in found if address and not is_loopback(address)
    ]
    return ", ".join(told) or "none"
