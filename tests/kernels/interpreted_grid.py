"""Some programs of a grid that Triton's interpreter would take hours to walk through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from triton.runtime import interpreter


def only_last_programs(monkeypatch: pytest.MonkeyPatch, module: str) -> list[int]:
    """Of every grid that `module` launches from here on, its last program alone runs.

    Returns a list that grows by each grid's number of programs.
    """
    return only_programs(monkeypatch, module, lambda programs: [programs - 1])


def only_programs(
    monkeypatch: pytest.MonkeyPatch, module: str, chosen: Callable[[int], Iterable[int]]
) -> list[int]:
    """The same for the programs that `chosen` names, given how many there are."""
    grids: list[int] = []
    builder = interpreter.interpreter_builder

    def launch(kernel: Any, programs: int, config: Any, *, device: Any, **arguments: Any) -> None:
        grids.append(programs)
        for at in chosen(programs):
            with monkeypatch.context() as patch:

                def place(x: int, y: int, z: int, at: int = at) -> None:
                    builder.grid_idx = (at, y, z)

                patch.setattr(builder, "set_grid_idx", place)
                kernel[(1,)](**arguments)

    monkeypatch.setattr(f"{module}.launch", launch)
    return grids
