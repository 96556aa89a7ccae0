"""Worlds of ranks: the one that a launcher's variables describe, a lone rank, and a fake one.

Here default process groups are made and left; collectives.py moves data in them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from xdist.comm import faults, join, sockets
from xdist.comm.collectives import is_initialised
from xdist.console import say
from xdist.errors import LaunchError
from xdist.rank import RankVariables


def initialise(
    backend: str,
    variables: RankVariables,
    *,
    settings: str,
    timeout_s: float,
    join_timeout_s: float,
    device: torch.device,
) -> None:
    """Make the default process group from the launcher's variables.

    `settings` is compared between the ranks. `join_timeout_s` (seconds) bounds meeting,
    `timeout_s` every later move. Ranks that meet on the loopback interface stay on it.

    Raises:
        PortError: the port is taken.
        LaunchError: the ranks did not meet in time, are not of one job, or the address is bad.
    """
    rank, world_size = variables.rank, variables.world_size
    if variables.on_loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    try:
        store = _meeting_place(variables, join_timeout_s)
        ticket = join.Ticket(variables.nonce, settings, world_size)
        hosts = join.join(store, rank, ticket, timeout_s=join_timeout_s)
        if rank == 0 and len(set(hosts)) > 1:
            say(
                f"xdist: {len(set(hosts))} hosts; c10d is unauthenticated: use a private network",
                sys.stderr,
            )
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            device_id=device if backend == "nccl" else None,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise LaunchError(
            f"rank {rank} of {world_size} could not meet the other ranks",
            f"backend {backend}, waited at most {join_timeout_s:.0f} s at "
            f"{variables.master_addr} port {variables.master_port}: {str(error).splitlines()[0]}",
            "check that every rank was started and that MASTER_ADDR and MASTER_PORT are reachable",
        ) from error
    sign_in()


def _meeting_place(variables: RankVariables, timeout_s: float) -> dist.Store:
    """The store where the ranks meet; rank 0 makes it, on MASTER_ADDR alone."""
    timeout = timedelta(seconds=timeout_s)
    if variables.agent_store:
        # torchrun's own store, under the keys of this attempt.
        meeting = dist.rendezvous(
            "env://", rank=variables.rank, world_size=variables.world_size, timeout=timeout
        )
        store, _, _ = next(iter(meeting))
        return store
    address, port = variables.master_addr, variables.master_port
    # torch would listen on every interface; a socket that is bound already stays where it is.
    listener = sockets.listen(address, port).detach() if variables.rank == 0 else None
    if listener is None:
        sockets.knock(address, port, timeout_s=timeout_s)
    return dist.TCPStore(
        address,
        port,
        variables.world_size,
        is_master=variables.rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener,
    )


def lone_group(device: torch.device) -> ProcessGroup:
    """A default process group of this process alone, for libraries that want one at any size.

    Everything of xdist goes on as without one. It stays on the loopback interface.

    Raises:
        LaunchError: there is a process group of several ranks.
    """
    if not is_initialised():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() != 1:
        raise LaunchError(
            "a group of one rank was asked for beside one of several",
            f"this process is rank {dist.get_rank()} of {dist.get_world_size()}",
            "give the mesh of all ranks",
        )
    group = dist.group.WORLD
    assert group is not None
    return group


@contextmanager
def fake_world(rank: int, world_size: int) -> Iterator[None]:
    """This process as `rank` of `world_size` ranks that do not exist, by torch's fake group.

    Exchanges are posted and end at once; what is received has its shape and no meaning, and
    `exchange_integers` answers as if every rank had sent this one's values.

    Raises:
        LaunchError: there is a process group already.
    """
    if is_initialised():
        raise LaunchError(
            "a world of ranks that do not exist cannot be made beside a real one",
            f"this process is rank {dist.get_rank()} of {dist.get_world_size()}",
            "run it in a process of its own, before any mesh is made",
        )
    # Importing it registers the backend "fake" (torch 2.11 to 2.15).
    import torch.testing._internal.distributed.fake_pg  # noqa: F401

    # torch puts a hook that names the rank before tracebacks, and leaves it there.
    hook = sys.excepthook
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=dist.HashStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook


def sign_in() -> None:
    """Say in the store where this rank runs, for the message of a lost peer."""
    faults.sign_in(dist.distributed_c10d._get_default_store(), dist.get_rank())


def close() -> None:
    """Leave the default process group, if there is one. Other ranks are not waited for."""
    if not is_initialised():
        return
    # Where the store went with rank 0, nobody is left to read the note.
    with suppress(RuntimeError):
        faults.sign_out(dist.distributed_c10d._get_default_store(), dist.get_rank())
    dist.destroy_process_group()


class Rendezvous:
    """A store on this machine's loopback, on a free port, where local ranks can meet."""

    def __init__(self) -> None:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.port: int = self._store.port
