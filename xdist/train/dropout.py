"""What dropout inside attention is named by in a run: seed, step, and samples by their number."""

from __future__ import annotations

from torch import nn

from xdist.config import Config
from xdist.data import Batch


def name_dropout(module: nn.Module, config: Config, step: int, batch: Batch) -> None:
    """Tell a model that drops attention probabilities what to draw them from.

    A model takes it by a method `name_dropout(*, seed, step, first_row)`; others are left alone.
    Rows are numbered by the run's sample cursor, so that the same fall for every number of ranks,
    split into micro-steps, and after a resume.
    """
    named = getattr(module, "name_dropout", None)
    if named is not None:
        first = batch.request.cursor + (batch.rows[0] if batch.rows else 0)
        named(seed=config.run.seed, step=step, first_row=first)
