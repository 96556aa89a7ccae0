"""Norms and gates of mixers, which work in tiles, against their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xdist.nn.gated_norm import GateThenNorm
from xdist.nn.head_norm import HeadNorm, unit
from xdist.testing import relative_error


def rms(y: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def test_norms_and_gates_in_tiles_have_the_gradients_of_their_formulas(
    monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """Tiles of 4 of 10 tokens; with and without gate and weight; groups."""
    monkeypatch.setattr("xdist.nn.gated_norm.TILE_TOKENS", 4)
    y, z, dout = torch.randn(3, 2, 10, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.linspace(0.5, 2.0, 4).double()
    leaves = [y.requires_grad_(), z.requires_grad_(), weight.requires_grad_()]

    def same(own: Tensor, want: Tensor) -> None:
        grads, wants = (
            torch.autograd.grad(x, leaves, dout, retain_graph=True, allow_unused=True)
            for x in (own, want)
        )
        assert relative_error(own, want) < 1e-14
        for a, b in zip(grads, wants, strict=True):
            assert (a is None) == (b is None)
            assert a is None or relative_error(a, b) < 1e-13

    for gate, opened in (("silu", F.silu(z)), ("sigmoid", z.sigmoid())):
        gated, plain = HeadNorm(4, gate=gate).double(), HeadNorm(4, gate=gate, affine=False)
        del gated.weight
        gated.weight = weight
        same(gated(y, z), rms(y, weight) * opened)
        same(gated(y), rms(y, weight))
        same(plain(y, z), rms(y) * opened)
        same(plain(y), rms(y))
    same(unit(y), y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt())
    # Three groups of four channels.
    flat, wide = (x.flatten(2) for x in (y, z))
    own = GateThenNorm.apply(flat, wide, weight.repeat(3), 3, 1e-6)
    same(own.unflatten(-1, (3, 4)), rms(y * F.silu(z), weight))
