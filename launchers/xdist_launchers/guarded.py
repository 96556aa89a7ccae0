"""A command's body, ended by its exit code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import typer


def guarded(body: Callable[[], int | None]) -> None:
    """Run a command's body; end with its exit code, or tell its error once."""
    from xdist_launchers.failure import failure_of, tell

    try:
        code = body() or 0
    except BrokenPipeError:
        # The reader, e.g. `head`, has seen enough. Nothing more must be flushed into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        failure = failure_of(error)
        tell(failure)
        code = failure.exit_code
    raise typer.Exit(code)
