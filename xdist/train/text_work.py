"""Training on tokens: a store of text or of a task, sequence shards, bits per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from xdist.config import Config
from xdist.data import Batch, TextStore
from xdist.data.prepare import compression_figures
from xdist.mesh import Mesh
from xdist.train import setup
from xdist.train.dropout import name_dropout
from xdist.train.engines.protocol import Engine
from xdist.train.evaluate import Evaluation, evaluate
from xdist.train.feed import Feed, Shards, layout_of, text_feed
from xdist.train.resume import Position
from xdist.train.text_checks import check_sequences, check_vocabulary

BYTES = 256


class TextWork:
    """`Workload` of `data.kind = "text"`; `known`: the model is the one that config.model names.

    Raises:
        DataError: no store there, or one of more tokens than `model.vocab_size`, where the model
            is known.
    """

    def __init__(self, config: Config, mesh: Mesh, *, known: bool = True) -> None:
        self._config, self._mesh = config, mesh
        self.store = TextStore(config.data.store)
        if known:
            check_vocabulary(config, self.store)
        self.shards = Shards(mesh)

    @property
    def identity(self) -> dict[str, Any]:
        """Of the store."""
        return self.store.identity

    @property
    def measure(self) -> str:
        """Bits per byte where tokens are bytes."""
        return "bits/byte" if self._config.model.vocab_size == BYTES else "bits/token"

    def feed(self, position: Position) -> Feed:
        """Reads this rank's slices ahead.

        Raises:
            DataError, ConfigError: a sequence of the training or of the evaluation cannot be made.
        """
        check_sequences(self._config, self._mesh, self.store)
        return text_feed(self._config, self._mesh, self.store, position)

    def loss(self, engine: Engine, micro: Batch, step: int, valid_tokens: int) -> Tensor:
        """Mean cross entropy."""
        name_dropout(engine.module, self._config, step, micro)
        device = self._mesh.device
        tokens, labels = micro.tokens.to(device), micro.labels.to(device)
        return engine.loss(tokens, labels, self.shards.of(micro), valid_tokens=valid_tokens)

    def evaluate(self, engine: Engine, on_window: Callable[[], bool]) -> Evaluation | None:
        """The first `evaluate.tokens` of the held-out split."""
        return evaluate(self._config, self._mesh, engine, self.store, self.shards, on_window)

    def plan(self) -> setup.Plan:
        """By the formulas of `xdist.plan`."""
        return setup.planned(self._config, self._mesh.world_size)

    def facts(self) -> dict[str, Any]:
        """The segments of each rank, stage by stage."""
        stages = self._config.train.curriculum
        layouts = [layout_of(self._config, stage.length, self._mesh) for stage in stages]
        return {
            "layouts": [
                {
                    "length": layout.length,
                    "segments": [
                        [list(segment) for segment in layout.segments(rank)]
                        for rank in range(layout.parts)
                    ],
                }
                for layout in layouts
            ]
        }

    def summary(self, final: Evaluation) -> tuple[dict[str, Any], list[str]]:
        """Held-out bits beside simpler models of the same bytes."""
        figures = compare(self.store, self._config.data.held_out, final)
        return figures, [compression_line(figures)]


def compare(store: TextStore, split: str, final: Evaluation) -> dict[str, Any]:
    """The evaluation, and for bytes what order-0 entropy and xz make of the same bytes."""
    figures: dict[str, Any] = final.line()
    if store.vocabulary_size != BYTES or store.split(split).sample_length is not None:
        return figures
    sample = store.split(split).read(0, final.read_tokens)
    known = store.figures if store.figures.get("bytes") == sample.size else None
    simple = known or compression_figures(sample)
    names = ("order0_bits_per_byte", "xz_bits_per_byte")
    return {**figures, **{name: simple[name] for name in names}}


def compression_line(figures: dict[str, Any]) -> str:
    """One line: the model, and the two yardsticks where tokens are bytes."""
    said = f"held out: {figures['bits_per_token']:.3f} bits per "
    if "order0_bits_per_byte" not in figures:
        said += f"token over {figures['tokens']:,} tokens"
        right = figures.get("accuracy")
        return said if right is None else f"{said}, {right:.1%} of the answers right"
    return said + (
        f"byte over {figures['tokens']:,} bytes; the same bytes have order-0 entropy "
        f"{figures['order0_bits_per_byte']:.3f}, xz -9e makes {figures['xz_bits_per_byte']:.3f}"
    )
