"""What a run trains on, tokens or grids: all that the loop does not do alike for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from xdist.config import Config
from xdist.mesh import Mesh
from xdist.train.engines.protocol import Engine
from xdist.train.evaluate import Evaluation
from xdist.train.feed import Feed
from xdist.train.resume import Position
from xdist.train.setup import Plan


class Workload(Protocol):
    """The samples of a run, how a model is asked for their loss, and how it is evaluated.

    A micro-batch of its feed has `request.cursor`, `rows`, `bad`, `valid_tokens` and
    `without(rows)`, as `xdist.data.Batch` and `xdist.data.GridBatch`. Every rank makes the same
    calls in the same order.

    identity: of the data, for a checkpoint's state (JSON); measure: what the loss is, for the
    record.
    """

    @property
    def identity(self) -> dict[str, Any]: ...
    @property
    def measure(self) -> str: ...

    def feed(self, position: Position) -> Feed:
        """Reads ahead from `position` to the end of the curriculum."""

    def loss(self, engine: Engine, micro: Any, step: int, valid_tokens: int) -> Tensor:
        """The loss of one micro-batch, a part of that of all `valid_tokens` of the step."""

    def evaluate(self, engine: Engine, on_window: Callable[[], bool]) -> Evaluation | None:
        """The held-out samples; `on_window` is called before each, and None is returned where it
        is true on any rank."""

    def plan(self) -> Plan:
        """What each step should send and hold."""

    def facts(self) -> dict[str, Any]:
        """For run.json: which rank holds what of a sample."""

    def summary(self, final: Evaluation) -> tuple[dict[str, Any], list[str]]:
        """The figures of summary.json and the lines that say them. Rank 0 asks alone."""


def open_workload(config: Config, mesh: Mesh, *, known: bool = True) -> Workload:
    """The workload of `config.data.kind`; `known`: the model is the one that config.model names.

    Raises:
        DataError: the store cannot be read here, or does not fit the config.
    """
    if config.data.kind == "text":
        from xdist.train.text_work import TextWork

        return TextWork(config, mesh, known=known)
    from xdist.train.grid_work import GridWork

    return GridWork(config, mesh)
