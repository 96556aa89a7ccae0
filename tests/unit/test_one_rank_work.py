"""One rank does the kernels' work and no more: elements written, counted, not timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import xdist
from xdist.documents import Documents
from xdist_kernels import conv
from xdist_kernels.attention.torch import (
    attention_backward,
    attention_delta,
    attention_forward,
)

TOKENS = 4096


class Written(TorchDispatchMode):
    """Sums the elements of what every operation that is no view gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            found = out if isinstance(out, (tuple, list)) else [out]
            self.elements += sum(x.numel() for x in found if isinstance(x, Tensor))
        return out


def written(call: Callable[[], object]) -> int:
    with Written() as mode:
        call()
    return mode.elements


def both_ways(call: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor) -> None:
    torch.autograd.grad(call(*inputs), inputs, dout)


def test_convolution_on_one_rank() -> None:
    torch.manual_seed(0)
    x, dout = torch.randn(2, 1, TOKENS, 32)
    weight = torch.randn(32, 4)

    def kernels() -> None:
        conv.causal_conv_forward(x, weight, activation="silu")
        conv.causal_conv_backward(x, weight, None, dout, activation="silu")

    inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]

    def ours() -> None:
        both_ways(lambda x, w: xdist.causal_conv1d(x, w, activation="silu"), inputs, dout)

    assert written(ours) <= 1.02 * written(kernels)


@pytest.mark.parametrize("strategy", ["ulysses", "ring", "gather", "halo"])
@pytest.mark.parametrize("groups", [1, 3])
def test_attention_on_one_rank(strategy: str, groups: int) -> None:
    torch.manual_seed(0)
    q, dout = torch.randn(2, 1, TOKENS, 3, 16)
    k, v = torch.randn(2, 1, TOKENS, groups, 16)
    mask = xdist.Mask(causal=True, window=64)
    positions = torch.arange(TOKENS)
    found = mask.spans(positions.numpy(), Documents.of(None, TOKENS))
    spans = tuple(map(torch.from_numpy, found))
    options: dict[str, Any] = {"scale": 0.25, "spans": spans, "k_positions": positions}

    def kernels() -> None:
        out, lse = attention_forward(q, k, v, **options)
        attention_backward(q, k, v, lse, attention_delta(out, dout), dout, **options)

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]

    def ours() -> None:
        both_ways(lambda *x: xdist.attention(*x, mask=mask, strategy=strategy), inputs, dout)

    assert written(ours) <= 1.02 * written(kernels)
