"""Checkpoints: gradients and bytes of the plain layer, whatever is inside, also a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import xdist
from xdist.comm.ledger import ledger
from xdist.comm.ring import start_exchange
from xdist.errors import ConfigError
from xdist.memory import checkpoint_grid
from xdist.memory.checkpoint import checkpoint
from xdist.nn import GridScan, cross_orders
from xdist.nn.registry import build_mixer
from xdist.testing import RankPool

Layer = Callable[..., Tensor]


class Heads(nn.Module):
    """Attention of some heads over x `[B, n, 8]`, and x."""

    def __init__(self, heads: int, groups: int, **options: Any) -> None:
        super().__init__()
        self.sizes, self.options = (heads, groups, groups), options
        shapes = [(8, 4 * count) for count in self.sizes] + [(4 * heads, 8)]
        drawn = (torch.randn(shape, dtype=torch.float64) * 8**-0.5 for shape in shapes)
        self.projections = nn.ParameterList(nn.Parameter(x) for x in drawn)

    def forward(self, x: Tensor, shard: xdist.SequenceShard) -> Tensor:
        *into, back = self.projections
        q, k, v = (
            (x @ p).unflatten(-1, (h, 4)) for p, h in zip(into, self.sizes, strict=True)
        )  # fmt: skip
        out = xdist.attention(q, k, v, shard, mask=xdist.Mask(), **self.options)
        return x + out.flatten(2) @ back


class Twice(nn.Module):
    """A layer, inside a checkpoint of its own, and after it."""

    def __init__(self, layer: nn.Module, *, guarded: bool) -> None:
        super().__init__()
        self.layer, self.guarded = layer, guarded

    def forward(self, x: Tensor, shard: Any) -> Tensor:
        again = torch.is_grad_enabled() or not self.guarded
        x = x + (checkpoint(self.layer, x, shard) if again else self.layer(x, shard))
        return x + self.layer(x, shard)


def gradients(layer: nn.Module, run: Layer, x: Tensor, shard: Any) -> tuple[list[Tensor], Any]:
    """Output, the gradients of x and of the parameters, and what was sent."""
    held = [x.detach().requires_grad_(), *layer.parameters()]
    with ledger() as moved:
        y = run(layer, held[0], shard)
        found = torch.autograd.grad(y.square().sum(), held)
    return [y.detach(), *found], (moved.sent_bytes, moved.calls)


def equal_plain(layer: nn.Module, run: Layer, x: Tensor, shard: Any) -> None:
    want, moved = gradients(layer, lambda f, *given: f(*given), x, shard)
    found, again = gradients(layer, run, x, shard)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert again == moved


def by_grid(layer: nn.Module, x: Tensor, shard: Any) -> Tensor:
    return checkpoint_grid([layer], x, shard)


def sequence(parts: int) -> tuple[Tensor, xdist.SequenceShard]:
    mesh = xdist.init_mesh(ring=parts)
    shard = xdist.SequenceShard(mesh, xdist.Layout.zigzag(17, parts))
    torch.manual_seed(0)
    return shard.scatter(torch.randn(2, 17, 8, dtype=torch.float64)), shard


def chunks_of_heads() -> None:
    x, shard = sequence(2)
    for heads, groups, chunks in ((4, 2, 2), (8, 2, 4), (4, 4, 2), (2, 1, 3)):
        layer = Heads(heads, groups, strategy="ulysses", head_chunks=chunks)
        for run in (checkpoint, by_grid):
            equal_plain(layer, run, x, shard)


def test_chunks_of_heads_in_a_checkpoint(pool2: RankPool) -> None:
    """The first pass keeps nothing and the recompute does: both make the same exchanges."""
    pool2.run(chunks_of_heads)


def nested(strategy: str) -> None:
    x, shard = sequence(2)
    for guarded in (True, False):
        one = Twice(Heads(4, 2, strategy=strategy), guarded=guarded)
        for layer in (one, Twice(one, guarded=guarded)):
            for run in (checkpoint, by_grid):
                equal_plain(layer, run, x, shard)
    plain, given = Heads(4, 2, strategy=strategy), (x, shard)
    equal_plain(plain, lambda layer, *rest: checkpoint(Gridded(layer), *rest), *given)


class Gridded(nn.Module):
    """Layers on a grid of checkpoints."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, shard: Any) -> Tensor:
        return checkpoint_grid(list(self.layers), x, shard, chunk_tokens=3, group_layers=1)


@pytest.mark.parametrize("strategy", ["ring", "ulysses"])
def test_a_checkpoint_in_a_checkpoint(pool2: RankPool, strategy: str) -> None:
    pool2.run(nested, strategy)


def crossing_states() -> None:
    """Recurrences whose states cross ranks, on a grid that is itself checkpointed."""
    x, shard = sequence(2)
    layers = [build_mixer("gated_linear", 8, head_dim=4).double() for _ in range(2)]
    grid = Gridded(*layers)
    want, moved = gradients(grid, lambda f, *given: f(*given), x, shard)
    found, again = gradients(grid, checkpoint, x, shard)
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert again == moved


def test_a_grid_of_checkpoints_in_a_checkpoint(pool2: RankPool) -> None:
    pool2.run(crossing_states)


def scanned_grid() -> None:
    mesh = xdist.init_mesh(ring=2)
    gshard = xdist.GridShard(mesh, (6, 5), 0)
    torch.manual_seed(0)
    layer = GridScan(8, cross_orders(2), recompute=True, state_dim=4).double()
    x = torch.randn(1, 6, 5, 8, dtype=torch.float64)
    equal_plain(layer, checkpoint, gshard.scatter(x), gshard)


def test_a_layer_that_checkpoints_its_parts_in_a_checkpoint(pool2: RankPool) -> None:
    pool2.run(scanned_grid)


@dataclass
class Changing:
    """A layer that asks for other data each time it is called."""

    dtypes: list[torch.dtype]

    def __call__(self, x: Tensor, shard: xdist.SequenceShard) -> Tensor:
        dtype, group = self.dtypes.pop(0), shard.group
        other = 1 - shard.rank
        got = start_exchange({other: x.to(dtype)}, {other: ((2,), dtype)}, group).wait()
        return x * got[other].to(x.dtype)


def another_exchange() -> str:
    shard = xdist.SequenceShard(xdist.init_mesh(ring=2), xdist.Layout.contiguous(4, 2))
    x = torch.ones(2, requires_grad=True)
    y = checkpoint(Changing([torch.float32, torch.float64]), x, shard)
    with pytest.raises(ConfigError) as refused:
        y.sum().backward()
    return str(refused.value)


def test_a_recompute_that_asks_for_other_data_is_refused(pool2: RankPool) -> None:
    """Shapes and dtypes of what arrives, not the move's name alone."""
    said = pool2.run(another_exchange)
    assert said[0].startswith("a recompute starts another exchange than its forward did")
    assert "exchange 0 is ring ((2,) of torch.float64 from 1)" in said[0]
    assert "in the forward it was ring ((2,) of torch.float32 from 1)" in said[0]
