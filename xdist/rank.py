"""Which rank this process is: the only reader of the launcher's variables.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT mean what torchrun means by them.
XDIST_NONCE is what the launchers of xdist draw for each job.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from xdist.errors import LaunchError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NONCE = "XDIST_NONCE"


@dataclass(frozen=True)
class RankVariables:
    """What the launcher said. One process started by hand is rank 0 of a world of one.

    `agent_store`: torchrun's agent already holds the store at master_addr and master_port.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = ""
    master_port: int = 0
    nonce: str = ""
    agent_store: bool = False

    @property
    def on_loopback(self) -> bool:
        """Whether the ranks meet on an address that no other host can reach."""
        return is_loopback(self.master_addr)


def read_rank(environ: Mapping[str, str] | None = None) -> RankVariables:
    """The launcher's variables from `environ` (None: the process's own), checked.

    Raises:
        LaunchError: a variable is no integer, is out of range, or is missing beside the others.
    """
    given = os.environ if environ is None else environ
    seen = {name: value for name in _NAMES if (value := given.get(name))}
    if "RANK" not in seen and "WORLD_SIZE" not in seen:
        return RankVariables()
    if "RANK" not in seen or "WORLD_SIZE" not in seen:
        raise _contradiction("RANK and WORLD_SIZE are needed together", seen)
    rank, world = _integer("RANK", seen), _integer("WORLD_SIZE", seen)
    if world < 1 or not 0 <= rank < world:
        raise _contradiction(f"RANK={rank} is not one of WORLD_SIZE={world} ranks", seen)
    local_rank = _integer("LOCAL_RANK", seen) if "LOCAL_RANK" in seen else 0
    local_world = _integer("LOCAL_WORLD_SIZE", seen) if "LOCAL_WORLD_SIZE" in seen else world
    if not 0 <= local_rank < local_world or local_world > world:
        raise _contradiction(
            f"LOCAL_RANK={local_rank} and LOCAL_WORLD_SIZE={local_world} do not fit "
            f"WORLD_SIZE={world}",
            seen,
        )
    if world == 1:
        return RankVariables(rank, world, local_rank, local_world)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in seen]
    if missing:
        raise _contradiction(f"{world} ranks cannot meet without {' and '.join(missing)}", seen)
    port = _integer("MASTER_PORT", seen)
    if not 0 < port < 65536:
        raise _contradiction(f"MASTER_PORT={port} is not a port (1 to 65535)", seen)
    return RankVariables(
        rank,
        world,
        local_rank,
        local_world,
        seen["MASTER_ADDR"],
        port,
        given.get(NONCE, ""),
        given.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def is_loopback(address: str) -> bool:
    """Whether an address, as it is written, means this very host."""
    return address in ("localhost", "::1") or address.startswith("127.")


def _integer(name: str, seen: Mapping[str, str]) -> int:
    try:
        return int(seen[name])
    except ValueError:
        raise _contradiction(f"{name}={seen[name]!r} is not an integer", seen) from None


def _contradiction(what: str, seen: Mapping[str, str]) -> LaunchError:
    table = ", ".join(f"{name}={value}" for name, value in seen.items())
    return LaunchError(
        what,
        f"variables seen: {table}",
        "start the ranks with one launcher (`xdist launch local CONFIG --ranks N`, torchrun), "
        "or unset these variables for a single process",
    )
