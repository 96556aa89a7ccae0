"""What kernels a call would start, written down without the types that only a compiler knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from torch import Tensor

from xdist_kernels import launch
from xdist_kernels.launch import Config, Target


class Started(NamedTuple):
    """One start; given: numbers as they are, of a tensor its shape and dtype."""

    kernel: str
    programs: int
    config: Config
    given: dict[str, Any]

    @property
    def work(self) -> tuple[int, dict[str, Any]]:
        """All that decides a number of the results."""
        return self.programs, self.given


@contextmanager
def started(target: Target) -> Iterator[list[Any]]:
    """Nothing runs inside: starts of this thread are listed, as made for `target`.

    Tensors may be on meta.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_written_down", _written_down)
        with launch.recording(target) as found:
            yield found


def _written_down(kernel: Any, programs: int, config: Config, arguments: dict[str, Any]) -> Started:
    given = {
        name: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value
        for name, value in arguments.items()
    }
    return Started(kernel.__name__, programs, config, given)
