"""A model that follows its placement equals one device, whatever dim is sharded first."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import xdist
from xdist.cost.place import (
    Block,
    Condition,
    Convolution,
    Heads,
    Neighborhood,
    Patches,
    Placed,
    Scan,
    Unpatches,
    place_switches,
)
from xdist.grid_shard import GridShard
from xdist.mesh import Mesh
from xdist.nn.factorised import FactorisedAttention
from xdist.nn.patches import patches, unpatches
from xdist.testing import RankPool, relative_error

FINE, PATCH, CHANNELS, HEADS = (5, 7, 8), (1, 2, 2), 8, Heads(4, 2)
WHOLE = {"spatial": (1, 2), "temporal": (0,), "full": (0, 1, 2)}
CHAIN = (
    Block("patches", 2, reach=(Patches(PATCH),), itemsize=8),
    *(Block(name, CHANNELS, whole=WHOLE[name], heads=HEADS, itemsize=8) for name in WHOLE),
    Block("depthwise", CHANNELS, reach=(Convolution(3),), itemsize=8),
    Block("cross", CHANNELS, condition=Condition(5, HEADS, sharded=True), itemsize=8),
    Block("near", CHANNELS, reach=(Neighborhood(3),), itemsize=8),
    Block("raster", CHANNELS, reach=(Scan((1, 0), 4, 2, 2, "none", both=True),), itemsize=8),
    Block("unpatches", CHANNELS, reach=(Unpatches(PATCH, FINE),), itemsize=8, out_channels=2),
)


class Result(NamedTuple):
    """What one rank made; gradients of what is whole are its part."""

    dims: tuple[int, ...]
    strategies: tuple[str, ...]
    out: Tensor
    grads: dict[str, Tensor]


def _leaf(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def _attention(name: str, leaves: dict[str, Tensor]) -> FactorisedAttention:
    layer = FactorisedAttention(CHANNELS, WHOLE[name], head_dim=HEADS.dim).double()
    for own, parameter in layer.named_parameters():
        parameter.data.copy_(_leaf(len(name) + parameter.numel(), *parameter.shape) / 4)
        leaves[f"{name} {own}"] = parameter
    return layer


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS.count, HEADS.dim))


def _crossed(x: Tensor, gshard: GridShard, keys: Tensor, strategy: str) -> Tensor:
    layout = xdist.Layout.contiguous(keys.shape[1], gshard.size)
    shard = xdist.SequenceShard(gshard.mesh, layout)
    own = shard.scatter(keys, 1)
    y = xdist.attention(
        _heads(x.flatten(1, 3)), own, own, gshard.flattened, mask=xdist.Mask(causal=False),
        key_shard=shard, strategy=strategy or "auto",
    )  # fmt: skip
    return y.flatten(-2).unflatten(1, gshard.local_sizes)


def _step(
    where: Placed, x: Tensor, gshard: GridShard, leaves: dict[str, Tensor]
) -> tuple[Tensor, GridShard]:
    name = where.block.name
    if name == "patches":
        return patches(x, gshard, PATCH)
    if name == "unpatches":
        return unpatches(x, gshard, FINE, PATCH)
    if name in WHOLE:
        return x + _attention(name, leaves)(x, gshard, where.strategy or "local"), gshard
    if name == "depthwise":
        leaves[name] = _leaf(1, CHANNELS, 1, 3, 3, 3)
        return x + xdist.conv_nd(x, leaves[name], gshard=gshard, groups=CHANNELS), gshard
    if name == "cross":
        leaves[name] = _leaf(2, 1, 5, HEADS.count, HEADS.dim)
        return x + _crossed(x, gshard, leaves[name], where.cross_strategy), gshard
    if name == "near":
        q = _heads(x)
        y = xdist.neighborhood_attention(q, q.sin(), q.cos(), gshard, window=3)
        return x + y.flatten(-2), gshard
    named = {"q": _heads(x), "k": _heads(x.sin()), "v": _heads(x.cos())}
    ways = xdist.grid_scan(xdist.linear_attention, named, gshard, order=(1, 0), reverse="both")
    return x + (ways[0] + ways[1]).flatten(-2) / 16, gshard


def run_model(mesh: Mesh, start: int) -> Result:
    placed = place_switches(CHAIN, FINE, mesh.sequence_size, start=start, end=start)
    leaves = {"x": _leaf(0, 1, *FINE, 2)}
    gshard = GridShard(mesh, FINE, start)
    x = gshard.scatter(leaves["x"])
    for where in placed.blocks:
        x, gshard = gshard.switch(x, where.dim)
        x, gshard = _step(where, x, gshard, leaves)
    x, gshard = gshard.switch(x, placed.end)
    assert gshard.sizes == placed.out_sizes
    weight = gshard.scatter(_leaf(3, 1, *FINE, 2).detach())
    (x * weight).sum().backward()
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(grads) == len(leaves)
    return Result(placed.dims, placed.strategies, gshard.gather(x).detach(), grads)


def sharded(start: int) -> Result:
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    return run_model(mesh, start)


@pytest.mark.parametrize(
    "ranks", [3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 4))]
)
def test_a_placed_model_is_that_of_one_device(ranks: int, request: pytest.FixtureRequest) -> None:
    """Patches, attention local and embedded over all dims, a convolution, a sharded condition, a
    neighborhood and a scan: output and every gradient, started along each dim."""
    whole = run_model(Mesh.one_rank(), 0)
    pool: RankPool = request.getfixturevalue(f"pool{ranks}")
    for start in range(3):
        found: list[Result] = pool.run(sharded, start)
        assert {"ulysses", "ring"} & {*found[0].strategies}
        assert len({*found[0].dims}) > 1
        for one in found:
            assert one.dims == found[0].dims
            assert relative_error(one.out, whole.out) < 1e-10
        for name, expected in whole.grads.items():
            total = torch.stack([one.grads[name] for one in found]).sum(0)
            assert relative_error(total, expected) < 1e-10, name
