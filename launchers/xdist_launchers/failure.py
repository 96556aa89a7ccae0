"""How a failure is told: the record one rank leaves behind, and the message a person reads."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import socket
import sys
import time
import traceback

INTERRUPTED = 130  # 128 + SIGINT, as shells count


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why one rank ended. `time_s` is seconds since the epoch, to tell who failed first."""

    rank: int
    host: str
    exit_code: int
    kind: str
    what: str
    why: str
    do: str
    traceback: str
    time_s: float

    @property
    def is_consequence(self) -> bool:
        """Whether this rank only noticed that another one was gone."""
        return self.kind == "PeerLost"

    def message(self, details: str = "") -> str:
        """What, why and do, a line each, then where the details are."""
        lines = [f"xdist: {self.what}", self.why, self.do]
        if details:
            lines.append(f"details: {details}")
        return "\n".join(line for line in lines if line)


def failure_of(error: BaseException, rank: int | None = None) -> Failure:
    """Describe an exception, of a rank or of a command that has none.

    Errors of xdist carry their own words and exit code.
    """
    # Not imported at the top: the command line first checks that `xdist` is this project.
    from xdist.errors import XdistError

    if isinstance(error, XdistError):
        what, why, do, code = error.what, error.why, error.do, error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        what, why, do, code = "interrupted", "", "", INTERRUPTED
    else:
        text = str(error).strip().splitlines()
        who = "this command" if rank is None else f"rank {rank}"
        what = f"{who} failed with {type(error).__name__}" + (f": {text[0]}" if text else "")
        why, do, code = "", "", 1
    host = socket.gethostname()
    # An error that ranks agreed on names the rank on which it happened; PeerLost names a peer.
    # A watchdog's verdict names the one that hangs, which can say nothing itself.
    names = code != 7 or getattr(error, "verdict", False)
    if names and getattr(error, "rank", None) is not None:
        rank, host = int(error.rank), str(getattr(error, "host", "") or host)  # type: ignore[attr-defined]
    return Failure(
        rank=rank or 0,
        host=host,
        exit_code=code,
        kind=type(error).__name__,
        what=what,
        why=why,
        do=do,
        traceback="".join(traceback.format_exception(error)),
        time_s=time.time(),
    )


def write_failure(failure: Failure, path: str | os.PathLike[str]) -> None:
    """Write the record beside and rename it, so that a reader never sees half of it."""
    target = pathlib.Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    beside.write_text(json.dumps(dataclasses.asdict(failure), indent=1) + "\n", encoding="utf-8")
    beside.replace(target)


def inform_torchrun(failure: Failure) -> None:
    """Leave the message where torchrun looks for it, so that its summary says why.

    Its form is that of torch.distributed.elastic's error files. Without torchrun nothing is done.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    from xdist.console import on_disk

    extra = {"py_callstack": failure.traceback, "timestamp": str(int(failure.time_s))}
    said = {"message": {"message": failure.message(), "extraInfo": extra}}
    with on_disk(path):
        pathlib.Path(path).write_text(json.dumps(said), encoding="utf-8")


def read_failure(path: str | os.PathLike[str]) -> Failure | None:
    """The record at `path`, None when that rank left none."""
    try:
        return Failure(**json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def tell(failure: Failure, details: str = "") -> None:
    """Print the message on stderr; of an exception that is not xdist's own, the traceback too."""
    say(failure.message(details))
    if failure.exit_code == 1:
        say(failure.traceback.removesuffix("\n"))


def say(text: str) -> None:
    """Print on standard error; that nobody reads it (`2>&1 | head`) ends nothing."""
    from xdist.console import say as say_on

    say_on(text, sys.stderr)
