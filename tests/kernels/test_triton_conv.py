"""The causal convolution's Triton kernels, in the interpreter, against the float64 token loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from xdist_kernels import conv
from xdist_kernels.conv import triton
from xdist_kernels.conv.reference import causal_conv_reference

# Law 1 in float32. Half precision: one rounding of y and dx, the inputs are exact.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}


def error(a: Tensor, b: Tensor) -> float:
    b = b.detach()
    return float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-300))


def into_document(cuts: tuple[int, ...], tokens: Tensor) -> Tensor:
    starts = torch.tensor(cuts[:-1])
    return tokens - starts[torch.searchsorted(starts, tokens, right=True) - 1]


def column(x: Tensor) -> Tensor:
    """The same numbers, not side by side."""
    return torch.stack([x, x + 1], 1)[:, 0]


def check(
    sizes: tuple[int, int, int, int],
    cuts: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    activation: str | None = "silu",
    *,
    with_bias: bool = True,
) -> None:
    """sizes: batch, tokens, channels, width; cuts: of the prefix and the run together."""
    batch, n, channels, width = sizes
    total = width - 1 + n
    # Values that dtype holds exactly, in float64: the loop's own gradients are then float64.
    whole, weight, bias = (
        torch.randn(shape).to(dtype).double().requires_grad_()
        for shape in ((batch, total, channels), (channels, width), (channels,))
    )
    level = bias if with_bias else None
    want = causal_conv_reference(whole, weight, level, activation=activation, cu_seqlens=cuts)
    want = want[:, width - 1 :]
    dout = torch.randn_like(want).to(dtype).double()
    wanted = [whole, weight, bias] if with_bias else [whole, weight]
    grads = torch.autograd.grad((want * dout).sum(), wanted)
    inside = into_document(cuts, torch.arange(width - 1, total)) if len(cuts) > 2 else None
    prefix, x = whole.detach().to(dtype).split([width - 1, n], 1)
    options: dict[str, Any] = {
        "activation": activation, "prefix": prefix, "into_document": inside
    }  # fmt: skip
    apart = level if level is None else column(bias.detach().to(dtype))
    given = (x, weight.detach().to(dtype), apart)
    got = triton.causal_conv_forward(*given, **options)
    dx, dweight, dbias, dprefix = triton.causal_conv_backward(*given, dout.to(dtype), **options)
    case = (sizes, cuts, dtype, activation)
    assert got.dtype == dx.dtype == dtype
    assert dweight.dtype == dprefix.dtype == torch.float32
    assert error(got, want) <= TOLERANCE[dtype], case
    assert error(dprefix, grads[0][:, : width - 1]) <= TOLERANCE[dtype] if width > 1 else True, case
    assert error(dx, grads[0][:, width - 1 :]) <= TOLERANCE[dtype], case
    assert error(dweight, grads[1]) <= TOLERANCE[dtype], case
    assert (dbias is None) == (level is None), case
    assert dbias is None or error(dbias, grads[2]) <= TOLERANCE[dtype], case


@pytest.mark.usefixtures("poisoned")
def test_forward_and_every_gradient() -> None:
    """Halo tokens before the run; two spans; documents shorter than the width; one tap."""
    torch.manual_seed(0)
    check((1, 37, 5, 4), (0, 40))
    check((1, 20, 3, 4), (0, 1, 2, 5, 6, 19, 23))
    check((1, 2, 3, 4), (0, 5), activation=None)
    check((1, 5, 3, 1), (0, 5), with_bias=False)


@pytest.mark.usefixtures("poisoned")
def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(1)
    check((1, 18, 3, 3), (0, 9, 20), torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_more_shapes(dtype: torch.dtype) -> None:
    """Three spans; two blocks of channels; narrow and wide convolutions; no SiLU."""
    torch.manual_seed(2)
    check((1, 70, 2, 4), (0, 33, 34, 73), dtype)
    check((1, 17, 66, 4), (0, 20), dtype)
    check((2, 17, 2, 2), (0, 9, 18), dtype)
    check((1, 17, 2, 8), (0, 20, 24), dtype)
    check((2, 17, 3, 6), (0, 10, 11, 22), dtype, None, with_bias=False)


def test_targets_are_filled_and_added_to() -> None:
    """`out` has no holes, strides and a dtype of its own; `into` keeps what it held; channels
    that do not lie side by side."""
    torch.manual_seed(3)
    x, dout = torch.randn(2, 1, 9, 3).half()
    weight, prefix = torch.randn(3, 4).half(), torch.randn(1, 3, 3).half()
    options: dict[str, Any] = {"activation": "silu", "prefix": prefix}
    want = triton.causal_conv_forward(x, weight, **options)
    out = torch.full((1, 15, 3), torch.nan, dtype=torch.float32)
    triton.causal_conv_forward(x, weight, **options, out=out[:, 5:14])
    assert torch.equal(out[:, 5:14].half(), want)
    assert out[:, :5].isnan().all()
    assert out[:, 14:].isnan().all()
    apart = torch.full((1, 3, 9), torch.nan).transpose(1, 2)
    triton.causal_conv_forward(x, weight, **options, out=apart)
    assert torch.equal(apart.half(), want)

    dx, *_, dprefix = triton.causal_conv_backward(x, weight, None, dout, **options)
    held = torch.ones(1, 19, 3)
    for into in (held[:, 2:14], torch.ones(1, 3, 12).transpose(1, 2)):
        added, *_, before = triton.causal_conv_backward(x, weight, None, dout, **options, into=into)
        torch.testing.assert_close(into[:, :3] - 1, dprefix, rtol=0, atol=1e-5)
        torch.testing.assert_close((into[:, 3:] - 1).half(), dx, rtol=1e-3, atol=1e-5)
        assert added.data_ptr() == into[:, 3:].data_ptr()
        assert before.data_ptr() == into.data_ptr()
    assert (held[:, :2] == 1).all()
    assert (held[:, 14:] == 1).all()


def test_empty_runs() -> None:
    x, weight, prefix = torch.zeros(1, 0, 3), torch.zeros(3, 4), torch.ones(1, 3, 3)
    assert triton.causal_conv_forward(x, weight, prefix=prefix).shape == x.shape
    dx, dweight, _, dprefix = triton.causal_conv_backward(x, weight, None, x, prefix=prefix)
    assert dx.shape == x.shape
    assert not dprefix.any()
    assert not dweight.any()


def test_offsets_past_two_to_the_31() -> None:
    """Tokens some 2^31 elements apart, as views of memory that is never touched in between."""
    tokens, channels = 5, 3
    stride = 2**31 // (tokens - 1) + 1
    torch.manual_seed(4)
    x, dout = torch.randn(2, 1, tokens, channels).half()
    weight = torch.randn(channels, 4)
    held = torch.empty((tokens - 1) * stride + channels, dtype=torch.float16)
    far = held.as_strided((1, tokens, channels), (0, stride, 1))
    assert (tokens - 1) * far.stride(1) > 2**31
    want = triton.causal_conv_forward(x, weight, activation="silu")
    grads = triton.causal_conv_backward(x, weight, None, dout, activation="silu")
    far.copy_(x)
    got = triton.causal_conv_forward(far, weight, activation="silu", out=far)
    assert got is far
    assert torch.equal(far, want)
    far.copy_(dout)
    found = triton.causal_conv_backward(x, weight, None, far, activation="silu")
    for a, b in zip(grads, found, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.usefixtures("last_program")
def test_grids_past_65535() -> None:
    """The last of 70,000 programs, more than a second grid dim could hold."""
    torch.manual_seed(5)
    rows, last = 70_000, torch.randn(1, 2, 3)
    x = last.expand(rows, 2, 3)
    weight = torch.randn(3, 4)
    dout = torch.randn(1, 2, 3).expand(rows, 2, 3)
    out = triton.causal_conv_forward(x, weight)
    dx, *_, dprefix = triton.causal_conv_backward(x, weight, None, dout)
    alone, held = last.double().requires_grad_(), weight.double()
    want = causal_conv_reference(alone, held)
    (grad,) = torch.autograd.grad(want, alone, dout[:1].double())
    assert error(out[-1:], want) < 2e-6
    assert error(dx[-1:], grad) < 2e-6
    assert dprefix.shape == (rows, 3, 3)


def test_refusals_say_what_to_do() -> None:
    x, weight = torch.zeros(1, 4, 6), torch.zeros(6, 4)
    assert conv.refusal(x, weight, None, "silu") is None
    for found in (
        conv.refusal(x, weight.double(), None, None),
        conv.refusal(x, torch.zeros(6, 9), None, None),
        conv.refusal(x, weight, None, "relu"),
    ):
        assert found is not None
        assert ": use " in found
