"""The first messages on the store: that ranks belong to one job, and which of them are missing.

Rank 0 writes the job's ticket; every rank compares its own with it before anything else is sent.
This finds stale joiners, ranks of another job and ranks with other settings. It is no protection
against an attacker: c10d authenticates nobody. Knows only a key-value store, no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

from xdist.errors import LaunchError

_JOB, _REFUSED = "xdist/job", "xdist/refused"
_POLL_S = (0.01, 0.25)  # first and longest pause between two looks at the store
_SHOWN = 3  # differing settings that a message lists


class Store(Protocol):
    """The part of a torch store that is used here."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class Ticket:
    """What all ranks of a job agree on.

    `nonce` is 128 random bits in hex, drawn by the launcher ("" where none was given); `settings`
    holds one setting a line ("" where there are none).
    """

    nonce: str
    settings: str
    world_size: int

    @property
    def digest(self) -> str:
        """The first 12 hex digits of the settings' SHA-256."""
        return hashlib.sha256(self.settings.encode()).hexdigest()[:12]


def join(store: Store, rank: int, ticket: Ticket, *, timeout_s: float) -> list[str]:
    """Meet the other ranks; the host of each is returned, by rank.

    Raises:
        LaunchError: another job holds the store, a rank has other settings or another world size,
            two processes have one rank, or ranks are missing after `timeout_s` seconds.
    """
    until = time.monotonic() + timeout_s
    try:
        _present(store, rank, ticket, until)
        return _wait_for_all(store, ticket, until, timeout_s)
    except LaunchError:
        if rank == 0 and ticket.world_size > 1:
            # Rank 0 often holds the store: the others read there why the meeting ended.
            time.sleep(4 * _POLL_S[1])
        raise
    except RuntimeError as error:
        raise LaunchError(
            f"rank {rank} of {ticket.world_size} lost the meeting place",
            f"rank 0 ended while the ranks met: {str(error).splitlines()[0]}",
            "read what rank 0 said",
        ) from error


def _present(store: Store, rank: int, ticket: Ticket, until: float) -> None:
    """Show the ticket: as rank 0 by writing it, else by comparing."""
    host = socket.gethostname()
    if rank == 0:
        store.set(_JOB, json.dumps({**asdict(ticket), "host": host}))
    elif not _poll(lambda: store.check([_JOB]), until):
        raise LaunchError(
            f"rank {rank} on {host} found a store, but rank 0 never wrote to it",
            "whatever listens at MASTER_ADDR and MASTER_PORT is not rank 0 of an xdist job",
            "use another port, and start all ranks with one launcher",
        )
    else:
        _compare(store, rank, host, ticket)
    me = f"{host} {os.getpid()}"
    sits = store.compare_set(_seat(rank), "", me).decode()
    if sits != me:
        raise LaunchError(
            f"two processes say that they are rank {rank} of {ticket.world_size}",
            f"host and process id: {sits}, and {me}",
            "give each process a RANK of its own, or start them with one launcher",
        )


def _compare(store: Store, rank: int, host: str, mine: Ticket) -> None:
    said = json.loads(store.get(_JOB))
    zero = f"rank 0 (host {said.pop('host')})"
    theirs = Ticket(**said)
    if theirs.nonce != mine.nonce:
        # Not a word in the store: the job that holds it goes on waiting for its own rank.
        raise LaunchError(
            f"rank {rank} on {host} met the ranks of another job",
            f"this one is of job {mine.nonce[:12] or '(none)'}, {zero} of job "
            f"{theirs.nonce[:12] or '(none)'}",
            "a process of an earlier start is still running, or two jobs use one port: end the "
            "stale one, or choose another port",
        )
    if theirs == mine:
        return
    if theirs.world_size != mine.world_size:
        why = f"WORLD_SIZE is {mine.world_size} here and {theirs.world_size} on {zero}"
    else:
        why = (
            f"config {mine.digest} here, config {theirs.digest} on {zero}: "
            f"{_difference(theirs.settings, mine.settings)}"
        )
    what = f"rank {rank} on {host} does not run what rank 0 runs"
    do = "start all ranks with the same config and the same overrides"
    store.set(_REFUSED, json.dumps([what, why, do]))
    raise LaunchError(what, why, do)


def _difference(theirs: str, mine: str) -> str:
    """The first settings that differ, as `key = mine (rank 0: theirs)`."""
    ours, zero = (
        dict(line.partition(" = ")[::2] for line in text.splitlines()) for text in (mine, theirs)
    )
    keys = [key for key in {**zero, **ours} if zero.get(key) != ours.get(key)]
    shown = [
        f"{key} = {ours.get(key, 'unset')} (rank 0: {zero.get(key, 'unset')})"
        for key in keys[:_SHOWN]
    ]
    more = len(keys) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def _wait_for_all(store: Store, ticket: Ticket, until: float, timeout_s: float) -> list[str]:
    seats = [_seat(rank) for rank in range(ticket.world_size)]

    def settled() -> bool:
        return store.check(seats) or store.check([_REFUSED])

    there = _poll(settled, until)
    if store.check([_REFUSED]):
        raise LaunchError(*json.loads(store.get(_REFUSED)))
    if there:
        return [_host(store, seat) for seat in seats]
    here = [rank for rank, seat in enumerate(seats) if store.check([seat])]
    missing = [rank for rank in range(ticket.world_size) if rank not in here]
    names = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    hosts = sorted({_host(store, seats[rank]) for rank in here})
    raise LaunchError(
        f"{len(here)} of {ticket.world_size} ranks joined; missing rank {names}",
        f"waited {timeout_s:g} s; those that joined are on {', '.join(hosts)}",
        "read what the missing ranks printed, or give a slow start more time with "
        "launch.init_timeout_s=N",
    )


def _poll(true: Callable[[], bool], until: float) -> bool:
    """Ask until it is true or the time is over."""
    pause, longest = _POLL_S
    while not (found := true()) and time.monotonic() < until:
        time.sleep(pause)
        pause = min(2 * pause, longest)
    return found


def _host(store: Store, seat: str) -> str:
    return store.get(seat).decode().split()[0]


def _seat(rank: int) -> str:
    return f"xdist/joined/{rank}"
