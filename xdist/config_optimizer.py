"""Checks of [optimizer], and of what the engines fsdp and plain read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from xdist.config_checks import Problem

if TYPE_CHECKING:
    from xdist.config import Config

# Which update rules read a setting that not all of them read.
READ_BY = {
    "momentum": ("sgd",),
    "muon_learning_rate": ("muon",),
    "betas": ("adamw", "muon"),
    "eps": ("adamw", "muon"),
}


def optimizer_problems(config: Config) -> Iterator[Problem]:
    """Settings that the chosen update rule or engine does not read, or cannot honour."""
    optimizer = config.optimizer
    default = type(optimizer)()
    for name, readers in READ_BY.items():
        if optimizer.name not in readers and getattr(optimizer, name) != getattr(default, name):
            yield Problem(
                (("optimizer", name), ("optimizer", "name")),
                f'optimizer.{name} has no effect with optimizer.name = "{optimizer.name}"',
                f"only {' and '.join(readers)} read it",
                f"set optimizer.name={readers[0]}, or leave optimizer.{name} out",
            )
    if not config.engine.reshard and config.engine.name != "fsdp":
        yield Problem(
            (("engine", "reshard"), ("engine", "name")),
            f'engine.reshard has no effect with engine.name = "{config.engine.name}"',
            "only the fsdp engine reads it",
            "set engine.name=fsdp, or leave engine.reshard out",
        )
    if optimizer.name == "muon" and config.engine.name == "fsdp":
        yield Problem(
            (("optimizer", "name"), ("engine", "name")),
            'optimizer.name = "muon" cannot be honoured by engine.name = "fsdp"',
            "Muon makes each whole matrix orthogonal, and an fsdp rank holds some rows of it",
            "set optimizer.name=adamw, or engine.name=plain",
        )
