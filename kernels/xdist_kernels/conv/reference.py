"""Causal depthwise convolution by a loop over tokens, in float64: the definition, for tests.

y_t = activation(bias + sum_w weight[:, w] x_{t-W+1+w}),  x = 0 before the document's start
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def causal_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    cu_seqlens: tuple[int, ...] | None = None,
) -> Tensor:
    """y [B,n,C] float64 from x [B,n,C], weight [C,W], bias [C]; differentiable by autograd."""
    x, weight = x.double(), weight.double()
    n, width = x.shape[1], weight.shape[1]
    cuts = (0, n) if cu_seqlens is None else cu_seqlens
    outs = []
    for start, stop in itertools.pairwise(cuts):
        for t in range(start, stop):
            taps = range(max(0, width - 1 - (t - start)), width)
            y = sum(
                (weight[:, w] * x[:, t - width + 1 + w] for w in taps), torch.zeros(()).double()
            )
            outs.append(y if bias is None else y + bias.double())
    out = torch.stack(outs, 1) if outs else x
    return torch.nn.functional.silu(out) if activation == "silu" else out
