"""Bytes that a placement counts are those that real blocks move, whatever dim is sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import xdist
from xdist.comm import ledger
from xdist.cost.place import (
    Block,
    Condition,
    Convolution,
    Heads,
    Neighborhood,
    Option,
    Passes,
    Patches,
    Reach,
    Scan,
    Spot,
    Strided,
    Unpatches,
    Windows,
    place_switches,
)
from xdist.cost.place_attention import mixed
from xdist.grid_shard import GridShard
from xdist.nn.factorised import FactorisedAttention
from xdist.nn.grid_attention import GridAttention, WindowAttention
from xdist.nn.patches import patches, unpatches
from xdist.testing import RankPool

CHANNELS, SIZES, FINE, ROWS = 8, (7, 5, 6), (7, 9, 12), 2
HEADS = Heads(4, 2)
EVERY = xdist.Mask(causal=False)
WHOLE = {"spatial": (1, 2), "temporal": (0,), "full": (0, 1, 2)}
REACH: dict[str, Reach] = {
    "patches": Patches((1, 2, 2)),
    "unpatches": Unpatches((1, 2, 2), FINE),
    "depthwise": Convolution(3),
    "strided": Convolution((4, 2, 3), stride=(3, 2, 1), dilation=(1, 2, 1)),
    "neighborhood": Neighborhood(3, (2, 1, 1)),
    "windows": Windows((3, 2, 5), (1, 0, 2)),
    "sets": Strided((3, 2, 4)),
    "raster": Scan((2, 0, 1), 4, 2, 2, "scalar", both=True, shared=4),
    "rows": Scan((1,), 4, 2, 2, "scalar"),
    "columns": Scan((2, 0), 4, 2, 2, "scalar", both=True),
    "selective": Scan.selective((1, 0), CHANNELS, 3, itemsize=8),
}
CONDITIONS = {"held": Condition(5, HEADS), "cut": Condition(5, HEADS, sharded=True)}
KINDS = (*WHOLE, *REACH, *CONDITIONS)


def _options(kind: str, spot: Spot) -> tuple[Option, ...]:
    if kind in WHOLE:
        return mixed(WHOLE[kind], HEADS, spot)
    needs = CONDITIONS[kind] if kind in CONDITIONS else REACH[kind]
    return needs.options(spot)


def _drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _attended(x: Tensor, gshard: GridShard, kind: str, strategy: str) -> Tensor:
    layer = FactorisedAttention(CHANNELS, WHOLE[kind], head_dim=HEADS.dim).double()
    return layer(x, gshard, strategy or "local")


def _crossed(x: Tensor, gshard: GridShard, kind: str, strategy: str) -> Tensor:
    q = x.flatten(1, 3).unflatten(-1, (HEADS.count, HEADS.dim))
    keys = _drawn(ROWS, CONDITIONS[kind].tokens, HEADS.count, HEADS.dim).requires_grad_()
    where: xdist.SequenceShard | str = "replicated"
    if kind == "cut":
        layout = xdist.Layout.contiguous(keys.shape[1], gshard.size)
        where = xdist.SequenceShard(gshard.mesh, layout)
        keys = where.scatter(keys, 1)
    return xdist.attention(
        q, keys, keys, gshard.flattened, mask=EVERY, key_shard=where, strategy=strategy or "auto"
    )


def _scanned(x: Tensor, gshard: GridShard, kind: str, strategy: str) -> list[Tensor]:
    scan = REACH[kind]
    assert isinstance(scan, Scan)
    way = "both" if scan.both else False
    if kind == "selective":
        named = {"u": x, "delta": x.abs(), "A": -torch.ones(CHANNELS, 3).double(),
                 "B": x[..., :3] * 1, "C": x[..., 3:6] * 1}  # fmt: skip
        found = xdist.grid_scan(xdist.selective_scan, named, gshard, order=scan.order, reverse=way)
    else:
        q, k, v = (x.unflatten(-1, (4, 2)) * scale for scale in (1, 2, 3))
        one = {"q": q, "k": k, "v": v, "log_decay": -x[..., :4].abs()}
        # Directions with inputs of their own share nothing.
        sets = (one, {name: 2 * x for name, x in one.items()}) if kind == "columns" else one
        found = xdist.grid_scan(xdist.linear_attention, sets, gshard, order=scan.order, reverse=way)
    return list(found) if scan.both else [found]


def _reached(x: Tensor, gshard: GridShard, kind: str, strategy: str) -> Tensor:
    reach = REACH[kind]
    if isinstance(reach, Patches):
        return patches(x, gshard, (1, 2, 2))[0]
    if isinstance(reach, Unpatches):
        return unpatches(x, gshard, FINE, (1, 2, 2))[0]
    if isinstance(reach, Neighborhood):
        q, k, v = (x.unflatten(-1, (4, 2)) * scale for scale in (1, 2, 3))
        return xdist.neighborhood_attention(q, k, v, gshard, window=3, dilation=(2, 1, 1))
    if isinstance(reach, Windows):
        layer = WindowAttention(CHANNELS, window=(3, 2, 5), shift=(1, 0, 2), head_dim=2)
        return layer.double()(x, gshard)
    if isinstance(reach, Strided):
        return GridAttention(CHANNELS, grid=(3, 2, 4), head_dim=2).double()(x, gshard)
    assert isinstance(reach, Convolution)
    if kind == "depthwise":
        weight = _drawn(CHANNELS, 1, 3, 3, 3)
        return xdist.conv_nd(x, weight, gshard=gshard, groups=CHANNELS)
    weight = _drawn(3, CHANNELS, 4, 2, 3)
    return xdist.conv_nd(x, weight, gshard=gshard, stride=(3, 2, 1), dilation=(1, 2, 1))


Run = Callable[[Tensor, GridShard, str, str], Tensor | list[Tensor]]


def _run_of(kind: str) -> Run:
    if kind in WHOLE:
        return _attended
    if kind in CONDITIONS:
        return _crossed
    return _scanned if isinstance(REACH[kind], Scan) else _reached


class Counted(NamedTuple):
    kind: str
    dim: int
    strategy: str
    planned: Passes
    moved: tuple[int, int, int, int]


def _sizes(kind: str) -> tuple[int, ...]:
    return FINE if kind == "patches" else SIZES


def blocks_along(dim: int) -> list[Counted]:
    """Every kind of block with `dim` sharded, each strategy: bytes planned and moved here."""
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    found = []
    for kind in KINDS:
        gshard = GridShard(mesh, _sizes(kind), dim)
        spot = Spot(_sizes(kind), dim, gshard.size, ROWS, CHANNELS, 8)
        for option in _options(kind, spot):
            x = gshard.scatter(_drawn(ROWS, *_sizes(kind), CHANNELS)).requires_grad_()
            with ledger() as forward:
                outs = _run_of(kind)(x, gshard, kind, option.strategy)
            outs = outs if isinstance(outs, list) else [outs]
            with ledger() as backward:
                sum((out * out).sum() for out in outs).backward()  # type: ignore[union-attr]
            moved = (forward.sent_bytes, forward.received_bytes,
                     backward.sent_bytes, backward.received_bytes)  # fmt: skip
            found.append(Counted(kind, dim, option.strategy, option.moved[gshard.rank], moved))
    return found


@pytest.mark.parametrize("ranks", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_blocks_move_the_bytes_that_the_placement_counts(
    ranks: int, request: pytest.FixtureRequest
) -> None:
    """Attention embedded by Ulysses and ring, conditions, convolutions, neighborhoods, patches and
    scans, along each dim: forward and backward, sent and received, on every rank."""
    pool: RankPool = request.getfixturevalue(f"pool{ranks}")
    for dim in range(3):
        for rank, counted in enumerate(pool.run(blocks_along, dim)):
            for one in counted:
                (a, b), (c, d) = one.planned
                assert one.moved == (a, b, c, d), (rank, one)
            seen = {(one.kind, one.strategy) for one in counted}
            assert {("full", "ulysses"), ("full", "ring"), ("cut", "gather")} <= seen


MODEL = [
    Block("patches", CHANNELS, reach=(REACH["patches"],), itemsize=8),
    Block("spatial", 16, whole=(1, 2), itemsize=8),
    Block("temporal", 8, whole=(0,), itemsize=8),
    Block("narrow", 4, itemsize=8),
    Block("spatial", 8, whole=(1, 2), itemsize=8),
]


def switches_of(start: int) -> list[bool]:
    """On one rank: whether each switch of the placed model moves the bytes of the plan."""
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    placed = place_switches(MODEL, FINE, mesh.sequence_size, start=start, end=start, batch=ROWS)
    gshard = GridShard(mesh, FINE, start)
    steps = [(one.sizes, one.block.channels, one.dim, one.switch) for one in placed.blocks]
    steps.append((placed.out_sizes, MODEL[-1].behind, placed.end, placed.back))
    same = []
    for sizes, channels, dim, planned in steps:
        gshard = gshard.resized(sizes)
        x = gshard.scatter(_drawn(ROWS, *sizes, channels)).requires_grad_()
        with ledger() as forward:
            y, gshard = gshard.switch(x, dim)
        with ledger() as backward:
            y.sum().backward()
        mine = planned[gshard.rank]
        same.append(
            mine.forward == (forward.sent_bytes, forward.received_bytes)
            and mine.backward == (backward.sent_bytes, backward.received_bytes)
        )
    return same


def test_placed_switches_move_the_bytes_of_the_plan(pool3: RankPool) -> None:
    """Uneven shares, a grid that shrinks, the way back; started along each dim."""
    for start in range(3):
        assert pool3.run(switches_of, start) == [[True] * 6] * 3
