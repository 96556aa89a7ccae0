"""The one socket that xdist opens itself, where rank 0 listens, and the knock of the others."""

from __future__ import annotations

import errno
import socket
import time

from xdist.errors import LaunchError, PortError
from xdist.rank import is_loopback

_BACKLOG = 1024  # ranks that may knock at the same moment
_PAUSE_S = (0.01, 0.25)  # first and longest pause between two knocks
_ANSWER_S = 5.0  # for one knock


def listen(address: str, port: int) -> socket.socket:
    """A TCP socket that listens at `address` (a name or a number) and on no other interface.

    Raises:
        PortError: the port is taken.
        LaunchError: the address is unknown, or is not one of this host.
    """
    family, where = _resolve(address, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    # A port of which old connections wait to be forgotten is free.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(where)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _refusal(error, address, port, where) from error
    return listener


def knock(address: str, port: int, *, timeout_s: float) -> None:
    """Return as soon as somebody listens at `address`.

    torch's own client begins its whole timeout again and again when nobody does.

    Raises:
        LaunchError: nobody listens there after `timeout_s` seconds.
    """
    until = time.monotonic() + timeout_s
    pause, longest = _PAUSE_S
    while True:
        try:
            socket.create_connection((address, port), timeout=_ANSWER_S).close()
            return
        except OSError as error:
            if time.monotonic() + pause > until:
                raise LaunchError(
                    f"rank 0 does not listen at {address} port {port}",
                    f"asked from host {socket.gethostname()} for {timeout_s:g} s: {error}",
                    "read what rank 0 printed, check that MASTER_ADDR can be reached from here, or "
                    "give a slow start more time with launch.init_timeout_s=N",
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, longest)


def _resolve(address: str, port: int) -> tuple[int, tuple[str, int]]:
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise LaunchError(
            f"MASTER_ADDR={address} is no address that host {socket.gethostname()} knows",
            str(error),
            "give a name or a number of the host of rank 0",
        ) from error
    # IPv4 first, as torch's clients that get both find either.
    family, _, _, _, where = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    if is_loopback(str(where[0])) and not is_loopback(address):
        # /etc/hosts often maps a host's own name to 127.0.1.1, which no other host can reach.
        return family, ("::" if family == socket.AF_INET6 else "0.0.0.0", port)
    return family, (str(where[0]), port)


def _refusal(error: OSError, address: str, port: int, where: tuple[str, int]) -> LaunchError:
    host = socket.gethostname()
    if error.errno == errno.EADDRINUSE:
        return PortError(
            f"port {port} of {address} is taken on host {host}",
            "another process listens there, perhaps another job or a rank of an earlier start",
            "start again, which draws another port, or set MASTER_PORT to a free one",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return LaunchError(
            f"MASTER_ADDR={address} is not an address of rank 0's host {host}",
            f"it stands for {where[0]}, which no interface of this host has",
            "set MASTER_ADDR to an address of the host on which rank 0 runs",
        )
    return LaunchError(f"rank 0 cannot listen at {address} port {port} on host {host}", str(error))
