"""A run of the causal convolution by a loop over tokens, in float64: the functions of torch.py.

    y_t = activation(bias + sum over d = 0..W-1 of weight[:, W-1-d] x_{t-d})

where a token d back counts if t is at least d tokens into its document; gradients by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def _outputs(
    around: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None,
    into_document: Tensor | None,
) -> Tensor:  # fmt: skip
    """[B,n,C] of prefix and run together, [B,W-1+n,C], all float64."""
    width = weight.shape[1]
    outs = []
    for t in range(around.shape[1] - width + 1):
        reach = width - 1 if into_document is None else min(width - 1, int(into_document[t]))
        y = torch.zeros_like(around[:, 0]) if bias is None else bias.expand_as(around[:, 0])
        for d in range(reach + 1):
            y = y + weight[:, width - 1 - d] * around[:, t + width - 1 - d]
        outs.append(y)
    found = torch.stack(outs, 1) if outs else around[:, :0]
    return silu(found) if activation == "silu" else found


def _around(x: Tensor, weight: Tensor, prefix: Tensor | None) -> Tensor:
    if prefix is None:
        prefix = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])
    return torch.cat([prefix, x], 1).double()


def causal_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    prefix: Tensor | None = None,
    into_document: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y [B,n,C] in the dtype of x, written to `out` where one is given; arguments in torch.py."""
    wide = None if bias is None else bias.double()
    around = _around(x, weight, prefix)
    y = _outputs(around, weight.double(), wide, activation, into_document)
    return y.to(x.dtype) if out is None else out.copy_(y)


def causal_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    *,
    activation: str | None = None,
    prefix: Tensor | None = None,
    into_document: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """dx, dweight, dbias (None without bias) and dprefix, as in torch.py; `into` is added to."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.enable_grad():
        around = _around(x, weight, prefix).detach().requires_grad_()
        taps = weight.detach().double().requires_grad_()
        level = None if bias is None else bias.detach().double().requires_grad_()
        y = _outputs(around, taps, level, activation, into_document)
        wanted = [around, taps] if level is None else [around, taps, level]
        daround, dtaps, *rest = torch.autograd.grad(
            y, wanted, dout.double(), allow_unused=True, materialize_grads=True
        )
    last = weight.shape[1] - 1
    dbias = rest[0].to(wide) if rest else None
    if into is not None:
        into += daround
        return into[:, last:], dtaps.to(wide), dbias, into[:, :last]
    dprefix = daround[:, :last].to(wide)
    return daround[:, last:].to(x.dtype), dtaps.to(wide), dbias, dprefix
