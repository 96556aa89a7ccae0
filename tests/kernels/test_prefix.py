"""Prefix attention of one tile against the float64 token loop: outputs, states, gradients."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from xdist_kernels import prefix
from xdist_kernels.prefix.reference import prefix_attention_reference

TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 2e-2}
CASES = [
    # batch, tokens, heads, D, V; documents; tiles
    ((1, 1, 1, 1, 1), (0, 1), (0, 1)),
    ((2, 37, 3, 4, 2), (0, 37), (0, 37)),
    ((2, 200, 3, 4, 5), (0, 200), (0, 77, 78, 200)),
    ((2, 200, 3, 4, 5), (0, 3, 4, 64, 65, 130, 200), (0, 200)),
    ((1, 200, 2, 4, 3), (0, 3, 4, 64, 66, 130, 200), (0, 100, 200)),
]


def nothing(batch: int, heads: int, width: int, dtype: torch.dtype) -> Tensor:
    """The state of no tokens."""
    state = torch.zeros(batch, heads, 1, 2 + width, dtype=dtype)
    state[..., 0] = -math.inf
    return state


def error(a: Tensor, b: Tensor, size: float | None = None) -> float:
    a, b = a.detach().double(), b.detach()
    return float((a - b).abs().max()) / (size or float(b.abs().max().clamp_min(1e-300)))


def tiles(
    q: Tensor, k: Tensor, v: Tensor, cuts: tuple[int, ...], borders: tuple[int, ...]
) -> list[prefix.Prepared]:
    starts = torch.zeros(k.shape[1], dtype=torch.bool)
    starts[list(cuts[1:-1])] = True
    found = []
    for a, b in pairwise(borders):
        own = starts[a:b] if starts[a:b].any() else None
        scale = q.shape[1] ** -0.5
        found.append(prefix.prepare(q, k[:, a:b], v[:, a:b], scale=scale, starts=own))
    return found


def run(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, cuts: tuple[int, ...], borders: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, dq, dk, dv tile by tile."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    identity = nothing(v.shape[0], v.shape[2], v.shape[3], wide)
    prepared, state = tiles(q, k, v, cuts, borders), identity
    outs, states = [], []
    for p in prepared:
        states.append(state)
        out, after = prefix.run(p, state)
        assert error(prefix.advance(p, state), after.double()) < 1e-6
        outs.append(out)
        state = after
    dstate, grads = identity, []
    for p, before, (a, b) in zip(
        prepared[::-1], states[::-1], list(pairwise(borders))[::-1], strict=True
    ):
        asked = prefix.adjoint(p, before, dout[:, a:b], dstate)
        own, dstate = prefix.backward(p, before, dout[:, a:b], dstate)
        torch.testing.assert_close(asked, dstate)
        grads.append(own)
    dq = torch.stack([own[0] for own in grads]).sum(0)
    dk, dv = (torch.cat([own[i] for own in grads[::-1]], 1) for i in (1, 2))
    return torch.cat(outs, 1), dq, dk, dv


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_forward_and_every_gradient(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for (batch, tokens, heads, dim, width), cuts, borders in CASES:
        shapes = ((heads, dim), (batch, tokens, heads, dim), (batch, tokens, heads, width))
        x = [torch.randn(s).to(dtype).double().requires_grad_() for s in shapes]
        out = prefix_attention_reference(*x, scale=dim**-0.5, cu_seqlens=cuts)
        dout = torch.randn(out.shape).to(dtype).double()
        wanted = (out, *torch.autograd.grad((out * dout).sum(), x))
        with torch.no_grad():
            found = run(*(y.to(dtype) for y in x), dout.to(dtype), cuts, borders)
        assert found[0].dtype == dtype
        for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
            # A head whose one token has no choice has no gradient of q and k.
            if b.abs().max() > 1e-12:
                assert error(a, b) <= TOLERANCE[dtype], (tokens, cuts, borders, name)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_scores_of_ten_thousand(size: float) -> None:
    """All scores of this size, rising or falling along the sequence: finite, and right."""
    torch.manual_seed(1)
    q, v = torch.tensor([[2.0, 1.0]]), torch.randn(1, 150, 1, 3)
    k = torch.randn(1, 150, 1, 2).round(decimals=1)
    k[..., 0] = size
    for slope in (0.0, 200.0, -200.0):
        k[..., 1] = torch.randn(1, 150, 1) + slope * torch.arange(150.0)[None, :, None]
        x = [y.double().requires_grad_() for y in (q, k, v)]
        out = prefix_attention_reference(*x, scale=2**-0.5)
        dout = torch.randn_like(out)
        dq, dk, dv = torch.autograd.grad((out * dout).sum(), x)
        with torch.no_grad():
            found = run(*(y.detach() for y in x), dout, (0, 150), (0, 50, 150))
            single = run(q, k, v, dout.float(), (0, 150), (0, 50, 150))
        for a, b, size_of in zip(found, (out, dq, dk, dv), (1, 1e6, 10, 1), strict=True):
            assert error(a, b, size_of) < 1e-10, slope
        assert all(y.isfinite().all() for y in single), slope
        # Scores themselves are rounded to 1e-3 in float32.
        assert error(single[0], out) < 1e-2, slope


def test_a_prefix_without_a_finite_score_is_zero_and_never_nan() -> None:
    torch.manual_seed(2)
    q, k, v = torch.ones(1, 1), torch.randn(1, 100, 1, 1), torch.randn(1, 100, 1, 2)
    k[:, :70] = -math.inf
    dout = torch.randn(1, 100, 1, 2)
    (p,) = tiles(q, k, v, (0, 100), (0, 100))
    identity = nothing(1, 1, 2, torch.float32)
    out, after = prefix.run(p, identity)
    assert (out[:, :70] == 0).all()
    want = prefix_attention_reference(q, k[:, 70:], v[:, 70:], scale=1.0)
    assert error(out[:, 70:], want) < 1e-6
    (_, dk, dv), dstate = prefix.backward(p, identity, dout, identity)
    assert dv[:, :70].abs().max() == 0
    assert not torch.stack([dk.isnan().any(), dv.isnan().any(), dstate.isnan().any()]).any()
    (p,) = tiles(q, k[:, :70], v[:, :70], (0, 70), (0, 70))
    assert torch.equal(prefix.advance(p, identity), identity)
    assert torch.equal(prefix.adjoint(p, identity, dout[:, :70], identity), identity)
    assert torch.equal(prefix.advance(p, after), after)


def test_a_gradient_of_nothing_says_nothing() -> None:
    """Zeros, as autograd makes them, are the same as (-inf, 0, 0), whatever the scores are."""
    torch.manual_seed(3)
    q, k, v = torch.full((1, 2), 1e4), torch.randn(1, 20, 1, 2), torch.randn(1, 20, 1, 3)
    (p,) = tiles(q, k, v, (0, 20), (0, 20))
    identity, dout = nothing(1, 1, 3, torch.float32), torch.randn(1, 20, 1, 3)
    want = prefix.backward(p, identity, dout, identity)
    got = prefix.backward(p, identity, dout, torch.zeros_like(identity))
    assert all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True))
    assert torch.equal(got[1], want[1])


def test_offsets_past_two_to_the_31() -> None:
    tokens = 5
    stride = 2**31 // (tokens - 1) + 1
    torch.manual_seed(4)
    q, k = torch.randn(2, 3), torch.randn(1, tokens, 2, 3)
    held = torch.empty((tokens - 1) * stride + 8, dtype=torch.bfloat16)
    view = held.as_strided((1, tokens, 2, 4), (0, stride, 4, 1))
    view.copy_(torch.randn(1, tokens, 2, 4))
    assert (tokens - 1) * view.stride(1) > 2**31
    identity = nothing(1, 2, 4, torch.float32)
    found = []
    for own in (view, view.clone()):
        p = prefix.prepare(q, k, own, scale=1.0)
        out, after = prefix.run(p, identity)
        grads, before = prefix.backward(p, identity, out, identity)
        found.append([out, after, *grads, before])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_heads_are_no_work() -> None:
    """A rank of strategy switch may have no heads."""
    q, x, identity = torch.zeros(0, 3), torch.zeros(2, 5, 0, 3), nothing(2, 0, 3, torch.float32)
    p = prefix.ahead(prefix.prepare(q, x, x, scale=1.0))
    out, after = prefix.run(p, identity)
    grads, before = prefix.backward(p, identity, out, identity)
    assert out.shape == grads[1].shape == grads[2].shape == x.shape
    assert grads[0].shape == q.shape
    assert after.shape == before.shape == identity.shape
