"""A decay of any strength takes nothing from the decays beside it: tiles of linear attention, both
directions and ssd against the float64 token loop, with the tolerances of moderate decays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import xdist
from xdist_kernels.linear import bidirectional as both
from xdist_kernels.linear import tile
from xdist_kernels.linear.reference import linear_attention_reference
from xdist_kernels.linear.ssd_reference import ssd_reference

N, HEADS, DIM = 70, 2, 8
# Those of test_linear.py.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6}
STRONG = [-1e2, -1e4, -1e6, -1e9]


def error(a: Tensor, b: Tensor, size: float = 0.0) -> float:
    """Of the largest number of b, or of `size` where that is larger."""
    return float((a.double() - b).detach().abs().max()) / max(size, float(b.detach().abs().max()))


def strong_decays(low: float, share: float, width: int) -> Tensor:
    """Of `share` of the tokens `low`, near 0 of the others; float64 that float32 holds."""
    mild = -0.01 * torch.rand(1, N, HEADS, width)
    found = torch.where(torch.rand(1, N, HEADS, width) < share, low, mild)
    return (found if width > 1 else found.squeeze(-1)).double()


def drawn(low: float, share: float, width: int) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, N, HEADS, DIM).double() for _ in range(3))
    return q, k, v, strong_decays(low, share, width)


def agree(
    ours: Callable[..., Any], loop: Callable[..., Any], inputs: tuple[Tensor, ...], dtype: Any
) -> None:
    """Results and the gradients of all inputs."""
    given = [x.to(dtype).requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in given]
    found, wanted = ours(*given), loop(*wide)
    seeds = [torch.randn(x.shape).double() for x in wanted]
    grads = torch.autograd.grad(found, given, [x.to(dtype) for x in seeds])
    wanted_grads = torch.autograd.grad(wanted, wide, seeds)
    # A decay's gradient is a sum of q . dq - k . dk: where all decays are strong, all cancels.
    sizes = [0.0] * (len(found) + 3) + [
        float((wide[0] * wanted_grads[0]).detach().sum(-1).abs().max())
    ]
    for a, b, size in zip((*found, *grads), (*wanted, *wanted_grads), sizes, strict=False):
        assert error(a, b, size) <= TOLERANCE[dtype], (a.shape, size)


def one_way(backend: str) -> Callable[..., Any]:
    return lambda q, k, v, g: xdist.linear_attention(
        q, k, v, log_decay=g, output_final_state=True, backend=backend
    )


def both_loops(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor]:
    forth, _ = linear_attention_reference(q, k, v, g)
    back, _ = linear_attention_reference(*(x.flip(1) for x in (q, k, v, g)))
    return (forth + back.flip(1),)


@pytest.mark.parametrize("width", [1, DIM], ids=["scalar", "diagonal"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("low", [*STRONG, -30.0, -3e38])
def test_one_direction(low: float, backend: str, width: int) -> None:
    """One strong token in 16, every second one, and (-30) every one."""
    for share in (1.0,) if low == -30.0 else (1 / 16, 0.5):
        inputs = drawn(low, share, width)
        agree(one_way(backend), linear_attention_reference, inputs, torch.float32)


@pytest.mark.parametrize("width", [1, DIM], ids=["scalar", "diagonal"])
@pytest.mark.parametrize("low", [*STRONG, -1e30])
def test_float64(low: float, width: int) -> None:
    inputs = drawn(low, 1 / 16, width)
    agree(one_way("torch"), linear_attention_reference, inputs, torch.float64)


@pytest.mark.parametrize("width", [1, DIM], ids=["scalar", "diagonal"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("low", STRONG)
def test_both_directions(low: float, backend: str, width: int) -> None:
    for share in (1 / 16, 0.5):
        agree(
            lambda *x: (both.bidirectional(*x, backend=backend),),
            both_loops, drawn(low, share, width), torch.float32,
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("low", STRONG)
def test_ssd(low: float, backend: str) -> None:
    """dt A of `low` in one token of 16; dt and A, whose gradients are differences that such an A
    multiplies, are held fixed."""
    torch.manual_seed(0)
    x, B, C = (torch.randn(1, N, size, DIM).double() for size in (HEADS, 1, 1))
    A = torch.full((HEADS,), low).double()
    dt = (strong_decays(low, 1 / 16, 1) / low).float().double()
    agree(
        lambda x, B, C: xdist.ssd(
            x, dt.to(x.dtype), A.to(x.dtype), B, C, output_final_state=True, backend=backend
        ),
        lambda x, B, C: ssd_reference(x, dt, A, B, C),
        (x, B, C), torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [32, 64])
@pytest.mark.parametrize("low", [*STRONG, -30.0])
def test_the_tile_of_streamed_layers(low: float, tokens: int) -> None:
    """tile.py in float32, of one chunk and of two: outputs, states and all gradients."""
    q, k, v, g = (x[:, :tokens] for x in drawn(low, 1.0 if low == -30.0 else 1 / 16, 1))
    leaves = [x.clone().requires_grad_() for x in (q, k, v, g)]
    out, last = linear_attention_reference(*leaves, scale=0.3)
    dout, dlast = torch.randn_like(out), torch.randn(1, HEADS, DIM, DIM).double()
    loss = (out * dout).sum() + (last.view_as(dlast) * dlast).sum()
    wanted = torch.autograd.grad(loss, leaves)
    z = (
        torch.cat([x.flatten(2) for x in (q, k, v)], -1)
        .float()
        .view(-1, tile.CHUNK, 3 * HEADS * DIM)
    )
    factors = tile.decays(g.float(), 0.3, dim=DIM)
    own, through = tile.forward(z, factors, torch.zeros(1, HEADS, DIM, DIM))
    dz, dlog, _ = tile.backward(z, factors, through, dout.float().view_as(own), dlast.float())
    found = [own.view_as(out), through[:, :, -1].transpose(0, 1)]
    found += [*(x.view_as(q) for x in dz.chunk(3, -1)), dlog]
    for a, b in zip(found, (out, last.view_as(dlast), *wanted), strict=True):
        size = float((q * wanted[0]).sum(-1).abs().max()) if b is wanted[3] else 0.0
        assert error(a, b, size) <= TOLERANCE[torch.float32]
