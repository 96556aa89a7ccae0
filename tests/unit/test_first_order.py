"""Second derivatives are refused: what crosses ranks in backward has no derivative of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import xdist
from xdist.errors import StrategyError


def rows(*shape: int) -> Tensor:
    return torch.randn(1, 9, *shape, dtype=torch.float64)


OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear_attention": lambda x: xdist.linear_attention(x, x, x),
    "delta_rule": lambda x: xdist.delta_rule(x, x, x, torch.rand(1, 9, 2, dtype=x.dtype)),
    "prefix_attention": lambda x: xdist.prefix_attention(x[0, 0], x, x),
    "causal_conv1d": lambda x: xdist.causal_conv1d(x[..., 0], x[0, :2, 1].T),
    "attention": lambda x: xdist.attention(x, x, x, mask=xdist.Mask()),
}


@pytest.mark.parametrize("name", OPS)
def test_second_derivative_is_refused(name: str) -> None:
    x = rows(2, 2).requires_grad_()
    # Beside x ** 2, torch's once_differentiable would leave the op's part out without a word.
    loss = (OPS[name](x).sin().sum()) + (x**2).sum()
    with pytest.raises(StrategyError, match=r"second derivative[\s\S]*create_graph"):
        torch.autograd.grad(loss, x, create_graph=True)
    (grad,) = torch.autograd.grad(OPS[name](x).sum(), x)
    assert grad.isfinite().all()
