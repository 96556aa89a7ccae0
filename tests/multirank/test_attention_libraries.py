"""Where strategies let libraries take attention: in ulysses, and never where results are added."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

import xdist
from tests.kernels.attention_library_fakes import install
from xdist.testing import RankPool
from xdist_kernels import backend as backends
from xdist_kernels.attention import library_masks

N = 64
FORWARD, BACKWARD = "flash_attn forward", "flash_attn backward"


def results(
    groups: int, shard: xdist.SequenceShard | None, strategy: str, backend: str, dtype: torch.dtype
) -> list[Tensor]:
    """Output and gradients, whole, in float64."""
    made = torch.Generator().manual_seed(groups)
    leaves, (dout,) = [], [torch.randn(2, N, 4, 8, generator=made).to(torch.float16).to(dtype)]
    for heads in (4, groups, groups):
        x = torch.randn(2, N, heads, 8, generator=made).to(torch.float16).to(dtype)
        leaves.append((x if shard is None else shard.scatter(x)).requires_grad_())
    options = {"mask": xdist.Mask(window=20), "strategy": strategy, "backend": backend}
    out = xdist.attention(*leaves, shard, **options)
    dout = dout if shard is None else shard.scatter(dout)
    found = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    return [(x if shard is None else shard.gather(x)).double() for x in found]


def on_ranks(layout: str, groups: int, strategy: str, backend: str) -> tuple[list[str], float]:
    """The libraries' calls, and the largest error of a tensor relative to its largest element."""
    mesh = xdist.init_mesh(ring=2, device="cpu")
    cuts = [0, 23, N]
    shard = xdist.SequenceShard(mesh, getattr(xdist.Layout, layout)(N, 2), cuts)
    one = xdist.SequenceShard(xdist.Mesh.one_rank("cpu"), xdist.Layout.contiguous(N, 1), cuts)
    wanted = results(groups, one, "auto", "torch", torch.float64)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(library_masks, "_SHORT", 1)
        calls = install(monkeypatch)
        found = results(groups, shard, strategy, backend, torch.float16)
    errors = [
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)
    ]
    return calls, max(errors)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_libraries_take_what_is_not_added_up(layout: str, pool2: RankPool) -> None:
    for groups, strategy, backend, wanted in (
        (2, "ulysses", "auto", [FORWARD, BACKWARD]),
        # Two ranks share the key head: its gradients are added, in float32.
        (1, "ulysses", "auto", [FORWARD]),
        (2, "ulysses", "torch", []),
        (2, "ring", "auto", []),
        (2, "gather", "auto", []),
        (2, "halo", "auto", []),
        (2, "2d", "auto", []),
    ):
        for calls, error in pool2.run(on_ranks, layout, groups, strategy, backend):
            assert calls == wanted, (groups, strategy, backend)
            # Rounded to float16 once, from an output that was: 2^-11 each.
            assert error <= 1.5e-3, (groups, strategy, backend)


def test_one_rank_lets_libraries_take_attention() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = install(monkeypatch)
        results(2, None, "auto", "auto", torch.float16)
        assert calls == [FORWARD, BACKWARD]
        calls.clear()
        results(2, None, "auto", "auto", torch.float32)
        results(2, None, "auto", "reference", torch.float16)
    assert calls == []


def test_the_kernels_are_said_where_they_compute(caplog: pytest.LogCaptureFixture) -> None:
    """Not where a library takes the whole call."""
    with pytest.MonkeyPatch.context() as monkeypatch, caplog.at_level(logging.INFO, "xdist"):
        monkeypatch.setattr(backends, "_said", set())
        install(monkeypatch)
        results(2, None, "auto", "auto", torch.float16)
        assert [said.split(":")[0] for said in caplog.messages] == [
            "attention forward runs on flash_attn", "attention backward runs on flash_attn",
        ]  # fmt: skip
        results(2, None, "auto", "auto", torch.float32)
    assert caplog.messages[2:] == ["attention runs on torch: the tensors are on cpu"]
