"""Held-out grids: the loss, and of volumes how far each class overlaps the truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xdist.comm.reduce import start_reduce
from xdist.config import Config
from xdist.data import GridBatch, GridRequest, GridSplit
from xdist.memory.answers import Answers, counting_answers
from xdist.mesh import Mesh
from xdist.train.agree import together
from xdist.train.engines.protocol import Engine
from xdist.train.evaluate import Evaluation

if TYPE_CHECKING:
    from xdist.train.grid_work import GridWork


@dataclasses.dataclass(frozen=True)
class GridEvaluation(Evaluation):
    """The mean over all held-out positions that count.

    dice: of each class, by name; None of a class that neither the truth nor an answer has. No
    classes where there are none to be told apart, or where the model's loss counts no answers.
    """

    classes: bool = False  # whether the loss is a cross entropy
    dice: dict[str, float | None] | None = None

    @property
    def told(self) -> str:
        """For a line of the progress."""
        said = f"loss {self.loss:.4f}, {self.tokens:,} positions"
        each = (self.dice or {}).items()
        return said + "".join(
            f", Dice {name} {share:.3f}" for name, share in each if share is not None
        )

    def line(self) -> dict[str, Any]:
        """The `eval` object of metrics.jsonl; bits where the loss is a cross entropy."""
        line = super().line()
        del line["classes"], line["length"], line["read_tokens"]
        return line if self.classes else {k: v for k, v in line.items() if k != "bits_per_token"}


def evaluate_grids(
    config: Config, work: GridWork, engine: Engine, on_window: Callable[[], bool]
) -> GridEvaluation | None:
    """The first `evaluate.samples` of the held-out split, each whole; data ranks take them in turn.

    `on_window` is called before each; where it is true on any rank, all return None.

    Raises DataError, the same on all ranks, when a part cannot be read on any.
    """
    mesh = work.shard.mesh
    split = work.held_out
    module = engine.module
    was_training = module.training
    module.eval()
    total, tokens, read = 0.0, 0, 0
    names = split.classes if work.labelled else ()
    with torch.no_grad(), counting_answers(len(names)) as answers:
        for request, filled in _requests(config, mesh, split):
            stop = on_window()
            batch = together(mesh, lambda request=request: _read(work, split, request))  # type: ignore[misc]
            # A data rank without a sample of its own takes part in every move, counting nothing.
            if mesh.data_rank >= filled:
                batch = batch.without(range(len(batch.rows)))
            valid, stopping = _sum(mesh, torch.tensor([batch.valid_tokens, int(stop)])).tolist()
            if stopping:
                module.train(was_training)
                return None
            total += float(work.loss(engine, batch, 0, valid)) * valid
            tokens, read = tokens + valid, read + filled
    module.train(was_training)
    return GridEvaluation(
        total / max(tokens, 1),
        tokens,
        length=config.tokens_of(config.train.curriculum[-1]),
        read_tokens=read,
        classes=bool(names),
        dice=_dice(answers, tokens, names, mesh),
    )


def _read(work: GridWork, split: GridSplit, request: GridRequest) -> GridBatch:
    # Held-out noise is that of no sample of training, and of the sample alone.
    return work.read(split, request, [-1 - sample for sample in request.samples])


def _requests(config: Config, mesh: Mesh, split: GridSplit) -> Iterator[tuple[GridRequest, int]]:
    """Requests of one row per data rank, and how many of the rows are samples of their own."""
    numbers = list(range(min(split.samples, config.evaluate.samples)))
    for at in range(0, len(numbers), mesh.data_size):
        row = numbers[at : at + mesh.data_size]
        padded = row + [row[0]] * (mesh.data_size - len(row))
        yield GridRequest.whole(at, padded, config.model.sizes), len(row)


def _sum(mesh: Mesh, values: Tensor) -> Tensor:
    return start_reduce(values.to(mesh.device), mesh.parameter_group).wait().cpu()


def _dice(
    answers: Answers, tokens: int, names: tuple[str, ...], mesh: Mesh
) -> dict[str, float | None] | None:
    """2 |A and B| / (|A| + |B|) of each class over all ranks; None where answers were not seen."""
    if not names or answers.confusion is None:
        return None
    pairs = _sum(mesh, answers.confusion)
    if int(pairs.sum()) != tokens:
        return None
    found: dict[str, float | None] = {}
    for number, name in enumerate(names):
        size = int(pairs[number].sum() + pairs[:, number].sum())
        found[name] = 2 * int(pairs[number, number]) / size if size else None
    return found
