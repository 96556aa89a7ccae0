"""Muon: momentum whose matrix is made orthogonal before it is added (Jordan 2024).

torch has one since 2.9 that rounds to bfloat16 inside. This one keeps the dtype of the parameters,
so that runs on different numbers of ranks agree as closely as their gradients do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
STEPS = 5
# Of the odd quintic whose iteration drives singular values into about [0.7, 1.2] (Jordan 2024).
A, B, C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay. Parameters are 2-D.

    `rate` is the learning rate over that of the schedule, which the loop sets as `lr` times
    `rate`. A step moves each singular direction by about lr * sqrt(max(1, rows / columns)).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, rate: float, weight_decay: float
    ) -> None:
        defaults = {"lr": 0.0, "rate": rate, "weight_decay": weight_decay}
        super().__init__(list(parameters), defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; `closure` is not used."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].mul_(MOMENTUM).add_(parameter.grad)
                direction = orthogonal(parameter.grad + MOMENTUM * momentum)
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix [R, C] with singular values near 1, by Newton-Schulz in its own dtype.

    A zero matrix stays zero.
    """
    x = matrix.t() if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (torch.linalg.matrix_norm(x) + 1e-7)
    for _ in range(STEPS):
        square = x @ x.t()
        x = A * x + (B * square + C * square @ square) @ x
    return x.t() if matrix.shape[0] > matrix.shape[1] else x
