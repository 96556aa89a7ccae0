"""The only reader of torchrun's variables: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.

Without them the world is one rank. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from xdist.errors import LaunchError


@dataclass(frozen=True)
class RankInfo:
    """Who this process is among the ranks, and where rank 0 listens ("" and 0: nowhere)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_addr: str = ""
    master_port: int = 0


def read_rank(environ: Mapping[str, str] | None = None) -> RankInfo:
    """Read and check the variables (of `os.environ` by default); raises LaunchError."""
    env = os.environ if environ is None else environ
    seen = {
        name: env.get(name, "")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    table = ", ".join(f"{name}={value or '(unset)'}" for name, value in seen.items())
    if not seen["RANK"] and not seen["WORLD_SIZE"]:
        return RankInfo()
    remedy = "start ranks with `xdist launch` or torchrun, or unset RANK and WORLD_SIZE for one"
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        # One rank needs no rendezvous, and LOCAL_RANK only picks a device.
        needed = name in ("RANK", "WORLD_SIZE") or (name == "MASTER_PORT" and _many_ranks(env))
        if seen[name].isascii() and seen[name].isdigit():
            numbers[name] = int(seen[name])
        elif seen[name] or needed:
            raise LaunchError(f"{name} is not a whole number", table, remedy)
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise LaunchError(
            f"RANK={numbers['RANK']} is not below WORLD_SIZE={numbers['WORLD_SIZE']}", table, remedy
        )
    if numbers["WORLD_SIZE"] > 1 and not seen["MASTER_ADDR"]:
        raise LaunchError("MASTER_ADDR is not set", table, remedy)
    return RankInfo(
        rank=numbers["RANK"],
        world_size=numbers["WORLD_SIZE"],
        local_rank=numbers.get("LOCAL_RANK", 0),
        master_addr=seen["MASTER_ADDR"],
        master_port=numbers.get("MASTER_PORT", 0),
    )


def _many_ranks(env: Mapping[str, str]) -> bool:
    """Whether WORLD_SIZE says that there is more than one rank."""
    size = env.get("WORLD_SIZE", "")
    return size.isascii() and size.isdigit() and int(size) > 1


def rank() -> int:
    """This process's rank in the world."""
    return read_rank().rank


def world_size() -> int:
    """Number of ranks in the world."""
    return read_rank().world_size


def local_rank() -> int:
    """This process's rank on its host."""
    return read_rank().local_rank
