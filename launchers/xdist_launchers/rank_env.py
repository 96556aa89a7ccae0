"""The environment of one rank: torchrun's variables, so that no rank asks who started it."""

from __future__ import annotations

import secrets
import socket

from xdist.rank import NONCE
from xdist_launchers.environment import MARK

LOOPBACK = "127.0.0.1"
PORT_TRIES = 3  # ports that a launcher tries before it gives up


def free_port(address: str = LOOPBACK) -> int:
    """A TCP port that is free now on the interface with this IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def new_nonce() -> str:
    """128 random bits in hex, by which the ranks of one start know each other."""
    return secrets.token_hex(16)


def common_env(
    *, world_size: int, local_world_size: int, threads: int, launcher: str = "local"
) -> dict[str, str]:
    """What all ranks of one host share, but for the rendezvous. `launcher` set the rank."""
    return {
        MARK: launcher,
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }


def rank_env(rank: int, local_rank: int) -> dict[str, str]:
    """What tells one rank from another."""
    return {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}


def rendezvous_env(address: str, port: int, nonce: str = "") -> dict[str, str]:
    """Where rank 0 listens, and the job's nonce. On the loopback interface gloo stays there too."""
    env = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    if nonce:
        env[NONCE] = nonce
    if address == LOOPBACK:
        env["GLOO_SOCKET_IFNAME"] = "lo"
    return env
