"""Steps whose numbers are not finite: left out by all ranks alike, and too many in a row end a run.

Loss and norm are global sums, so every rank sees the same ones and decides the same.
"""

from __future__ import annotations

import math

from xdist.errors import NumericsError
from xdist.mesh import Mesh
from xdist.train.agree import share_json_rows
from xdist.train.engines.protocol import Engine
from xdist.train.failures import dump_diagnosis
from xdist.train.feed import StepBatch
from xdist.train.record import Record
from xdist.train.resume import Position

_KEPT_LOSSES = 20  # of the last steps, for the diagnosis


class BadSteps:
    """Decides after each step whether its gradients may change the parameters."""

    def __init__(self, engine: Engine, mesh: Mesh, record: Record, *, max_skipped: int) -> None:
        self._engine, self._mesh, self._record = engine, mesh, record
        self._max_skipped = max_skipped
        self._losses: list[float] = []

    def update(
        self, position: Position, batch: StepBatch, *, loss: float, norm: float, rate: float
    ) -> str:
        """Change the parameters, or leave them when a number is not finite and say why.

        Raises NumericsError on every rank when more than `max_skipped` steps in a row were not
        finite, after diagnosis.json was written.
        """
        self._losses = [*self._losses[1 - _KEPT_LOSSES :], loss]
        if math.isfinite(loss) and math.isfinite(norm):
            self._engine.update(rate)
            position.skipped_in_row = 0
            return ""
        self._engine.drop()
        position.skipped_in_row += 1
        parts = share_json_rows(self._engine.bad_parameter(), self._mesh)
        bad = [f"rank {rank}: {name}" for rank, name in enumerate(parts) if name]
        last = batch.first_sample + batch.samples - 1
        why = (
            f"loss {loss}, gradient norm {norm}; samples {batch.first_sample} to {last}; "
            f"first gradient that is not finite: {', '.join(bad) or 'none before the sum'}"
        )
        if position.skipped_in_row > self._max_skipped:
            self._give_up(position, why)
        return why

    def _give_up(self, position: Position, why: str) -> None:
        count, step = position.skipped_in_row, position.step + 1
        facts = {"step": step, "why": why, "losses": [str(loss) for loss in self._losses]}
        path = dump_diagnosis(self._record, self._mesh, self._engine, facts)
        error = NumericsError(
            f"{count} steps in a row were not finite; the last is step {step}",
            f"{why}; train.max_skipped is {self._max_skipped}",
            f"see {path}; resume from {self._record.last_checkpoint or 'the start'} with a lower "
            "optimizer.learning_rate or a longer warm-up",
        )
        error.agreed = True  # type: ignore[attr-defined]
        raise error
