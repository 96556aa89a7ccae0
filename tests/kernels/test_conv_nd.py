"""Convolution of grids against float64 loops: output and every gradient, one to four dims."""

from __future__ import annotations

import pytest
import torch

from xdist_kernels import conv_nd
from xdist_kernels.conv_nd.reference import conv_nd_reference
from xdist_kernels.errors import KernelError

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
# sizes, channels in and out, groups, kernel, zeros in front, outputs, stride, dilation. The zeros
# behind are more than those in front, fewer, or fewer than none (inputs that nothing reads).
CASES = (
    ((9,), (4, 4), 4, (3,), (1,), (9,), (1,), (1,)),
    ((9,), (2, 6), 2, (4,), (1,), (5,), (2,), (1,)),
    ((5, 6), (3, 2), 1, (3, 2), (1, 0), (5, 6), (1, 1), (1, 1)),
    ((7, 4), (4, 4), 4, (2, 3), (0, 0), (2, 2), (3, 1), (2, 1)),
    ((5, 4, 3), (4, 4), 4, (3, 3, 3), (1, 1, 1), (5, 4, 3), (1, 1, 1), (1, 1, 1)),
    ((6, 3, 5), (2, 4), 2, (3, 1, 3), (2, 0, 0), (4, 2, 3), (2, 2, 1), (2, 1, 1)),
    ((4, 3, 5), (1, 3), 1, (2, 2, 3), (0, 1, 2), (4, 3, 5), (1, 1, 1), (1, 1, 2)),
    ((3, 4, 2, 3), (3, 3), 3, (3, 2, 2, 3), (1, 1, 0, 1), (3, 4, 2, 3), (1,) * 4, (1,) * 4),
    ((4, 3, 3, 2), (2, 2), 1, (2, 2, 1, 2), (0, 0, 0, 1), (2, 2, 2, 2), (2, 1, 2, 1), (1, 2, 1, 1)),
)  # fmt: skip


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    b = b.detach()
    return float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-300))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forward_and_every_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full, grouped and depthwise; strides and dilations; several tiles; targets of any strides."""
    monkeypatch.setattr("xdist_kernels.conv_nd.torch.TILE_ELEMENTS", 40)
    generator = torch.Generator().manual_seed(0)
    for case in CASES:
        sizes, (channels, outs), groups, size, before, out_sizes, stride, dilation = case
        shapes = ((2, *sizes, channels), (outs, channels // groups, *size), (outs,))
        x, weight, bias = (
            torch.randn(shape, generator=generator).to(dtype).double().requires_grad_()
            for shape in shapes
        )
        taps = conv_nd.Taps(before, stride, dilation, groups)
        want = conv_nd_reference(x, weight, bias, sizes=out_sizes, **taps._asdict())
        dout = torch.randn(want.shape, generator=generator).to(dtype).double()
        wanted = torch.autograd.grad((want * dout).sum(), [x, weight, bias])
        given = [t.detach().to(dtype) for t in (x, weight)]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        room = torch.full((2, out_sizes[0] + 2, *out_sizes[1:], outs), torch.nan, dtype=dtype)
        got = conv_nd.conv_forward(*given, bias.detach().to(dtype), taps, out=room[:, 1:-1])
        held = torch.ones(2, sizes[0] + 2, *sizes[1:], channels, dtype=wide)
        dweight, dbias = conv_nd.conv_backward(*given, dout.to(dtype), taps, into=held[:, 1:-1])
        none, _ = conv_nd.conv_backward(*given, dout.to(dtype), taps, want_weight=False)
        assert error(got, want) <= TOLERANCE[dtype], case
        assert room[:, [0, -1]].isnan().all()
        # Sums are wide: but for the roundings of float32 they are those of float64.
        close = 1e-12 if dtype == torch.float64 else 2e-6
        assert error(held[:, 1:-1].double() - 1, wanted[0]) <= 10 * close, case
        assert (held[:, [0, -1]] == 1).all()
        assert error(dweight, wanted[1]) <= close, case
        assert error(dbias, wanted[2]) <= close, case
        assert dweight.dtype == dbias.dtype == wide
        assert not none.any()


def test_runs_of_zeros_alone_are_the_bias() -> None:
    taps = conv_nd.Taps((0, 0, 0), (1, 1, 1), (1, 1, 1))
    bias, weight = torch.tensor([1.0, 2.0]), torch.randn(2, 3, 1, 1, 1)
    x, out = torch.zeros(1, 0, 4, 2, 3), torch.empty(1, 2, 4, 2, 2)
    assert (conv_nd.conv_forward(x, weight, bias, taps, out=out) == bias).all()
    dweight, dbias = conv_nd.conv_backward(x, weight, out, taps, into=torch.zeros_like(x))
    assert not dweight.any()
    assert dbias.tolist() == [16.0, 32.0]


def test_bad_arguments_say_what_was_got() -> None:
    x = torch.zeros(1, 4, 4, 6)
    for given, words in (
        ((x, torch.zeros(6, 6, 3), None, 1), r"\(1, 4, 4, 6\) and \(6, 6, 3\)"),
        ((x, torch.zeros(6, 6, 3, 3), None, 4), "6 channels, 4 groups"),
        ((x, torch.zeros(6, 1, 3, 3), torch.zeros(5), 6), r"\[6\]; got \(5,\)"),
        ((x.long(), torch.zeros(6, 1, 3, 3), None, 6), "int64"),
        ((torch.zeros(1, 2, 2, 2, 2, 2, 1), torch.zeros(1, 1, 1, 1, 1, 1, 1), None, 1), "k from 1"),
    ):
        with pytest.raises(KernelError, match=words):
            conv_nd.check(*given)
