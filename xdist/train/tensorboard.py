"""Optional TensorBoard events of a run (extra: tensorboard)."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from xdist.console import tell_unwritten
from xdist.errors import ConfigError
from xdist.train.evaluate import Evaluation
from xdist.train.metrics import StepMetrics


class Board:
    """Writes the scalars of each step under `directory`, until the disk takes no more."""

    def __init__(self, directory: pathlib.Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory))

    def step(self, metrics: StepMetrics) -> None:
        """One optimizer step, by its number."""
        values = {
            "train/loss": metrics.loss,
            "train/learning_rate": metrics.learning_rate,
            "train/grad_norm": metrics.grad_norm,
            "train/tokens_per_s": metrics.tokens_per_s,
            "train/sequence_length": metrics.sequence_length,
            "rank/peak_memory_bytes": max(metrics.peak_memory_bytes),
            "rank/sent_bytes": max(metrics.sent_bytes),
        }
        self._add(metrics.step, values)

    def evaluation(self, step: int, result: Evaluation) -> None:
        """One evaluation after `step`."""
        accuracy = {} if result.accuracy is None else {"eval/accuracy": result.accuracy}
        self._add(step, {"eval/loss": result.loss} | accuracy)

    def close(self) -> None:
        """Flush and close the file."""
        with self._told():
            if self._writer is not None:
                self._writer.close()

    def _add(self, step: int, values: dict[str, float]) -> None:
        with self._told():
            for name, value in values.items():
                if self._writer is not None:
                    self._writer.add_scalar(name, value, step)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """The writer's thread keeps its error and raises it again at each call: once is enough."""
        try:
            yield
        except OSError as error:
            tell_unwritten("TensorBoard's events", error)
            self._writer = None


def open_board(directory: pathlib.Path, rank: int) -> Board | None:
    """A board on rank 0, None elsewhere. Raises ConfigError on every rank without the package."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise ConfigError(
            "log.tensorboard needs the package tensorboard",
            "it is not installed in this environment",
            "pip install 'xdist-train[tensorboard]', or set log.tensorboard=false",
        ) from None
    return Board(directory) if rank == 0 else None
