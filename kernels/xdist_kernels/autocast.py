"""torch.autocast and functions with backward passes written by hand: their dtypes are chosen with
care, so autocast does not reach into them; and what is computed again has the dtypes it had.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def without_autocast(like: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast leaves operations on `like`'s device alone."""
    kind = like.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def in_given_dtypes(step: Callable[..., T]) -> Callable[..., T]:
    """For the `forward` or `backward` of an autograd Function: autocast does not reach into it."""

    @wraps(step)
    def alone(ctx: Any, *given: Any) -> T:
        with without_autocast(next(x for x in given if isinstance(x, Tensor))):
            return step(ctx, *given)

    return alone


class Autocast(NamedTuple):
    """What autocast does to operations on a device."""

    kind: str
    on: bool
    dtype: torch.dtype

    @classmethod
    def now(cls, like: Tensor) -> Autocast | None:
        """Of `like`'s device; None where there is none."""
        kind = like.device.type
        if not torch.amp.is_autocast_available(kind):
            return None
        return cls(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))


def autocast_again(state: Autocast | None) -> AbstractContextManager[object]:
    """Inside, autocast does what it did when `state` was taken: for what is computed again."""
    if state is None:
        return nullcontext()
    return torch.autocast(state.kind, dtype=state.dtype, enabled=state.on)
