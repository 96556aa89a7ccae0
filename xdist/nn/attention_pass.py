"""A block of causal sliding-window attention as one explicit pass over tiles.

    xn = norm(x);  q, k, v = xn Wqkv^T;  y = window_attention(q, k, v)
    h  = x + y Wo^T;   out = h + mlp(h)

A tile is read with `window` tokens before it, whose keys and values are computed again: the halo
of the layer is a halo of x, and nothing but x is kept for backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xdist.memory.normalise import normalised, normalised_backward
from xdist.memory.tiles import Cuts
from xdist.nn.mlp import MLPPass
from xdist.nn.products import Product
from xdist_kernels.attention.window import window_attention_backward, window_attention_forward


class AttentionParameters(NamedTuple):
    """norm [C], q [C, C], kv [2C, C], out [C, C]; mlp_norm [C], up [F, C], down [C, F]."""

    norm: Tensor
    q: Tensor
    kv: Tensor
    out: Tensor
    mlp_norm: Tensor
    up: Tensor
    down: Tensor


class AttentionPass:
    """One forward or backward pass of a block; dtype is that of the matrix products."""

    def __init__(
        self, parameters: AttentionParameters, heads: int, window: int, dtype: torch.dtype
    ) -> None:
        p = parameters
        self.dtype = dtype
        self.heads = heads
        self.context = window
        self.q = Product(p.q, p.norm, dtype)
        self.kv = Product(p.kv, p.norm, dtype)
        self.out = Product(p.out, None, dtype)
        self.mlp = MLPPass((p.mlp_norm, p.up, p.down), dtype)

    def _attend(self, xe: Tensor, cuts: Cuts) -> tuple[Tensor, ...]:
        """xn of the tile with its context, q, k, v, out [B, T, H, D] and lse [B, T, H]."""
        xn = normalised(xe)
        xn_ = xn.to(self.dtype)
        q = self.q.forward(xn_[:, self.context :]).unflatten(-1, (self.heads, -1))
        kv = self.kv.forward(xn_).unflatten(-1, (2, self.heads, -1))
        k, v = kv.unbind(2)
        y, lse = window_attention_forward(
            q, k, v, window_left=self.context, first_visible=self._first_visible(cuts)
        )
        return xn, q, k, v, y, lse

    def _first_visible(self, cuts: Cuts) -> Tensor | None:
        if cuts.since is None:
            return None
        own = torch.arange(cuts.since.shape[0], device=cuts.since.device) + self.context
        return own - cuts.since.clamp(max=self.context)

    def forward(self, xe: Tensor, cuts: Cuts) -> Tensor:
        """The block's output [B, T, C] for a tile with its context, xe [B, window + T, C]."""
        y = self._attend(xe, cuts)[4]
        h = xe[:, self.context :] + self.out.forward(y.flatten(2))
        return self.mlp.forward(h)

    def backward(self, xe: Tensor, cuts: Cuts, dout: Tensor) -> Tensor:
        """Gradient of xe [B, window + T, C] from that of the output [B, T, C]."""
        xn, q, k, v, y, lse = self._attend(xe, cuts)
        x = xe[:, self.context :]
        mixed = y.flatten(2)
        dh = self.mlp.backward(x + self.out.forward(mixed), dout)
        dy = self.out.backward(mixed, dh.to(self.dtype)).unflatten(-1, (self.heads, -1))
        dq, dk, dv = window_attention_backward(
            q, k, v, y, lse, dy,
            window_left=self.context, first_visible=self._first_visible(cuts),
        )  # fmt: skip
        xn_ = xn.to(self.dtype)
        dkv = torch.stack([dk, dv], 2).flatten(2).to(self.dtype)
        dxn = self.kv.backward(xn_, dkv).to(xe.dtype)
        dxn[:, self.context :] += self.q.backward(xn_[:, self.context :], dq.flatten(2))
        dxe = normalised_backward(xe, xn, dxn)
        dxe[:, self.context :] += dh
        return dxe

    def gradients(self) -> AttentionParameters:
        """The summed gradients, in the order of the parameters."""
        dnorm = self.q.norm_gradient() + self.kv.norm_gradient()
        dq, dkv = self.q.weight_gradient(), self.kv.weight_gradient()
        dmlp_norm, dup, ddown = self.mlp.gradients()
        dout = self.out.weight_gradient()
        return AttentionParameters(dnorm, dq, dkv, dout, dmlp_norm, dup, ddown)
