"""The last program of a grid that Triton's interpreter would take hours to walk through."""

from __future__ import annotations

from typing import Any

import pytest
from triton.runtime import interpreter


def only_last_programs(monkeypatch: pytest.MonkeyPatch, module: str) -> list[int]:
    """Of every grid that `module` launches from here on, its last program alone runs.

    Returns a list that grows by each grid's number of programs.
    """
    grids: list[int] = []
    builder = interpreter.interpreter_builder

    def launch(kernel: Any, programs: int, config: Any, *, device: Any, **arguments: Any) -> None:
        grids.append(programs)
        with monkeypatch.context() as patch:
            patch.setattr(
                builder,
                "set_grid_idx",
                lambda x, y, z: setattr(builder, "grid_idx", (programs - 1, y, z)),
            )
            kernel[(1,)](**arguments)

    monkeypatch.setattr(f"{module}.launch", launch)
    return grids
