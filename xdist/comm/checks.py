"""Errors everywhere or nowhere: agreeing on a fault that one rank sees, and the value checks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from xdist.comm.collectives import ProcessGroup, exchange_integers, rank_of

_state = threading.local()


@contextmanager
def checks() -> Iterator[None]:
    """Turn on, for this thread, the value checks that cost an exchange.

    Ops then refuse NaN and values outside their range with one error on all ranks. Enter it on
    every rank or on none. Bytes count as control.
    """
    before = checks_are_on()
    _state.on = True
    try:
        yield
    finally:
        _state.on = before


def checks_are_on() -> bool:
    """Whether the caller stands inside `checks()`."""
    return bool(getattr(_state, "on", False))


def raise_together(
    group: ProcessGroup | None, fault: bool, error: Callable[[list[int]], Exception]
) -> None:
    """Raise `error(ranks)` on every rank of `group` when `fault` is true on any of them.

    `ranks` lists the group's ranks that saw the fault, the same list everywhere. Every rank of the
    group must call. 8 control bytes to each other rank.
    """
    said = exchange_integers([int(fault)], group)
    faulty = [rank for rank, (flag,) in enumerate(said) if flag]
    if faulty:
        raise error(faulty)


def disagreeing_ranks(group: ProcessGroup | None, fingerprint: bytes) -> list[int]:
    """The ranks of `group` whose fingerprint is not rank 0's; the same list on every rank."""
    padded = fingerprint[:32].ljust(32, b"\0")
    words = [int.from_bytes(padded[i : i + 8], "little", signed=True) for i in range(0, 32, 8)]
    said = exchange_integers(words, group)
    assert said[rank_of(group)] == tuple(words)
    return [rank for rank, other in enumerate(said) if other != said[0]]
