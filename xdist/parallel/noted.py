"""The calls of a layer as the cost formulas see them, without making them.

Inside `noting()` a recurrence, a convolution or an attention leaves its problem in a list and gives
outputs without values. Run on the meta device, a layer of any size costs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from xdist.cost.attention_keys import Problem as AttentionProblem
from xdist.cost.recurrent import ConvProblem
from xdist.cost.recurrent import Problem as RecurrentProblem


@dataclass(frozen=True)
class Noted:
    """One call, or several recurrences in one exchange: their problems and the strategy that was
    asked for ("auto" chooses for all of them together)."""

    problems: tuple[RecurrentProblem | AttentionProblem | ConvProblem, ...]
    strategy: str = "auto"


class _Mode(threading.local):
    calls: list[Noted] | None = None


_mode = _Mode()


@contextmanager
def noting() -> Iterator[list[Noted]]:
    """Note calls instead of making them; what they return has shapes and no values."""
    before, _mode.calls = _mode.calls, []
    try:
        yield _mode.calls
    finally:
        _mode.calls = before


def notes() -> list[Noted] | None:
    """Where calls are to be noted, if anywhere."""
    return _mode.calls
