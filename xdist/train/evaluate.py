"""Held-out loss under the same sharding and the same reduction as training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import torch

from xdist.comm.reduce import start_reduce
from xdist.config import Config
from xdist.data import Request, TextStore, evaluation_windows
from xdist.data.loader import read_batch
from xdist.memory.answers import Answers, counting_answers
from xdist.mesh import Mesh
from xdist.train.agree import together
from xdist.train.engines.protocol import Engine
from xdist.train.feed import Shards, layout_of, place_of
from xdist.train.text_checks import read_tokens


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The mean over all valid held-out tokens."""

    loss: float  # nats per token
    tokens: int  # tokens with a label that counts
    length: int  # tokens of one evaluated sequence
    read_tokens: int  # the first tokens of the split that were evaluated
    accuracy: float | None = None  # of a task: share of the scored answers that are right

    @property
    def bits_per_token(self) -> float:
        """Bits per byte when tokens are bytes."""
        return self.loss / math.log(2)

    @property
    def told(self) -> str:
        """For a line of the progress."""
        said = f"loss {self.loss:.4f}, {self.bits_per_token:.3f} bits, {self.tokens:,} tokens"
        return said if self.accuracy is None else f"{said}, {self.accuracy:.1%} of answers right"

    def line(self) -> dict[str, Any]:
        """The `eval` object of metrics.jsonl."""
        line = {**dataclasses.asdict(self), "bits_per_token": self.bits_per_token}
        return {key: value for key, value in line.items() if value is not None}


def evaluate(
    config: Config,
    mesh: Mesh,
    engine: Engine,
    store: TextStore,
    shards: Shards,
    on_window: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate the first `evaluate.tokens` of the held-out split in sequences of
    `evaluate.length`; the last one may be shorter. Sequences go to data ranks in turn.
    `on_window` is called before each; where it is true on any rank, all return None.

    Raises DataError, the same on all ranks, when a chunk cannot be read on any.
    """
    split = together(mesh, lambda: store.split(config.data.held_out))
    total, tokens = 0.0, 0
    module = engine.module
    was_training = module.training
    module.eval()
    read = read_tokens(config, split)
    with torch.no_grad(), counting_answers() as answers:
        for request, filled in _requests(config, mesh, read):
            stop = on_window()
            batch = together(
                mesh,
                lambda request=request: read_batch(  # type: ignore[misc]
                    split, request, place_of(mesh), documents=config.data.documents
                ),
            )
            # A data rank without a window of its own takes part in every move, with no label.
            if mesh.data_rank >= filled:
                batch = batch.without([0])
            mine = [int((batch.labels >= 0).sum()), stop]
            sums = start_reduce(torch.tensor(mine, dtype=torch.float64), mesh.parameter_group)
            valid, stopping = map(int, sums.wait().tolist())
            if stopping:
                module.train(was_training)
                return None
            loss = engine.loss(
                batch.tokens.to(mesh.device),
                batch.labels.to(mesh.device),
                shards.of(batch),
                valid_tokens=valid,
            )
            total += float(loss) * valid
            tokens += valid
    module.train(was_training)
    accuracy = None if split.sample_length is None else _accuracy(answers, tokens, mesh)
    return Evaluation(total / max(tokens, 1), tokens, config.evaluate.length, read, accuracy)


def _accuracy(answers: Answers, tokens: int, mesh: Mesh) -> float | None:
    """The share of right answers over all ranks; None where the model's loss is none of ours."""
    mine = torch.tensor([int(answers.right), int(answers.seen)], dtype=torch.float64)
    right, seen = start_reduce(mine.to(mesh.device), mesh.parameter_group).wait().tolist()
    return right / seen if seen == tokens > 0 else None


def _requests(config: Config, mesh: Mesh, available: int) -> Iterator[tuple[Request, int]]:
    """Requests of one row per data rank, and how many of the rows are windows of their own."""
    windows = evaluation_windows(available, config.evaluate.length, config.evaluate.tokens)
    for length, group in groupby(windows, key=lambda window: window[1] - window[0]):
        starts = [start for start, _ in group]
        layout = layout_of(config, length, mesh)
        for at in range(0, len(starts), mesh.data_size):
            row = starts[at : at + mesh.data_size]
            padded = row + [row[0]] * (mesh.data_size - len(row))
            yield Request(at, tuple(padded), layout), len(row)
