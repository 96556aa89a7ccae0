"""What a launcher reads and writes of a run's folder: status.json and the newest step."""

from __future__ import annotations

import json
import pathlib
import re

from xdist.console import on_disk
from xdist.train.record import read_status, replace
from xdist_launchers.failure import Failure


def replace_status(directory: pathlib.Path, failure: Failure, state: str = "failed") -> None:
    """Replace status.json: ranks that were killed could not. Step and checkpoint stay as known."""
    known = Progress(directory)
    old = read_status(directory)
    values = old | {
        "state": state,
        "step": known.step if known.step is not None else old.get("step", 0),
        "exit_code": failure.exit_code,
        "rank": failure.rank,
        "host": failure.host,
        "reason": "; ".join(part for part in (failure.what, failure.why) if part),
        "last_checkpoint": known.checkpoint,
    }
    with on_disk("status.json"):
        replace(directory / "status.json", json.dumps(values, indent=1) + "\n", tag="launcher")


def last_seen(directory: pathlib.Path, rank: int, pid: int) -> str:
    """What a rank's process was doing when it was last heard of, e.g. "in backward of step 7"."""
    path = directory / "logs" / f"rank-{rank}.moves"
    try:
        head, _, phase = path.read_text(encoding="utf-8").partition("\n")[0].partition(": ")
        # Since when, the start's number, the last beat, host, process, what is timed.
        _, _, _, _, process, span = head.split(maxsplit=5)
    except (OSError, ValueError):
        return ""
    return f"in {phase.strip()} of {span}" if process == str(pid) else ""


class Progress:
    """The newest completed step and checkpoint of a run, as its folder tells them now."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.checkpoint = str(read_status(directory).get("last_checkpoint") or "")
        self.step = _last_step(directory / "metrics.jsonl")
        self._file = _identity(directory / "metrics.jsonl")

    def made(self) -> bool:
        """Whether a step was completed since this was read.

        A start replaces metrics.jsonl by one that ends at the checkpoint it resumes from.
        """
        now = Progress(self.directory)
        found = re.search(r"(\d+)/*$", self.checkpoint)
        resumed_from = int(found.group(1)) if found else 0
        return now._file != self._file and (now.step or 0) > resumed_from


def _identity(path: pathlib.Path) -> int | None:
    return path.stat().st_ino if path.exists() else None


def _last_step(path: pathlib.Path) -> int | None:
    """The step of the last whole line of metrics.jsonl."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        # Lines are a few hundred bytes to a few KiB: the last 64 KiB hold several.
        file.seek(max(0, path.stat().st_size - 65536))
        tail = file.read()
    for line in reversed(tail.splitlines()):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return None
