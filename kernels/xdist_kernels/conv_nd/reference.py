"""Convolution of a grid by loops over positions and taps, in float64: the definition, for tests.

y[b, o, g] = bias + sum over taps t of weight[g, t] x[b, stride o + dilation t - before, g]

with x = 0 outside the grid; g is a group of channels, weight[g, t] a matrix [out, in].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor


def conv_nd_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    before: Sequence[int],
    sizes: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """y [B,*sizes,Cout] float64 from x [B,S1..Sk,C], weight [Cout,C/groups,K1..Kk], bias [Cout];
    differentiable by autograd."""
    x = x.double().unflatten(-1, (groups, -1))
    taps = weight.double().unflatten(0, (groups, -1))  # [groups, out, in, K1..Kk]
    level = x.new_zeros(()) if bias is None else bias.double()
    found = []
    for out in product(*(range(size) for size in sizes)):
        y = x.new_zeros(x.shape[0], weight.shape[0])
        for tap in product(*(range(size) for size in weight.shape[2:])):
            at = [
                o * s + t * d - b
                for o, s, t, d, b in zip(out, stride, tap, dilation, before, strict=True)
            ]
            if all(0 <= p < n for p, n in zip(at, x.shape[1:-2], strict=True)):
                seen = x.flatten(1, -3)[:, _flat(at, x.shape[1:-2])]
                matrix = taps.flatten(3)[..., _flat(tap, weight.shape[2:])]
                y = y + torch.einsum("bgi,goi->bgo", seen, matrix).flatten(1)
        found.append(y + level)
    return torch.stack(found, 1).unflatten(1, tuple(sizes))


def _flat(at: Sequence[int], sizes: Sequence[int]) -> int:
    """Row-major number of a place."""
    number = 0
    for place, size in zip(at, sizes, strict=True):
        number = number * size + place
    return number
