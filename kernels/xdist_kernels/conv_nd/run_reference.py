"""A run of the convolution by the loops of reference.py in float64: the functions of torch.py."""

from __future__ import annotations

import torch
from torch import Tensor

from xdist_kernels.conv_nd.reference import conv_nd_reference
from xdist_kernels.conv_nd.torch import Taps


def conv_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: Taps, *, out: Tensor
) -> Tensor:
    """Fills `out` [B,O1..Ok,Cout] from x [B,S1..Sk,C]; returns it."""
    return out.copy_(_outputs(x, weight, bias, taps, out)) if out.numel() else out


def conv_backward(
    x: Tensor,
    weight: Tensor,
    dout: Tensor,
    taps: Taps,
    *,
    into: Tensor | None = None,
    want_weight: bool = True,
) -> tuple[Tensor, Tensor]:
    """(dweight, dbias); x's gradient is added to `into` where one is given; by autograd."""
    wide = torch.float64 if dout.dtype == torch.float64 else torch.float32
    dbias = dout.double().flatten(0, -2).sum(0).to(wide)
    if not dout.numel():
        return torch.zeros(weight.shape, dtype=wide, device=weight.device), dbias
    with torch.enable_grad():
        given = [t.detach().double().requires_grad_() for t in (x, weight)]
        y = _outputs(given[0], given[1], None, taps, dout)
        dx, dweight = torch.autograd.grad(y, given, dout.double(), materialize_grads=True)
    if into is not None:
        into += dx
    return dweight.to(wide) if want_weight else torch.zeros_like(dweight, dtype=wide), dbias


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None, taps: Taps, like: Tensor) -> Tensor:
    return conv_nd_reference(
        x,
        weight,
        bias,
        before=taps.before,
        sizes=like.shape[1:-1],
        stride=taps.stride,
        dilation=taps.dilation,
        groups=taps.groups,
    )
