"""Decays of any strength beside mild ones: two ranks give what the float64 token loop gives."""

from __future__ import annotations

import torch
from torch import Tensor

import xdist
from xdist.testing import RankPool, relative_error
from xdist_kernels.linear.reference import linear_attention_reference

N = 200
# Of moderate decays in float32 (test_linear_attention.py's ops on ranks).
TOLERANCE = 2e-6


def drawn(low: float, width: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v, decays with `low` in one token of 16, and the outputs' gradient."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(1, N, 2, 8, generator=generator)

    q, k, v, dout = (normal() for _ in range(4))
    decay = -0.01 * torch.rand(1, N, 2, width, generator=generator)
    decay[:, ::16] = low
    return [q, k, v, decay if width > 1 else decay.squeeze(-1)], dout


def on_a_rank(lows: list[float]) -> list[list[Tensor]]:
    """Outputs and gradients of every case, gathered."""
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.from_segments(N, [[(0, 89)], [(89, N)]]))
    found = []
    for low in lows:
        for width in (1, 8):
            inputs, dout = drawn(low, width)
            own = [shard.scatter(x).requires_grad_() for x in inputs]
            q, k, v, decay = own
            out = xdist.linear_attention(q, k, v, shard, log_decay=decay, strategy="scan")
            grads = torch.autograd.grad(out, own, shard.scatter(dout))
            found.append([shard.gather(x.detach()) for x in (out, *grads)])
    return found


def test_two_ranks_lose_no_decay_beside_a_strong_one() -> None:
    lows = [-1e2, -1e4, -1e6, -1e9]
    with RankPool(2) as pool:
        found = iter(pool.run(on_a_rank, lows)[0])
    for low in lows:
        for width in (1, 8):
            inputs, dout = drawn(low, width)
            leaves = [x.double().requires_grad_() for x in inputs]
            out, _ = linear_attention_reference(*leaves)
            wanted = (out, *torch.autograd.grad(out, leaves, dout.double()))
            for a, b in zip(next(found), wanted, strict=True):
                assert relative_error(a.double(), b.detach()) < TOLERANCE, (low, width, b.shape)
