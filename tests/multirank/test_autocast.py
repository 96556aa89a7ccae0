"""torch.autocast does not reach into hand-written forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xdist
from tests.multirank.attention_cases import Case, results, segments
from xdist.mask import Mask
from xdist.memory.checkpoint import checkpoint
from xdist.memory.grid import checkpoint_grid
from xdist.memory.tiled import tiled
from xdist.nn.gated_norm import GateThenNorm
from xdist.nn.head_norm import HeadNorm, unit
from xdist.testing import RankPool
from xdist_kernels.linear import bidirectional as both


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


_ONES = torch.ones(16)
CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "attention": lambda x: xdist.attention(x, x, x, mask=Mask()),
    "linear_attention": lambda x: xdist.linear_attention(x, x, x, log_decay=-x[..., 0].abs()),
    "delta_rule": lambda x: xdist.delta_rule(_unit(x), _unit(x), x, torch.sigmoid(x[..., 0])),
    "prefix_attention": lambda x: xdist.prefix_attention(x[0, 0], x, x),
    "causal_conv1d": lambda x: xdist.causal_conv1d(x.flatten(2), torch.ones(16, 4)),
    "selective_scan": lambda x: xdist.selective_scan(
        x.flatten(2), x.flatten(2).abs(), -torch.ones(16, 4), x[:, :, 0, :4], x[:, :, 1, :4]
    ),
    "gated by channel": lambda x: xdist.linear_attention(x, x, x, log_decay=-x.float().abs()),
    "both ways": lambda x: xdist.bidirectional(
        xdist.linear_attention, {"q": x, "k": x, "v": x}, merge=True
    ),
    "both ways, one device": lambda x: both.bidirectional(x, x, x, backend="torch"),
    "gated delta_rule": lambda x: xdist.delta_rule(
        _unit(x), _unit(x), x, torch.sigmoid(x[..., 0]), log_decay=-x[..., 1].float().abs()
    ),
    "ssd": lambda x: xdist.ssd(
        x, x[..., 0].float().abs(), -torch.ones(2), x[:, :, :1], x[:, :, 1:], D=torch.ones(2)
    ),
    "scan over a grid": lambda x: xdist.grid_scan(
        xdist.linear_attention, dict.fromkeys("qkv", x.unflatten(1, (5, 8))), order=(1, 0)
    ),
    "unit": unit,
    "norm and gate": lambda x: HeadNorm(8)(x, x),
    "gate and norm": lambda x: GateThenNorm.apply(x.flatten(2), x.flatten(2), _ONES, 2, 1e-5),
    "cross_entropy": lambda x: xdist.cross_entropy(
        x.flatten(2), torch.eye(16).to(x.dtype), torch.arange(40)[None] % 16
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


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inside_autocast_is_outside(name: str, dtype: torch.dtype) -> None:
    x: Any = torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    x.requires_grad_()
    found = []
    for inside in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            out = CALLS[name](x)
            found.append((out, torch.autograd.grad(out, x, torch.ones_like(out))[0]))
    for plain, under in zip(*found, strict=True):
        assert plain.dtype == under.dtype
        assert torch.equal(plain, under)


@pytest.mark.parametrize("way", ["checkpoint", "tiled", "checkpoint_grid"])
def test_what_is_computed_again_has_the_autocast_of_forward(way: str) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(1, 16, 8, requires_grad=True)
    again: dict[str, Callable[[], Tensor]] = {
        "checkpoint": lambda: checkpoint(layer, x),
        "tiled": lambda: tiled(layer, x, tile_tokens=16),
        "checkpoint_grid": lambda: checkpoint_grid([_Plain(layer)], x, chunk_tokens=16),
    }
    found = []
    for call in (lambda: layer(x), again[way]):
        with torch.autocast("cpu", torch.bfloat16):
            out = call()
        found.append(torch.autograd.grad(out.float().square().sum(), (x, *layer.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class _Plain(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, shard: object) -> Tensor:
        y: Tensor = self.layer(x)
        return y
