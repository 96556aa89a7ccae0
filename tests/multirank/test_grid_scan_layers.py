"""Scan layers of grids on ranks equal one device: Mamba-ND, cross-scans, coarse copies, mixers."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import xdist
from tests.multirank.grid_scan_cases import Case, reference
from xdist.comm import ledger
from xdist.cost.grid_scan import scan_home, spread_windows
from xdist.cost.moves import window_bytes
from xdist.errors import ConfigError, ShapeError
from xdist.nn import GridMixer, GridScan, cross_orders, turning_order
from xdist.parallel.grid_scales import spread
from xdist.testing import RankPool, count_c10d_bytes, relative_error

SIZES, C = (5, 4, 3), 4
SMALL: dict[str, Any] = {"state_dim": 2}
LAYERS: dict[str, Any] = {
    "mamba_nd": lambda: [GridScan(C, [turning_order(3, i)], **SMALL) for i in range(3)],
    "six": lambda: [GridScan(C, cross_orders(3), conv=0, recompute=True, **SMALL)],
    "coarse": lambda: [GridScan(C, cross_orders(3), strides=(1, 2, 2), recurrence="ssd",
                                head_dim=2, **SMALL)],
    "rows": lambda: [GridScan(C, [(0,), (1,), (2,)], recurrence="linear_attention", key_dim=2,
                              head_dim=2, conv=0)],
    "delta": lambda: [GridScan(C, [(2, 0)], dims=3, recurrence="delta_rule", key_dim=2,
                               head_dim=2, conv=0)],
    "mamba2": lambda: [GridMixer("mamba2", C, (1, 2), dims=3, head_dim=2, state_dim=2)],
    "gla": lambda: [GridMixer("gla", C, (0, 2, 1), head_dim=2, conv_width=3)],
    "hgrn2": lambda: [GridMixer("hgrn2", C, (2, 1, 0), head_dim=2, both=False)],
}  # fmt: skip


def build(name: str) -> nn.ModuleList:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.ModuleList(LAYERS[name]()).double()


def drawn(channels: int, seed: int, sizes: tuple[int, ...] = SIZES) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *sizes, channels, dtype=torch.float64, generator=generator)


def run(name: str, gshard: xdist.GridShard | None) -> dict[str, Tensor]:
    """Output and gradients of this rank: of its part of x, and its parts of the parameters'."""
    layers = build(name)
    x, weight = drawn(C, 1), drawn(C, 2)
    if gshard is not None:
        x, weight = gshard.scatter(x), gshard.scatter(weight)
    x = x.detach().clone().requires_grad_()
    y = x
    for layer in layers:
        y = y + layer(y, gshard)
    named = dict(layers.named_parameters())
    grads = torch.autograd.grad((y.sin() * weight).sum(), [x, *named.values()], allow_unused=True)
    found = {"y": y.detach(), "x": grads[0]}
    for (key, parameter), grad in zip(named.items(), grads[1:], strict=True):
        found[key] = torch.zeros_like(parameter) if grad is None else grad
    return found


@lru_cache
def alone(name: str) -> dict[str, Tensor]:
    return run(name, None)


def on_a_rank(cases: list[tuple[str, int]]) -> list[dict[str, Tensor]]:
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    found = []
    for name, dim in cases:
        gshard = xdist.GridShard(mesh, SIZES, dim)
        with ledger() as moved, count_c10d_bytes() as counted:
            found.append(run(name, gshard))
        assert moved.sent_bytes == counted.sent_bytes, (name, dim)
        assert moved.received_bytes == counted.received_bytes, (name, dim)
    return found


def check(cases: list[tuple[str, int]], pool: RankPool) -> None:
    parts = pool.run(on_a_rank, cases)
    for number, (name, dim) in enumerate(cases):
        own = [part[number] for part in parts]
        for key, want in alone(name).items():
            sharded = key in ("x", "y")
            pieces = [one[key] for one in own]
            got = torch.cat(pieces, dim + 1) if sharded else torch.stack(pieces).sum(0)
            assert relative_error(got, want) < 1e-10, (name, dim, key)


def cases(shift: int) -> list[tuple[str, int]]:
    """Every layer, sharded along one dim each; the three rank counts cover all three dims."""
    return [(name, (number + shift) % 3) for number, name in enumerate(LAYERS)]


def test_layers_on_two_ranks(pool2: RankPool) -> None:
    check(cases(0), pool2)


def test_layers_on_three_ranks(pool3: RankPool) -> None:
    check(cases(1), pool3)


def test_layers_on_four_ranks(pool4: RankPool) -> None:
    """An empty share along the last dim, and coarse grids of fewer positions than ranks."""
    check(cases(2), pool4)


@pytest.mark.slow
def test_layers_sharded_along_every_dim(pool3: RankPool) -> None:
    check([(name, dim) for name in LAYERS for dim in range(3)], pool3)


def sent_by(recompute: bool) -> int:
    """Bytes that a cross-scan sends, forward and backward."""
    gshard = xdist.GridShard(xdist.init_mesh(ring=2), SIZES, 0)
    layer = GridScan(C, cross_orders(3), recompute=recompute, **SMALL)
    x = gshard.scatter(drawn(C, 1)).float().requires_grad_()
    with ledger() as moved:
        layer(x, gshard).sum().backward()
    return moved.sent_bytes


def test_a_recompute_sends_nothing_again(pool2: RankPool) -> None:
    assert pool2.run(sent_by, True) == pool2.run(sent_by, False)


def test_a_cross_scan_is_the_sum_of_its_directions() -> None:
    """Six directions of a volume and four of a plane, each by a loop over tokens."""
    for sizes in (SIZES, (3, 4)):
        orders = cross_orders(len(sizes))
        torch.manual_seed(0)
        layer = GridScan(C, orders, conv=0, **SMALL).double()
        x = drawn(C, 1, sizes)
        u, z = F.linear(x, layer.proj).chunk(2, -1)
        u = F.silu(u)
        total = torch.zeros_like(u)
        for one in list[Any](layer.orders):
            case = Case("selective_scan", sizes, 0, one.order)
            for core, reverse in ((one.ahead, False), (one.behind, True)):
                given = core.arguments(u)
                bias = given.pop("delta_bias")
                assert given.pop("delta_softplus")
                given["delta"] = F.softplus(given["delta"] + bias)
                total += reference(case, given, reverse)
        want = F.linear(layer.norm(total) * F.silu(z), layer.out)
        assert relative_error(layer(x), want) < 1e-12


def test_orders_turn_from_layer_to_layer() -> None:
    assert cross_orders(2) == ((0, 1), (1, 0))
    assert cross_orders(3) == ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    assert [turning_order(3, layer)[-1] for layer in range(4)] == [2, 1, 0, 2]
    assert scan_home((5, 4, 3), 1, 2, (1, 0)) == 1
    assert scan_home((5, 4, 3), 1, 2, (0, 1)) == 2
    assert scan_home((5, 4, 3), 1, 4, (0, 1)) == 0


def spread_on_a_rank(dim: int, stride: int) -> list[str]:
    """Fine tokens take their coarse cell's value; bytes are those of the window."""
    sizes = (7, 5)
    coarse_sizes = tuple(-(-size // stride) for size in sizes)
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    fine, wrong = xdist.GridShard(mesh, sizes, dim), []
    coarse = fine.resized(coarse_sizes)
    whole = drawn(2, 4, coarse_sizes)
    x = coarse.scatter(whole).detach().requires_grad_()
    with ledger() as moved:
        y = spread(x, coarse, fine, stride)
    said = window_bytes(
        coarse.layout, spread_windows(sizes[dim], stride, fine.size), fine.rank,
        whole.numel() // coarse_sizes[dim], 8,
    )  # fmt: skip
    if (moved.sent_bytes, moved.received_bytes) != said:
        wrong.append(f"moved {moved}, formula {said}")
    want = whole
    for d, size in enumerate(sizes):
        want = want.repeat_interleave(stride, d + 1).narrow(d + 1, 0, size)
    if not torch.equal(y, fine.scatter(want)):
        wrong.append("other values")
    (grad,) = torch.autograd.grad(y.sum(), x)
    counts = torch.ones_like(whole)
    for d, size in enumerate(sizes):
        per = [min(stride, size - stride * i) for i in range(coarse_sizes[d])]
        counts *= torch.tensor(per).view(-1, *(1,) * (2 - d))
    if not torch.equal(grad, coarse.scatter(counts)):
        wrong.append("another gradient")
    return wrong


def test_coarse_grids_come_back_onto_fine_ones(pool3: RankPool) -> None:
    for dim, stride in ((0, 2), (1, 3)):
        for wrong in pool3.run(spread_on_a_rank, dim, stride):
            assert wrong == [], (dim, stride)
    one = xdist.GridShard(xdist.init_mesh(), (4, 4))
    with pytest.raises(ShapeError, match=r"is \(2, 2\)"):
        spread(torch.zeros(1, 4, 4, 1), one, one, 2)


def test_layers_that_cannot_be_are_refused() -> None:
    for options, words in (
        ({"orders": []}, "needs orders"),
        ({"orders": [(0, 3)], "dims": 3}, "needs orders"),
        ({"orders": [(0,)], "strides": (1, 2)}, "stride of at least 1"),
        ({"orders": [(0,)], "conv": 2}, "odd number of taps"),
        ({"orders": [(0,)], "recurrence": "attention"}, "no core 'attention'"),
        ({"orders": [(0,)], "key_dim": 3}, "has no option key_dim"),
        ({"orders": [(0,)], "recurrence": "ssd", "head_dim": 3}, "head_dim"),
    ):
        with pytest.raises(ConfigError, match=words):
            GridScan(C, **options)
