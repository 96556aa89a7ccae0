"""The folder of a run: metrics.jsonl, status.json, config.toml, run.json.

Only rank 0 writes, but for status.json when a rank fails: the failing rank writes it. The folder
and its files are for their owner alone (0700, 0600).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Any

from xdist.console import on_disk, tell_unwritten

METRICS = "metrics.jsonl"
STATUS = "status.json"
CONFIG = "config.toml"
RUN = "run.json"
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
MET = "logs/met"


class Record:
    """Writes the files of one run. On ranks other than 0 everything but `status` is a no-op.

    A disk that is full ends no run by itself: what it refuses is told once on standard error, and
    lines of metrics.jsonl wait until there is room again. Saves have a rule of their own.
    """

    def __init__(self, directory: pathlib.Path, rank: int) -> None:
        self.directory = directory
        self.rank = rank
        self.last_checkpoint = ""
        self._metrics: io.FileIO | None = None
        self._waiting = b""  # of metrics.jsonl
        self._told: set[str] = set()
        if rank == 0:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of the checkpoints."""
        return self.directory / CHECKPOINTS

    def met(self) -> None:
        """Leave logs/met: all ranks have met. A launcher that waits for that watches for it."""
        if self.rank == 0:
            replace(self.directory / MET, "")

    def describe(self, config_toml: str, facts: dict[str, Any]) -> None:
        """Write config.toml as resolved, and run.json: versions, ranks, parameters, plan."""
        if self.rank == 0:
            replace(self.directory / CONFIG, config_toml)
            replace(self.directory / RUN, json.dumps(facts, indent=1) + "\n")

    def open_metrics(self, step: int, *, at_end: bool = False) -> int:
        """Open metrics.jsonl to append after `step` completed steps; return the lines dropped.

        A run that died after its last checkpoint left lines of steps that will be made again, and
        perhaps half a line: both are dropped, so that each step is there once. `at_end`: only the
        final evaluation is left to do, and an earlier one after `step` is dropped as well.
        """
        if self.rank != 0:
            return 0
        path = self.directory / METRICS
        kept, dropped = [], 0
        if path.exists():
            for line in path.read_text().splitlines():
                again = at_end and _step_of(line) == step and "eval" in json.loads(line)
                if _step_of(line) <= step and not again:
                    kept.append(line + "\n")
                else:
                    dropped += 1
        replace(path, "".join(kept))
        self._metrics = io.FileIO(path, "a")
        return dropped

    def metrics(self, line: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl; values that are not finite become null."""
        if self._metrics is not None:
            self._waiting += json.dumps(_finite(line), allow_nan=False).encode() + b"\n"
            with self._once(METRICS):
                self._write_waiting(self._metrics)

    def has_evaluation(self, step: int) -> bool:
        """Whether metrics.jsonl holds the evaluation after `step`."""
        lines = reversed(read_metrics(self.directory))
        return any(line["step"] == step and "eval" in line for line in lines)

    def status(
        self,
        state: str,
        step: int,
        *,
        exit_code: int | None = None,
        reason: str = "",
        durable: bool = True,
        **where: Any,
    ) -> None:
        """Replace status.json. `where`: rank and host of a failure that happened elsewhere; without
        `durable` nothing waits for the disk, which may be busy with a checkpoint."""
        values = {
            "state": state,
            "step": step,
            "exit_code": exit_code,
            "rank": where.get("rank", self.rank),
            "host": where.get("host", socket.gethostname()),
            "reason": reason,
            "last_checkpoint": self.last_checkpoint,
        }
        text = json.dumps(values, indent=1) + "\n"
        # That it runs is said in every step, and nobody needs it after a loss of power.
        running = state == "running"
        with self._once(STATUS) if running else on_disk(f"{STATUS} ({state})"):
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            kept = durable and not running
            replace(self.directory / STATUS, text, tag=str(self.rank), durable=kept)

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self._metrics is not None:
            lost = self._waiting.count(b"\n")
            with on_disk(f"the last lines of {METRICS} ({lost})"), self._metrics as file:
                self._write_waiting(file)
            self._metrics = None

    def _write_waiting(self, file: io.FileIO) -> None:
        """Write what waits for metrics.jsonl. A full disk may take a part: the rest comes after."""
        while self._waiting:
            self._waiting = self._waiting[file.write(self._waiting) or 0 :]

    @contextlib.contextmanager
    def _once(self, name: str) -> Iterator[None]:
        """`on_disk` for what is written in every step."""
        try:
            yield
        except OSError as error:
            if name not in self._told:
                tell_unwritten(name, error)
            self._told.add(name)


def replace(path: pathlib.Path, text: str, tag: str = "0", *, durable: bool = True) -> None:
    """Replace a file as one act: a reader sees the old text or the new one, never a part.

    Without `durable` a loss of power may leave it empty; nothing waits for the disk then.
    """
    beside = path.with_name(f".{path.name}.{tag}.{os.getpid()}")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def read_metrics(directory: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl in order; a torn last line is left out."""
    path = directory / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object of the run folder, empty when the file is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


def read_status(directory: pathlib.Path) -> dict[str, Any]:
    """status.json of a run; empty where there is none, or a loss of power left half of one."""
    try:
        return read_json(directory / STATUS)
    except ValueError:
        return {}


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity when it is torn."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
