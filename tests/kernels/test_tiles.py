"""The tile kernels equal a token loop: linear attention with cuts anywhere, and the convolution."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xdist_kernels.conv import tile as conv
from xdist_kernels.linear import tile as linear

BATCH, TOKENS, CHUNK, HEADS, DIM = 2, 32, 8, 3, 4


def loop(z: Tensor, log_decay: Tensor, state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H * D] and the last state, one token at a time."""
    q, k, v = z.view(BATCH, TOKENS, 3, HEADS, DIM).unbind(2)
    out = []
    for t in range(TOKENS):
        keep = 0.0 if starts[t] else 1.0
        state = state * (log_decay[:, t].exp() * keep)[..., None, None]
        state = state + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append(0.3 * (q[:, t, :, None] @ state).squeeze(2))
    return torch.stack(out, 1).flatten(2), state


@pytest.mark.parametrize("cuts", [[], [3], [0, 8, 9, 30], [31], [5, 6, 7, 8, 24]])
@pytest.mark.parametrize("strong", [1.0, 300.0])
def test_linear_tile_equals_the_token_loop(cuts: list[int], strong: float, poisoned: None) -> None:
    generator = torch.Generator().manual_seed(len(cuts))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    z = draw(BATCH * TOKENS // CHUNK, CHUNK, 3 * HEADS * DIM)
    state = draw(BATCH, HEADS, DIM, DIM)
    # Decays down to exp(-300) a token: no factor may overflow or turn into NaN.
    log_decay = (-strong * draw(BATCH, TOKENS, HEADS).detach().abs()).requires_grad_()
    starts = torch.zeros(TOKENS, dtype=torch.bool)
    starts[cuts] = True
    out, last = loop(z, log_decay, state, starts)
    dout, dlast = torch.randn_like(out), torch.randn_like(last)
    wants = torch.autograd.grad((out * dout).sum() + (last * dlast).sum(), (z, log_decay, state))
    with torch.no_grad():
        given = starts if cuts else None
        factors = linear.decays(log_decay, 0.3, given, dim=DIM, chunk=CHUNK)
        own, through = linear.forward(z, factors, state)
        chunks = dout.view_as(own)
        owns = linear.backward(z, factors, through, chunks, dlast)
        both = z.detach()[..., HEADS * DIM :]
        pairs = [(own.view_as(out), out), (through[:, :, -1].transpose(0, 1), last)]
        pairs += [(linear.summary(both, factors, state), last)]
        pairs += [(linear.adjoint_summary(z, factors, chunks, dlast), wants[2])]
        pairs += list(zip(owns, wants, strict=True))
    for found, want in pairs:
        assert (found - want).abs().max() <= 1e-12 * want.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cuts", [[], [0], [1, 2, 9], [11]])
def test_conv_tile_equals_the_token_loop(dtype: torch.dtype, cuts: list[int]) -> None:
    torch.manual_seed(0)
    width, tokens, channels = 4, 12, 6
    x = torch.randn(2, width - 1 + tokens, channels, dtype=dtype, requires_grad=True)
    weight = torch.randn(channels, width, dtype=dtype, requires_grad=True)
    first = [max([c for c in cuts if c <= t], default=-width) for t in range(tokens)]
    rows = []
    for t in range(tokens):
        taps = [w for w in range(width) if t - width + 1 + w >= first[t]]
        rows.append(sum(x[:, t + w] * weight[:, w] for w in taps))
    wanted = torch.stack(rows, 1)
    dout = torch.randn_like(wanted)
    wants = (wanted, *torch.autograd.grad((wanted * dout).sum(), (x, weight)))
    since = torch.tensor([t - f for t, f in enumerate(first)]) if cuts else None
    with torch.no_grad():
        owns = (
            conv.forward(x, weight, since),
            *conv.backward(x, weight, dout.clone(), since),
        )
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    for own, want in zip(owns, wants, strict=True):
        assert (own - want).abs().max() <= limit * want.abs().max()
