"""Law 1 and bytes of attention on grids: neighbourhoods, blocks, strided sets, single dims."""

from __future__ import annotations

import random
from functools import partial
from statistics import median

import pytest
import torch
from torch import Tensor

import xdist
from tests.multirank.grid_attention_cases import (
    BATCH,
    Case,
    Problem,
    joined,
    reference,
    run,
    run_cases,
)
from xdist import nn
from xdist.errors import NumericsError
from xdist.testing import RankPool, relative_error

# Odd sizes, shares shorter than a window, fewer positions than ranks; few key heads.
NEAR = (
    Problem("near", (13,), (5,), (2,), bias=True),
    Problem("near", (9, 6), (3, 5), (3, 1), heads=(4, 2), bias=True),
    Problem("near", (6, 3, 5), (3, 3, 3), (2, 1, 1)),
    Problem("near", (3, 5, 5), (1, 3, 5), (1, 1, 1), heads=(2, 1)),
    Problem("near", (2, 3, 3, 4), (1, 3, 1, 3), (2, 1, 3, 1)),
)
BLOCKS = (
    Problem("blocks", (7, 9), (3, 4), (1, 2), bias=True),
    Problem("blocks", (2, 6, 5), (2, 3, 8), (0, 0, 3), heads=(4, 2)),
)
STRIDED = (
    Problem("strided", (7, 6), (3, 2), bias=True),
    Problem("strided", (3, 5, 4), (2, 2, 3), heads=(4, 2)),
)
AXIAL = (
    *(Problem("axial", (5, 4, 3), (dim,), heads=(4, 2)) for dim in range(3)),
    Problem("axial", (9,), (0,)),
    *(
        Problem("axial", (5, 3), (0,), heads=(3, 1), causal=causal, strategy=strategy)
        for strategy, causal in (("switch", True), ("ulysses", False), ("ring", True))
    ),
)
ALL = (*NEAR, *BLOCKS, *STRIDED, *AXIAL)


def errors(found: dict[str, Tensor], case: Case) -> dict[str, float]:
    wanted = reference(case.problem, case.dtype, case.seed)
    return {name: relative_error(found[name], wanted[name]) for name in wanted}


@pytest.mark.parametrize("problem", ALL, ids=str)
def test_one_device_is_the_definition(problem: Problem, poisoned: None) -> None:
    case = Case(problem, 0)
    found, _ = run(case, None)
    assert max(errors(found, case).values()) < 1e-10


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_law_1_sharded_first_along_each_dim(ranks: int, request: pytest.FixtureRequest) -> None:
    """Outputs and every gradient, and bytes: ledger = formula = counted over c10d."""
    pool: RankPool = request.getfixturevalue(f"pool{ranks}")
    cases = [Case(problem, dim) for problem in ALL for dim in range(len(problem.sizes))]
    by_rank = pool.run(run_cases, cases)
    for case, results in zip(cases, zip(*by_rank, strict=True), strict=True):
        assert [wrong for _, wrong in results] == [""] * ranks, case
        found = joined(case, [part for part, _ in results])
        assert max(errors(found, case).values()) < 1e-10, case


def drawn(rng: random.Random) -> Case:
    """Any function on a grid of one to four dims, at most 60 positions, with any settings."""
    dims = rng.randint(1, 4)
    most = {1: 19, 2: 9, 3: 5, 4: 4}[dims]
    sizes = tuple(rng.randint(1, most) for _ in range(dims))
    op = rng.choice(("near", "near", "blocks", "strided", "axial"))
    first, second = [], []
    for n in sizes:
        if op == "near":
            first.append(rng.choice([w for w in (1, 3, 5, 7) if w <= n]))
            second.append(rng.randint(1, n // first[-1]))
        else:
            first.append(rng.randint(1, n + 2))
            second.append(rng.randrange(first[-1]))
    if op == "axial":
        first = [rng.randrange(dims)]
    heads = rng.choice(((1, 1), (2, 1), (3, 3), (4, 2)))
    bias = op != "axial" and rng.random() < 0.5
    problem = Problem(op, sizes, tuple(first), tuple(second), heads, bias)
    return Case(problem, rng.randrange(dims), seed=rng.randrange(100))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_law_1_of_drawn_calls(ranks: int, request: pytest.FixtureRequest) -> None:
    rng = random.Random(ranks)
    cases = [drawn(rng) for _ in range(50)]
    by_rank = request.getfixturevalue(f"pool{ranks}").run(run_cases, cases)
    for case, results in zip(cases, zip(*by_rank, strict=True), strict=True):
        assert [wrong for _, wrong in results] == [""] * ranks, case
        found = joined(case, [part for part, _ in results])
        assert max(errors(found, case).values()) < 1e-10, case


def test_narrow_dtypes_stay_as_near_as_on_one_rank(pool3: RankPool) -> None:
    """Medians over five seeds, float32 and bfloat16."""
    problems = (NEAR[1], BLOCKS[0], STRIDED[0])
    cases = [
        Case(problem, 0, dtype, seed)
        for problem in problems
        for dtype in (torch.float32, torch.bfloat16)
        for seed in range(5)
    ]
    by_rank = pool3.run(run_cases, cases)
    there = [
        errors(joined(case, [part for part, _ in results]), case)
        for case, results in zip(cases, zip(*by_rank, strict=True), strict=True)
    ]
    here = [errors(run(case, None)[0], case) for case in cases]
    for start in range(0, len(cases), 5):
        for name in there[start]:
            if name == "position_bias" and cases[start].dtype == torch.bfloat16:
                continue  # a sum of parts that each rank rounds once
            many = median(one[name] for one in there[start : start + 5])
            single = median(one[name] for one in here[start : start + 5])
            assert many <= max(2e-6, 1.5 * single), (cases[start], name)


def halo_of(length: int) -> list[tuple[int, int, int]]:
    """Sent and received, forward and backward, of windows along a sharded dim of this length; bytes
    saved for backward besides q, k and v."""
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    gshard = xdist.GridShard(mesh, (length, 5), 0)
    x = torch.randn(1, *gshard.local_sizes, 2, 4, requires_grad=True)
    moved = []
    for call in (
        lambda: xdist.neighborhood_attention(x, x, x, gshard, window=(5, 3), dilation=(2, 1)),
        lambda: xdist.window_attention(x, x, x, gshard, window=4, shift=2),
    ):
        kept: list[int] = []
        with (
            xdist.comm.ledger() as one,
            torch.autograd.graph.saved_tensors_hooks(partial(noted, kept), lambda saved: saved),
        ):
            call().sum().backward()
        moved.append((one.sent_bytes, one.received_bytes, sum(kept) - 3 * x.nbytes))
    return moved


def noted(kept: list[int], saved: Tensor) -> Tensor:
    kept.append(saved.untyped_storage().nbytes())
    return saved


def test_a_halo_does_not_depend_on_the_length(pool2: RankPool) -> None:
    """Many times the positions along the sharded dim, cut at the same place of a block: the same
    bytes move, and as many are kept besides q, k and v."""
    short, long = pool2.run(halo_of, 22), pool2.run(halo_of, 342)
    assert short == long
    assert all(sent > 0 and kept > 0 for rank in short for sent, _, kept in rank)


def with_a_nan() -> list[str]:
    """What each function says when the last rank holds a NaN."""
    world = xdist.rank.read_rank()
    gshard = xdist.GridShard(xdist.init_mesh(ring=world.world_size), (6, 5), 0)
    x = torch.zeros(1, *gshard.local_sizes, 2, 4)
    bad = x.clone()
    if world.rank == world.world_size - 1:
        bad[0, 0, 0, 0, 0] = torch.nan
    said = []
    for function, settings in (
        (xdist.neighborhood_attention, {"window": 3}),
        (xdist.window_attention, {"window": 3}),
        (xdist.grid_attention, {"grid": 2}),
        (xdist.axial_attention, {"dim": 0}),
    ):
        try:
            with xdist.checks():
                function(x, x, bad, gshard, **settings)
        except NumericsError as error:
            said.append(str(error))
    return said


def test_checks_find_values_that_are_not_finite(pool2: RankPool) -> None:
    """On every rank, whichever holds them."""
    for said in pool2.run(with_a_nan):
        assert len(said) == 4
        assert all("[1]" in one for one in said[:3])


LAYERS = {
    "neighborhood": (nn.NeighborhoodAttention, {"window": 3, "position_bias": True, "dims": 2}),
    "shifted": (nn.WindowAttention, {"window": (4, 3), "shift": (2, 1), "position_bias": True}),
    "block": (nn.WindowAttention, {"window": 4, "key_heads": 1}),
    "grid": (nn.GridAttention, {"grid": (3, 2), "position_bias": True}),
    "axial 0": (nn.AxialAttention, {"along": 0}),
    "axial 1": (nn.AxialAttention, {"along": 1, "causal": True, "strategy": "switch"}),
    "axial ring": (nn.AxialAttention, {"along": 0, "strategy": "ring"}),
}
GRID, WIDTH = (7, 5), 8


def layer_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    kind, options = LAYERS[name]
    layer = kind(WIDTH, head_dim=4, **options).double()
    for parameter in layer.parameters():
        parameter.data.normal_()
    return layer


def run_layer(name: str, gshard: xdist.GridShard | None) -> tuple[list[Tensor], int]:
    """y, dx and the gradient of each parameter; bytes sent."""
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, BATCH, *GRID, WIDTH, generator=generator, dtype=torch.float64)
    if gshard is not None:
        x, dy = gshard.scatter(x), gshard.scatter(dy)
    layer, x = layer_of(name), x.clone().requires_grad_()
    with xdist.comm.ledger() as moved:
        y = layer(x, gshard)
        grads = torch.autograd.grad(y, [x, *layer.parameters()], dy)
    return [y.detach(), *grads], moved.sent_bytes


def run_layers(dim: int) -> dict[str, tuple[list[Tensor], int]]:
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    gshard = xdist.GridShard(mesh, GRID, dim)
    return {name: run_layer(name, gshard) for name in LAYERS}


@pytest.mark.parametrize("dim", [0, 1])
def test_layers_give_one_devices_results(dim: int, pool3: RankPool) -> None:
    """Outputs, input gradients and the summed gradient of each parameter; grid and switched axial
    layers move 2 (P-1)/P of their input each way."""
    by_rank = pool3.run(run_layers, dim)
    for name in LAYERS:
        wanted, _ = run_layer(name, None)
        parts = [rank[name][0] for rank in by_rank]
        found = [torch.cat([part[i] for part in parts], dim + 1) for i in (0, 1)]
        found += [torch.stack(one).sum(0) for one in zip(*(p[2:] for p in parts), strict=True)]
        for a, b in zip(found, wanted, strict=True):
            assert relative_error(a, b) < 1e-10, name
    if dim == 1:
        sent = sum(rank["axial 1"][1] for rank in by_rank)
        whole = BATCH * GRID[0] * GRID[1] * WIDTH * 8
        kept = sum(a * b for a, b in zip((3, 2, 2), (2, 2, 1), strict=True)) * BATCH * WIDTH * 8
        assert sent == 2 * 2 * (whole - kept)
        assert sum(rank["axial 0"][1] for rank in by_rank) == 0
