"""Causal depthwise convolution of one tile with W - 1 tokens before it: the fast CPU path.

    y_t = sum_w weight[:, w] x_{t - W + 1 + w},   terms of an earlier document left out

The whole tile goes through oneDNN's depthwise convolution in channels-last form (the layout
tokens have anyway: no copy); the at most W - 1 tokens behind each document's start are then
computed again without the terms that reach across it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _shifted(x: Tensor, weight: Tensor) -> Tensor:
    """The convolution as a sum of shifted products, for dtypes oneDNN does not serve."""
    width = weight.shape[1]
    tokens = x.shape[1] - width + 1
    total = x[:, :tokens] * weight[:, 0]
    for w in range(1, width):
        total = total + x[:, w : w + tokens] * weight[:, w]
    return total


def _images(x: Tensor) -> Tensor:
    """[B, T, C] as the channels-last image [B, C, T, 1]."""
    return x.contiguous().unsqueeze(2).permute(0, 3, 1, 2)


def _reach(since: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Tokens closer than W - 1 to their document's start, [m], and which taps they see, [m, W]."""
    rows = (since < width - 1).nonzero().squeeze(1)
    taps = torch.arange(width - 1, -1, -1, device=since.device)
    return rows, taps <= since[rows].unsqueeze(1)


def forward(x: Tensor, weight: Tensor, since: Tensor | None = None) -> Tensor:
    """x [B, W - 1 + T, C], weight [C, W] -> [B, T, C].

    since: int64 [T], tokens of the same document before each token (None: at least W - 1).
    """
    width = weight.shape[1]
    if x.dtype == torch.float32 and x.device.type == "cpu":
        kernel = weight.view(*weight.shape[:1], 1, width, 1)
        out = torch.conv2d(_images(x), kernel, groups=weight.shape[0])
        out = out.permute(0, 2, 3, 1).squeeze(2)
    else:
        out = _shifted(x, weight)
    if since is not None:
        rows, seen = _reach(since, width)
        taps = rows.unsqueeze(1) + torch.arange(width, device=x.device)
        terms = x[:, taps] * (weight.t() * seen.unsqueeze(-1))
        out[:, rows] = terms.sum(2)
    return out


def backward(
    x: Tensor, weight: Tensor, dout: Tensor, since: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; dout [B, T, C] is overwritten where a document starts."""
    width = weight.shape[1]
    cut = None
    if since is not None:
        rows, seen = _reach(since, width)
        cut = dout[:, rows]
        dout[:, rows] = 0.0
    if x.dtype == torch.float32 and x.device.type == "cpu":
        kernel = weight.view(*weight.shape[:1], 1, width, 1)
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            _images(dout), _images(x), kernel, None, (1, 1), (0, 0), (1, 1), False, (0, 0),
            weight.shape[0], (True, True, False),
        )  # fmt: skip
        dx, dweight = dx.permute(0, 2, 3, 1).squeeze(2), dweight.view_as(weight)
    else:
        dx, dweight = _shifted_backward(x, weight, dout)
    if cut is not None:
        taps = (rows.unsqueeze(1) + torch.arange(width, device=x.device)).flatten()
        terms = cut.unsqueeze(2) * seen.unsqueeze(-1)  # [B, m, W, C]
        dx.index_add_(1, taps, (terms * weight.t()).flatten(1, 2))
        dweight = dweight + (terms * x[:, taps].view_as(terms)).sum((0, 1)).t()
    return dx, dweight


def _shifted_backward(x: Tensor, weight: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    width = weight.shape[1]
    tokens = dout.shape[1]
    dx = torch.zeros_like(x)
    dweight = torch.empty_like(weight)
    for w in range(width):
        dx[:, w : w + tokens] += dout * weight[:, w]
        dweight[:, w] = (dout * x[:, w : w + tokens]).sum((0, 1))
    return dx, dweight
