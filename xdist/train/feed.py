"""The batches of a run in order: which samples each step uses, read ahead across stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xdist.config import Config, Stage
from xdist.data import Batch, Loader, Request, TextStore
from xdist.data.loader import Place
from xdist.data.read_ahead import ReadAhead
from xdist.errors import DataError
from xdist.layout import Layout
from xdist.mesh import Mesh
from xdist.shard import SequenceShard
from xdist.train.resume import Position, stage_of


@dataclasses.dataclass
class StepBatch:
    """This rank's part of one optimizer step: one batch per micro-step."""

    micro: list[Any]  # Batch, or GridBatch
    first_sample: int  # cursor of the step's first sample
    samples: int  # samples of the step, over all ranks
    error: DataError | None = None  # why this rank could not read its slices
    given_up: bool = False  # this rank was asked to stop before its slices were read

    @property
    def valid_tokens(self) -> int:
        """Tokens, or positions, of this rank with a label that counts."""
        return sum(batch.valid_tokens for batch in self.micro)

    @property
    def bad_rows(self) -> int:
        """Rows whose slice this rank could not read, over the micro-steps."""
        return sum(len(batch.bad) for batch in self.micro)

    def flags(self) -> Tensor:
        """float64 [samples]: 1 where this rank could not read its slice of a sample."""
        flags = torch.zeros(self.samples, dtype=torch.float64)
        for batch in self.micro:
            for row, _ in batch.bad:
                flags[batch.request.cursor - self.first_sample + batch.rows[row]] = 1.0
        return flags

    def without(self, flags: Tensor) -> StepBatch:
        """The same step without the labels of flagged samples (any rank's flags, summed)."""
        micro = []
        for batch in self.micro:
            first = batch.request.cursor - self.first_sample
            rows = [i for i, row in enumerate(batch.rows) if flags[first + row] > 0]
            micro.append(batch.without(rows))
        return dataclasses.replace(self, micro=micro)


class Feed:
    """The steps of a run from `position` on; `ahead` gives the batch of each micro-step in turn.
    Close it to end its thread."""

    def __init__(self, config: Config, position: Position, ahead: ReadAhead[Any]) -> None:
        self._config, self._ahead = config, ahead
        self._step, self._cursor = position.step, position.sample_cursor

    def next_step(self, give_up: Callable[[], bool] = lambda: False) -> StepBatch:
        """The batches of the next optimizer step; none once `give_up()` is true while they are
        waited for. A slice that cannot be read is no exception here but `error`, because the
        other ranks have to hear of it first."""
        stage = self._config.train.curriculum[stage_of(self._config, self._step)]
        step = StepBatch([], self._cursor, stage.batch * self._config.train.accumulation)
        self._step += 1
        self._cursor += step.samples
        try:
            for _ in range(self._config.train.accumulation):
                if not self._ahead.wait(give_up):
                    step.micro, step.given_up = [], True
                    break
                step.micro.append(next(self._ahead))
        except DataError as error:
            step.error = error
        return step

    def close(self) -> None:
        """End the reading thread."""
        self._ahead.close()


class Draw(NamedTuple):
    """One micro-step: its stage, the cursor of its first sample, and the cursor from which the
    stage counts its epochs."""

    stage: Stage
    cursor: int
    first: int


def draws_of(config: Config, position: Position) -> Iterator[Draw]:
    """Every micro-step from `position` to the end of the curriculum."""
    begins, cursor = 0, position.sample_cursor
    for index, stage in enumerate(config.train.curriculum):
        # Epochs are counted from the stage's own first sample.
        going_on = index == stage_of(config, position.step)
        first = position.stage_first if going_on else cursor
        for _ in range(max(begins, position.step), begins + stage.steps):
            for _ in range(config.train.accumulation):
                yield Draw(stage, cursor, first)
                cursor += stage.batch
        begins += stage.steps


def text_feed(config: Config, mesh: Mesh, store: TextStore, position: Position) -> Feed:
    """Reads tokens ahead from `position` to the end of the curriculum."""
    split = store.split("train")
    layouts = {
        stage.length: layout_of(config, stage.length, mesh) for stage in config.train.curriculum
    }
    unit = split.sample_length or 1
    requests = (
        Request.draw(
            config.run.seed,
            cursor,
            stage.batch,
            layouts[stage.length],
            split.length,
            first=first,
            unit=unit,
        )
        for stage, cursor, first in draws_of(config, position.copy())
    )
    data = config.data
    loader = Loader(
        split,
        requests,
        place_of(mesh),
        documents=data.documents,
        on_bad=data.on_bad,
        prefetch=data.prefetch,
    )
    return Feed(config, position, loader)


class Shards:
    """The shard of a batch; without documents, one shard per length for the whole run.

    Making a shard compares a fingerprint over its sequence group, so every rank of the group has
    to ask for the same shards in the same order.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._known: dict[Layout, SequenceShard] = {}

    def of(self, batch: Batch) -> SequenceShard:
        """The shard for `batch`'s layout and documents."""
        layout = batch.request.layout
        if batch.cu_seqlens is not None:
            return SequenceShard(self._mesh, layout, documents=list(batch.cu_seqlens))
        if layout not in self._known:
            self._known[layout] = SequenceShard(self._mesh, layout)
        return self._known[layout]


def layout_of(config: Config, length: int, mesh: Mesh) -> Layout:
    """Which positions each sequence rank holds of a sequence of `length` tokens."""
    make = Layout.zigzag if config.parallel.layout == "zigzag" else Layout.contiguous
    return make(length, mesh.sequence_size)


def place_of(mesh: Mesh) -> Place:
    """Which rows and which segments this rank reads."""
    return Place(mesh.data_rank, mesh.data_size, mesh.sequence_rank)


def tokens_of(config: Config, stage: Stage) -> int:
    """Tokens of one optimizer step of a stage, over all ranks."""
    return config.tokens_of(stage) * stage.batch * config.train.accumulation
