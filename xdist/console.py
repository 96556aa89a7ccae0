"""Lines for a person, who may have stopped reading: `xdist launch local CONFIG | head`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


def say(text: str, stream: TextIO) -> None:
    """Print `text` and flush. A stream that takes no more is silent from then on.

    That is a pipe whose reader has left, a terminal that is gone, a file on a full disk. What
    happens in a run is in its files; nothing ends because nobody reads.
    """
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        _silence(stream, error)


def pass_on(data: bytes, stream: TextIO) -> None:
    """As `say`, of what another process printed."""
    try:
        stream.buffer.write(data)
        stream.buffer.flush()
    except OSError as error:
        _silence(stream, error)


@contextlib.contextmanager
def on_disk(what: str) -> Iterator[None]:
    """A full disk, or one that is gone, is told on standard error and ends nothing.

    `what` names what was to be written. For writes that matter less than what comes after them.
    """
    try:
        yield
    except OSError as error:
        tell_unwritten(what, error)


def tell_unwritten(what: str, error: OSError) -> None:
    """Say on standard error, where that is possible, what a disk refused."""
    with contextlib.suppress(OSError, ValueError):
        say(f"xdist: {what} could not be written: {error}", sys.stderr)


def _silence(stream: TextIO, error: OSError) -> None:
    """Lead the stream's descriptor to nowhere. What is left in its buffer would otherwise fail
    once more when Python flushes it at its end, with exit code 120."""
    with contextlib.suppress(OSError, ValueError):
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
    if stream is not sys.stderr and not isinstance(error, BrokenPipeError):
        tell_unwritten("what is printed", error)
