"""Optional TensorBoard events of a run (extra: tensorboard)."""

from __future__ import annotations

import pathlib

from xdist.errors import ConfigError
from xdist.train.evaluate import Evaluation
from xdist.train.metrics import StepMetrics


class Board:
    """Writes the scalars of each step under `directory`."""

    def __init__(self, directory: pathlib.Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

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
        for name, value in values.items():
            self._writer.add_scalar(name, value, metrics.step)

    def evaluation(self, step: int, result: Evaluation) -> None:
        """One evaluation after `step`."""
        self._writer.add_scalar("eval/loss", result.loss, step)
        if result.accuracy is not None:
            self._writer.add_scalar("eval/accuracy", result.accuracy, step)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


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
