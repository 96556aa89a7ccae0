"""Recurrences and tracing modes: neither leaves a tensor in the other's way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import xdist
from xdist_kernels.linear import tile

CUTS = (0, 5, 16)


def delta(shard: Any) -> Tensor:
    x = torch.ones(1, 16, 2, 8)
    found: Tensor = xdist.delta_rule(x, x, x, torch.ones(1, 16, 2), shard)
    return found


def delta_of_one_document(shard: Any) -> Tensor:
    return delta(None)


def linear(shard: Any) -> Tensor:
    x = torch.ones(1, 16, 2, 8)
    found: Tensor = xdist.linear_attention(x, x, x, shard)
    return found


def tiles(shard: Any) -> Tensor:
    factors = tile.decays(-torch.ones(1, 64, 2), 1.0, dim=8)
    return tile.forward(torch.ones(2, 32, 3 * 2 * 8), factors, torch.zeros(1, 2, 8, 8))[0]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("call", [delta, delta_of_one_document, linear, tiles])
@pytest.mark.parametrize("traced_first", [True, False])
def test_a_tracing_mode_and_real_calls_share_nothing(
    call: Callable[[Any], Tensor], traced_first: bool
) -> None:
    shard = xdist.SequenceShard(xdist.init_mesh(), xdist.Layout.contiguous(16, 1), CUTS)
    if not traced_first:
        call(shard)
    with FakeTensorMode():
        shape = call(shard).shape
    assert call(shard).shape == shape
    assert call(shard).isfinite().all()
