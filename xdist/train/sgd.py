"""Stochastic gradient descent with momentum and decoupled weight decay, in the parameters' dtype.

torch's SGD adds the decay to the gradient, where momentum keeps it for many steps. Here it is that
of AdamW (Loshchilov and Hutter 2019, algorithm 1): it acts on the parameter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Sgd(torch.optim.Optimizer):
    """m = momentum m + g;  p = p (1 - lr decay) - lr m.

    `groups` hold `params`, `weight_decay` and `rate` (the learning rate over that of the schedule).
    With momentum 0 nothing is kept.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.0
    ) -> None:
        super().__init__(list(groups), {"lr": lr, "weight_decay": 0.0, "rate": 1.0})
        self.momentum = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is not used."""
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            if not held:
                continue
            directions = [p.grad for p in held]
            if self.momentum:
                directions = [self._momentum(p) for p in held]
                torch._foreach_mul_(directions, self.momentum)
                torch._foreach_add_(directions, [p.grad for p in held])
            if group["weight_decay"]:
                torch._foreach_mul_(held, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(held, directions, alpha=-group["lr"])

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: torch.Tensor = state["momentum"]
        return momentum
