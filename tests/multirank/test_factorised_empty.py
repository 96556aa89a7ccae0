"""Factorised attention where a rank holds no token, inside `xdist.checks()` and outside."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import xdist
from xdist.nn.factorised import FactorisedAttention
from xdist.testing import RankPool


def attended(way: str, checked: bool) -> float:
    """On one of three ranks, two of which hold a token: its differences from one rank, added up."""
    mesh = xdist.init_mesh(ring=3, timeout_s=20)
    gshard = xdist.GridShard(mesh, (2, 4), 0)
    torch.manual_seed(0)
    layer = FactorisedAttention(8, (0,), head_dim=4).double()
    whole = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    x = gshard.scatter(whole).requires_grad_()
    alone = whole.clone().requires_grad_()
    layer(alone).square().sum().backward()
    with xdist.checks() if checked else nullcontext():
        out = layer(x, gshard, way)
    out.square().sum().backward()
    parts = [(out, layer(whole)), (x.grad, alone.grad)]
    assert x.grad is not None
    # Sums, not the largest: Python's max may pass over a NaN.
    return sum(float((a - gshard.scatter(b)).abs().sum()) for a, b in parts if b is not None)


@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("way", ["ring", "ulysses", "tensor"])
def test_a_rank_without_a_token_takes_part(pool3: RankPool, way: str, checked: bool) -> None:
    assert sum(pool3.run(attended, way, checked)) < 1e-12
