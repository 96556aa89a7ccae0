"""torch.autocast does not reach into hand-written forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import xdist
from tests.multirank.attention_cases import Case, results, segments
from xdist.mask import Mask
from xdist.testing import RankPool


def under_autocast() -> list[bool]:
    """Of each strategy, whether float32 attention keeps its bits inside autocast; on this rank."""
    found = []
    for strategy in ("ulysses", "ring", "gather", "2d", "halo"):
        # Long enough for every form of the kernels.
        for n in (24, 400):
            layout = segments(xdist.Layout.zigzag(n, 2))
            case = Case(strategy, layout, Mask(window=5), n, dtype=torch.float32, sinks=True)
            plain = results(case)
            with torch.autocast("cpu", torch.bfloat16):
                inside = results(case)
            found.append(all(torch.equal(plain[name], inside[name]) for name in plain))
    return found


def test_attention_inside_autocast_keeps_the_dtype_of_its_inputs(pool2: RankPool) -> None:
    assert pool2.run(under_autocast) == [[True] * 10] * 2


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: xdist.attention(x, x, x, mask=Mask()),
    "linear_attention": lambda x: xdist.linear_attention(x, x, x, log_decay=-x[..., 0].abs()),
    "delta_rule": lambda x: xdist.delta_rule(_unit(x), _unit(x), x, torch.sigmoid(x[..., 0])),
    "prefix_attention": lambda x: xdist.prefix_attention(x[0, 0], x, x),
    "causal_conv1d": lambda x: xdist.causal_conv1d(x.flatten(2), torch.ones(16, 4)),
    "selective_scan": lambda x: xdist.selective_scan(
        x.flatten(2), x.flatten(2).abs(), -torch.ones(16, 4), x[:, :, 0, :4], x[:, :, 1, :4]
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_backward_inside_autocast_is_backward_outside(name: str) -> None:
    x: Any = torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    grads = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            out = CALLS[name](x)
            if inside:
                grads.append(torch.autograd.grad(out, x, torch.ones_like(out))[0])
        if not inside:
            grads.append(torch.autograd.grad(out, x, torch.ones_like(out))[0])
    assert torch.equal(*grads)
