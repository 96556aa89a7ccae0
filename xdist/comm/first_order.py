"""Backward passes written by hand: they have no derivative of their own, and say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from xdist.errors import StrategyError
from xdist_kernels.autocast import without_autocast

Backward = Callable[..., tuple[Any, ...]]


def first_order(backward: Backward) -> Backward:
    """For the `backward` of an autograd Function.

    What other ranks contribute to a second derivative would be missing. torch's own
    `once_differentiable` refuses only where `.backward()` comes by: `torch.autograd.grad` gives
    None for that path, and a wrong sum where there are others. Inside `torch.autocast` the
    products of a backward pass stay in the dtypes that it chose.

    Raises:
        StrategyError: backward with create_graph=True, on every rank before anything is sent.
    """

    @wraps(backward)
    def refusing(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise StrategyError(
                "xdist's functions over a sequence have no second derivative",
                "backward was called with create_graph=True",
                "leave create_graph out, or detach what needs a second derivative from them",
            )
        with without_autocast(next(grad for grad in grads if grad is not None)):
            return backward(ctx, *grads)

    return refusing
