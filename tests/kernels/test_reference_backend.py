"""The reference backend: each family's token loop behind the tile's functions equals torch's."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from xdist.testing import relative_error
from xdist_kernels import attention, conv, delta, linear, prefix, selective_scan
from xdist_kernels.attention.dropout import Dropped

B, T, H, K, V = 2, 11, 2, 3, 2
STARTS = torch.zeros(T, dtype=torch.bool)
STARTS[[4, 5, 9]] = True


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def same(found: Any, want: Any) -> None:
    """Nested tuples of tensors and None agree."""
    if isinstance(want, Tensor):
        assert relative_error(found, want) < 1e-12
    elif want is None:
        assert found is None
    else:
        for one, other in zip(found, want, strict=True):
            same(one, other)


def check_tile(kernels: Any, prepare: Any, state: Tensor, values: int) -> None:
    """All functions of a tile but `adjoint` and `backward_ahead`, whose arguments differ."""
    heads = state.shape[1]
    dout, dstate = normal(B, T, heads, values), normal(*state.shape)
    results = []
    for name in ("reference", "torch"):
        own = kernels(name)
        p = prepare(own)
        out, after = own.run(own.ahead(p), state)
        results.append(
            (out, after, own.advance(p, state), own.backward(p, state, dout, dstate),
             own.adjoint(p, dout, dstate))
        )  # fmt: skip
    same(*results)


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one", "several"])
@pytest.mark.parametrize("decay", [None, 1, K])
def test_linear_and_delta_tiles(starts: Tensor | None, decay: int | None) -> None:
    q, k, v = normal(B, T, 1, K), 0.3 * normal(B, T, 1, K), normal(B, T, H, V)
    log_decay = None if decay is None else -torch.rand(B, T, H, decay, dtype=torch.float64)
    state = normal(B, H, K, V)
    check_tile(
        linear.kernels,
        lambda own: own.prepare(q, k, v, log_decay, scale=0.7, starts=starts),
        state,
        V,
    )
    beta = torch.rand(B, T, H, dtype=torch.float64)
    check_tile(
        delta.kernels, lambda own: own.prepare(q, k, v, beta, log_decay, 0.7, starts), state, V
    )
    if starts is None:
        tiles = [linear.kernels(n) for n in ("reference", "torch")]
        same(*(own.transition(own.prepare(q, k, v, log_decay, scale=1.0)) for own in tiles))
        deltas = [delta.kernels(n) for n in ("reference", "torch")]
        same(*(own.transition(own.prepare(q, k, v, beta, log_decay, 1.0)) for own in deltas))


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one", "several"])
def test_selective_scan_tiles(starts: Tensor | None) -> None:
    inputs = (
        normal(B, T, H, 1), torch.rand(B, T, H, 1, dtype=torch.float64),
        -torch.rand(H, K, dtype=torch.float64), normal(B, T, 1, K), normal(B, T, 1, K),
    )  # fmt: skip
    kernels = selective_scan.kernels
    check_tile(kernels, lambda own: own.prepare(*inputs, starts), normal(B, H, K, 1), 1)
    pair = [kernels(name) for name in ("reference", "torch")]
    same(*(own.transition(own.prepare(*inputs)) for own in pair))


@pytest.mark.parametrize("starts", [None, STARTS], ids=["one", "several"])
def test_prefix_attention_tiles(starts: Tensor | None) -> None:
    """Gradients of states travel as (g, h, G) for e^g (h, G): compared as what they stand for."""
    q, k, v = normal(H, K), normal(B, T, H, K), normal(B, T, H, V)
    state, dstate = normal(B, H, 1, 2 + V), normal(B, H, 1, 2 + V)
    state[..., 1] = 1.0 + state[..., 1].abs()
    # What later tokens ask is at most what they may: e^(s + g) stays at most 1.
    dstate[..., 0] = -10.0
    dout, results = normal(B, T, H, V), []
    for name in ("reference", "torch"):
        own = prefix.kernels(name)
        p = own.prepare(q, k, v, scale=0.7, starts=starts)
        out, after = own.run(own.ahead(p), state)
        grads, before = own.backward(own.backward_ahead(p), state, dout, dstate)
        again = own.adjoint(p, state, dout, dstate)
        stands = [x[..., :1].exp() * x[..., 1:] for x in (after, before, again)]
        results.append((out, *stands, grads))
    same(*results)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_runs_of_the_convolution(activation: str | None) -> None:
    x, weight, bias = normal(B, T, 3), normal(3, 4), normal(3)
    prefix_, dout = normal(B, 3, 3), normal(B, T, 3)
    since = torch.tensor([2, 3, 0, 1, 2, 3, 4, 0, 0, 1, 2])
    for into_document, given in product((None, since), (None, prefix_)):
        rest = {"activation": activation, "prefix": given, "into_document": into_document}
        results = []
        for name in ("reference", "torch"):
            own, out = conv.kernels(name), torch.empty(B, T, 3, dtype=torch.float64)
            into = torch.ones(B, T + 3, 3, dtype=torch.float64)
            own.causal_conv_forward(x, weight, None, **rest, out=out)
            results.append((
                out, own.causal_conv_forward(x, weight, bias, **rest),
                own.causal_conv_backward(x, weight, bias, dout, **rest),
                own.causal_conv_backward(x, weight, None, dout, **rest, into=into), into,
            ))  # fmt: skip
        same(*results)


@pytest.mark.parametrize("rate", [None, 0.4])
def test_calls_of_attention(rate: float | None) -> None:
    """A part of the keys, with the log-sum-exp of all; soft-cap, sinks, dropout; added in place."""
    q, k, v = normal(B, T, H, K), normal(B, 7, 1, K), normal(B, 7, 1, V)
    positions = torch.arange(T)
    spans = (positions * 0, positions + 1, positions * 0, positions * 0)
    drop = None if rate is None else Dropped(rate, 5, 0, 0, positions)
    dout, results = normal(B, T, H, V), []
    for softcap, name in product((None, 1.5), ("reference", "torch")):
        own, rest = attention.kernels(name), {"scale": 0.6, "spans": spans, "softcap": softcap}
        first = {**rest, "k_positions": torch.arange(4), "dropout": drop}
        later = {**rest, "k_positions": torch.arange(4, 7), "dropout": drop}
        found = own.attention_forward(q, k[:, :4], v[:, :4], sinks=torch.ones(H).double(), **first)
        out, lse = own.attention_forward(q, k[:, 4:], v[:, 4:], into=found, **later)
        delta_ = own.attention_delta(out, dout)
        grads = own.attention_backward(q, k[:, 4:], v[:, 4:], lse, delta_, dout, **later)
        again = own.attention_backward(q, k[:, 4:], v[:, 4:], lse, None, dout, out=out, **later)
        results.append((out, lse, grads, again))
    same(results[0], results[1])
    same(results[2], results[3])
