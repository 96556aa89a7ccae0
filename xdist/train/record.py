"""The folder of a run: metrics.jsonl, status.json, config.toml, run.json.

Only rank 0 writes, but for status.json when a rank fails: the failing rank writes it. The folder
and its files are for their owner alone (0700, 0600).
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import socket
from typing import Any, TextIO

METRICS = "metrics.jsonl"
STATUS = "status.json"
CONFIG = "config.toml"
RUN = "run.json"
CHECKPOINTS = "checkpoints"
REPORT = "report.html"
MET = "logs/met"


class Record:
    """Writes the files of one run. On ranks other than 0 everything but `status` is a no-op."""

    def __init__(self, directory: pathlib.Path, rank: int) -> None:
        self.directory = directory
        self.rank = rank
        self.last_checkpoint = ""
        self._metrics: TextIO | None = None
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
        self._metrics = path.open("a")
        return dropped

    def metrics(self, line: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl; values that are not finite become null."""
        if self._metrics is not None:
            self._metrics.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            self._metrics.flush()

    def has_evaluation(self, step: int) -> bool:
        """Whether metrics.jsonl holds the evaluation after `step`."""
        lines = reversed(read_metrics(self.directory))
        return any(line["step"] == step and "eval" in line for line in lines)

    def status(
        self, state: str, step: int, *, exit_code: int | None = None, reason: str = "", **where: Any
    ) -> None:
        """Replace status.json. `where`: rank and host of a failure that happened elsewhere."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        values = {
            "state": state,
            "step": step,
            "exit_code": exit_code,
            "rank": where.get("rank", self.rank),
            "host": where.get("host", socket.gethostname()),
            "reason": reason,
            "last_checkpoint": self.last_checkpoint,
        }
        replace(self.directory / STATUS, json.dumps(values, indent=1) + "\n", tag=str(self.rank))

    def close(self) -> None:
        """Close metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


def replace(path: pathlib.Path, text: str, tag: str = "0") -> None:
    """Replace a file as one act: a reader sees the old text or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{tag}.{os.getpid()}")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    os.replace(beside, path)


def read_metrics(directory: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl in order; a torn last line is left out."""
    path = directory / METRICS
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object of the run folder, empty when the file is not there."""
    return json.loads(path.read_text()) if path.exists() else {}


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
