"""Causal convolution against the float64 token loop: output and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch

from xdist_kernels import conv
from xdist_kernels.conv.reference import causal_conv_reference
from xdist_kernels.errors import KernelError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    b = b.detach()
    return float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-300))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forward_and_every_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths, runs shorter than the width, several tiles, prefixes, documents, activations."""
    monkeypatch.setattr("xdist_kernels.conv.torch.TILE_TOKENS", 16)
    torch.manual_seed(0)
    cases = itertools.product((1, 2, 40), (1, 4), (None, "silu"), (False, True))
    for n, width, activation, packed in cases:
        # Values that dtype holds exactly, in float64: the loop's own gradients are then float64.
        whole, weight, bias = (
            torch.randn(shape).to(dtype).double().requires_grad_()
            for shape in ((2, width - 1 + n, 6), (6, width), (6,))
        )
        total = width - 1 + n
        cuts = tuple(sorted({0, *(c for c in (1, 2, 5, 6, 21) if c < total), total}))
        cuts = cuts if packed else (0, total)
        want = causal_conv_reference(whole, weight, bias, activation=activation, cu_seqlens=cuts)[
            :, width - 1 :
        ]
        dout = torch.randn_like(want)
        grads = torch.autograd.grad((want * dout).sum(), [whole, weight, bias])

        starts = torch.tensor(cuts[:-1])
        positions = torch.arange(width - 1, total)
        into = positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
        with torch.no_grad():
            prefix, x = whole.detach().to(dtype).split([width - 1, n], 1)
            options = {"activation": activation, "prefix": prefix, "into_document": into}
            given = (x, weight.detach().to(dtype), bias.detach().to(dtype))
            got = conv.causal_conv_forward(*given, **options)
            dx, dweight, dbias, dprefix = conv.causal_conv_backward(
                *given, dout.to(dtype), **options
            )
        case = (n, width, activation, packed)
        assert got.dtype == dx.dtype == dtype
        assert error(got, want) <= TOLERANCE[dtype], case
        assert error(torch.cat([dprefix, dx], 1), grads[0]) <= TOLERANCE[dtype], case
        assert error(dweight, grads[1]) <= TOLERANCE[dtype], case
        assert error(dbias, grads[2]) <= TOLERANCE[dtype], case


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_targets_are_filled_and_added_to(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`out` has no holes and a dtype of its own; `into` keeps what it held."""
    monkeypatch.setattr("xdist_kernels.conv.torch.TILE_TOKENS", 16)
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, dout = torch.randn(2, 2, 40, 6).to(dtype)
    weight, prefix = torch.randn(6, 4).to(dtype), torch.randn(2, 3, 6).to(dtype)
    options = {"activation": "silu", "prefix": prefix}
    want = conv.causal_conv_forward(x, weight, **options)
    out = torch.full((2, 50, 6), torch.nan, dtype=dtype)
    conv.causal_conv_forward(x, weight, **options, out=out[:, 5:45])
    assert torch.equal(out[:, 5:45], want)
    assert out[:, :5].isnan().all()
    assert out[:, 45:].isnan().all()

    dx, *_, dprefix = conv.causal_conv_backward(x, weight, None, dout, **options)
    held = torch.ones(2, 50, 6, dtype=wide)
    added, *_ = conv.causal_conv_backward(x, weight, None, dout, **options, into=held[:, 2:45])
    tolerance = {"rtol": 0, "atol": 1e-12 if wide == torch.float64 else 2e-6 * 8}
    torch.testing.assert_close(held[:, 2:5] - 1, dprefix, **tolerance)
    torch.testing.assert_close((held[:, 5:45] - 1).to(dtype), dx, rtol=2e-2, atol=1e-5)
    assert added.data_ptr() == held[:, 5:].data_ptr()
    assert added.dtype == wide
    assert (held[:, :2] == 1).all()
    assert (held[:, 45:] == 1).all()


def test_bad_arguments_say_what_was_got() -> None:
    x = torch.zeros(1, 4, 6)
    with pytest.raises(KernelError, match=r"\(1, 4, 6\) and \(5, 4\)"):
        conv.check(x, torch.zeros(5, 4), None, None)
    with pytest.raises(KernelError, match="activation must be None or 'silu'; got 'relu'"):
        conv.check(x, torch.zeros(6, 4), None, "relu")
    with pytest.raises(KernelError, match=r"bias must be \[C\] = \[6\]; got \(5,\)"):
        conv.check(x, torch.zeros(6, 4), torch.zeros(5), None)
