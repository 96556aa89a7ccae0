"""What is measured of one step: its time, and each rank's peak memory and bytes sent.

The exchange that brings these numbers together happens after the step, outside its ledger.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import resource
from typing import Any

import torch

from xdist.mesh import Mesh
from xdist.train.agree import gather_rows


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """One line of metrics.jsonl. Lists have one entry a rank, of this step alone."""

    step: int  # optimizer steps made, this one included
    stage: int
    sequence_length: int  # tokens of a whole sequence
    loss: float  # nats per token, mean over the valid tokens of the global batch
    tokens_per_s: float  # of all ranks together
    step_s: float
    learning_rate: float
    grad_norm: float  # before clipping
    sample_cursor: int  # samples used up to and including this step
    peak_memory_bytes: list[int]
    sent_bytes: list[int]
    planned_bytes: list[int]
    skipped: str = ""  # why the update was left out

    @property
    def bits_per_token(self) -> float:
        """The loss in bits; bits per byte when tokens are bytes."""
        return self.loss / math.log(2)

    def line(self) -> dict[str, Any]:
        """The object of metrics.jsonl; `skipped` only where an update was left out."""
        values = dataclasses.asdict(self)
        if not self.skipped:
            del values["skipped"]
        return values


class PeakMemory:
    """The peak memory of a span of time: allocated on CUDA, resident on a CPU.

    On Linux the kernel's high-water mark of resident memory is set back at the start of each
    span. Where it refuses that, `exact` is False and the peak is that since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.exact = device.type == "cuda" or _reset_high_water()

    def start(self) -> None:
        """Begin a span."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif self.exact:
            _reset_high_water()

    def peak_bytes(self) -> int:
        """The peak since `start`, bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if self.exact:
            return _high_water_bytes()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gather_numbers(numbers: list[int], mesh: Mesh) -> list[list[int]]:
    """For each of this rank's numbers, the list of all ranks' values in rank order."""
    rows = gather_rows(torch.tensor(numbers, dtype=torch.int64), mesh)
    return [column.tolist() for column in rows.T]


def _reset_high_water() -> bool:
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        return _high_water_bytes() > 0
    except OSError:
        return False


def _high_water_bytes() -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0
