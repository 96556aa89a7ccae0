"""A block of gated linear attention as one explicit pass over tiles.

    xn = norm(x);  u = conv(xn Wqkv^T);  q, k, v = silu(u);  g = logsigmoid(xn Wd^T + b)
    y  = linear_attention(q, k, v, g);   h = x + (norm(y) * silu(xn Wg^T)) Wo^T;   out = h + mlp(h)

Backward comes in two halves, so that the gradient of the state can cross ranks in between: the
outer half goes from the output back to y and hands on dy; the inner half starts from dy and the
gradient of the state after the tile. Everything but x, dy and the states is recomputed per tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xdist.memory.normalise import normalised, normalised_backward
from xdist.memory.tiles import Cuts
from xdist.nn.mlp import MLPPass
from xdist.nn.products import Product
from xdist_kernels.conv import tile as conv
from xdist_kernels.linear import tile as linear


class LinearParameters(NamedTuple):
    """norm [C], qkv [3C, C], conv [3C, W], decay [H, C], decay_bias [H], gate [C, C],
    out_norm [C], out [C, C]; mlp_norm [C], up [F, C], down [C, F]."""

    norm: Tensor
    qkv: Tensor
    conv: Tensor
    decay: Tensor
    decay_bias: Tensor
    gate: Tensor
    out_norm: Tensor
    out: Tensor
    mlp_norm: Tensor
    up: Tensor
    down: Tensor


class _Inputs(NamedTuple):
    """What the recurrence reads, recomputed from a tile of x. W: the convolution's width."""

    xn: Tensor  # [B, W - 1 + T, C]
    projected: Tensor | None  # [B, W - 1 + T, 3C]; None where only the recurrence is wanted
    convolved: Tensor | None  # [B, T, 3C], likewise
    z: Tensor  # [N, chunk, 3C]: q, k, v after SiLU, filled up to whole chunks with zeros
    log_decay: Tensor  # [B, T', H]
    factors: linear.Decays


class LinearPass:
    """One forward or backward pass of a block; dtype is that of the matrix products."""

    def __init__(self, parameters: LinearParameters, dtype: torch.dtype) -> None:
        p = parameters
        self.dtype = dtype
        self.heads = p.decay.shape[0]
        self.width = p.conv.shape[1]
        self.context = self.width - 1
        self.qkv = Product(p.qkv, p.norm, dtype)
        self.gate = Product(p.gate, p.norm, dtype)
        self.decay = Product(p.decay, p.norm, p.decay.dtype)
        self.decay_bias = p.decay_bias
        self.out = Product(p.out, p.out_norm, dtype)
        self.conv = p.conv
        self.mlp = MLPPass((p.mlp_norm, p.up, p.down), dtype)
        self.scale = (p.qkv.shape[1] // self.heads) ** -0.5
        self.dconv = torch.zeros_like(p.conv)
        self.ddecay_bias = torch.zeros_like(p.decay_bias)

    def _inputs(self, xe: Tensor, cuts: Cuts, *, differentiated: bool) -> _Inputs:
        """From a tile with its context, xe [B, W - 1 + T, C]; differentiated: for `backward_inner`.

        Otherwise SiLU works in place: a tile's tensors are wider than a core's cache, and writing
        one that is already there takes a third of the time of a fresh one.
        """
        xn = normalised(xe)
        projected = self.qkv.forward(xn.to(self.dtype)).to(xe.dtype)
        convolved = conv.forward(projected, self.conv, cuts.since)
        if not differentiated:
            del projected
            z, log_decay, factors = self._decayed(xn, F.silu(convolved, inplace=True), cuts)
            return _Inputs(xn, None, None, z, log_decay, factors)
        z, log_decay, factors = self._decayed(xn, F.silu(convolved), cuts)
        return _Inputs(xn, projected, convolved, z, log_decay, factors)

    def _decayed(self, xn: Tensor, z: Tensor, cuts: Cuts) -> tuple[Tensor, Tensor, linear.Decays]:
        """z [B, T, ...] in whole chunks, and the log decays [B, T', H] with their factors."""
        raw = self.decay.forward(xn[:, self.context :])
        log_decay = F.logsigmoid(raw + self.decay_bias)
        starts = cuts.starts
        short = -z.shape[1] % linear.CHUNK
        if short:
            z, log_decay = (F.pad(t, (0, 0, 0, short)) for t in (z, log_decay))
            starts = None if starts is None else F.pad(starts, (0, short))
        dim = xn.shape[2] // self.heads
        factors = linear.decays(log_decay, self.scale, starts, dim=dim)
        rows = z.shape[0] * z.shape[1] // linear.CHUNK
        return z.reshape(rows, linear.CHUNK, z.shape[2]), log_decay, factors

    def _tokens(self, chunks: Tensor, tokens: int, batch: int) -> Tensor:
        """[N, chunk, D] -> [B, T, D] without the zeros that filled the last chunk."""
        return chunks.reshape(batch, -1, chunks.shape[-1])[:, :tokens]

    def zero_state(self, x: Tensor) -> Tensor:
        """The state before a sequence, [B, H, K, V], for x [B, n, C]."""
        dim = x.shape[2] // self.heads
        return x.new_zeros(x.shape[0], self.heads, dim, dim)

    def summary(
        self, xe: Tensor, cuts: Cuts, state: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The state after the tile, and the total log decay [B, H] with the tile's added."""
        # Queries and gates play no part in a summary: only keys and values are projected.
        dim = xe.shape[2]
        xn = normalised(xe)
        projected = (xn.to(self.dtype) @ self.qkv.folded[dim:].t()).to(xe.dtype)
        z = F.silu(conv.forward(projected, self.conv[dim:], cuts.since), inplace=True)
        z, log_decay, factors = self._decayed(xn, z, cuts)
        return linear.summary(z, factors, state), total + log_decay.sum(1)

    def forward(self, xe: Tensor, cuts: Cuts, state: Tensor) -> tuple[Tensor, Tensor]:
        """The block's output [B, T, C] and the state after the tile."""
        x = xe[:, self.context :]
        inputs = self._inputs(xe, cuts, differentiated=False)
        y, states = linear.forward(inputs.z, inputs.factors, state)
        yn = normalised(self._tokens(y, x.shape[1], x.shape[0]))
        gate = self.gate.forward(inputs.xn[:, self.context :].to(self.dtype))
        h = x + self.out.forward((yn * F.silu(gate)).to(self.dtype))
        # A copy: a view would keep the states of all chunks of the tile until backward.
        return self.mlp.forward(h), states[:, :, -1].transpose(0, 1).clone()

    def backward_outer(
        self, xe: Tensor, cuts: Cuts, state: Tensor, dout: Tensor, dstate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Any]:
        """From the output back to y: (dx without the recurrence's part, dy, adjoint, kept).

        state: the one before the tile; dstate: gradient of the state after it, so far as it is
        known here; adjoint is that gradient carried to before the tile. With None instead, the
        last result may be handed to `backward_inner`, which otherwise computes it again.
        """
        x = xe[:, self.context :]
        batch, tokens, _ = x.shape
        inputs = self._inputs(xe, cuts, differentiated=dstate is None)
        chunks, through = linear.forward(inputs.z, inputs.factors, state)
        y = self._tokens(chunks, tokens, batch)
        yn = normalised(y)
        xn = inputs.xn[:, self.context :]
        xn_ = xn.to(self.dtype)
        gate = self.gate.forward(xn_).to(x.dtype)
        opened = F.silu(gate)
        mixed = (yn * opened).to(self.dtype)
        dh = self.mlp.backward(x + self.out.forward(mixed), dout)
        dmixed = self.out.backward(mixed, dh.to(self.dtype)).to(x.dtype)
        dgate = torch.ops.aten.silu_backward(dmixed * yn, gate)
        dxn = self.gate.backward(xn_, dgate.to(self.dtype)).to(x.dtype)
        dx = normalised_backward(x, xn, dxn).add_(dh)
        dy = normalised_backward(y, yn, dmixed.mul_(opened))
        if dstate is None:
            return dx, dy, None, (inputs, through)
        chunks = self._chunks(dy, inputs.z)
        adjoint = linear.adjoint_summary(inputs.z, inputs.factors, chunks, dstate)
        return dx, dy, adjoint, None

    def _chunks(self, dy: Tensor, z: Tensor) -> Tensor:
        """dy [B, T, C] filled up to whole chunks, [N, chunk, C]."""
        short = z.shape[0] * z.shape[1] // dy.shape[0] - dy.shape[1]
        if short:
            dy = F.pad(dy, (0, 0, 0, short))
        return dy.reshape(z.shape[0], z.shape[1], dy.shape[2])

    def backward_inner(
        self,
        xe: Tensor,
        cuts: Cuts,
        state: Tensor,
        dy: Tensor,
        dstate: Tensor,
        kept: tuple[_Inputs, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """From y back to x: the recurrence's part of dxe [B, W - 1 + T, C], and the gradient of
        the state before the tile. dstate: the whole gradient of the state after the tile."""
        batch, tokens = dy.shape[:2]
        if kept is None:
            inputs = self._inputs(xe, cuts, differentiated=True)
            kept = inputs, linear.states(inputs.z, inputs.factors, state)
        inputs, states = kept
        z, factors = inputs.z, inputs.factors
        dz, dlog, dbefore = linear.backward(z, factors, states, self._chunks(dy, z), dstate)
        dz = self._tokens(dz, tokens, batch)
        assert inputs.projected is not None
        assert inputs.convolved is not None
        du = torch.ops.aten.silu_backward.grad_input(dz, inputs.convolved, grad_input=dz)
        dprojected, dconv = conv.backward(inputs.projected, self.conv, du, cuts.since)
        self.dconv += dconv
        xn_ = inputs.xn.to(self.dtype)
        dxn = self.qkv.backward(xn_, dprojected.to(self.dtype)).to(xe.dtype)
        # d logsigmoid(r) = 1 - sigmoid(r) = 1 - exp(log_decay)
        draw = (dlog * (1.0 - inputs.log_decay.exp()))[:, :tokens]
        self.ddecay_bias += draw.sum((0, 1))
        dxn[:, self.context :] += self.decay.backward(inputs.xn[:, self.context :], draw)
        return normalised_backward(xe, inputs.xn, dxn), dbefore

    def gradients(self) -> LinearParameters:
        """The summed gradients, in the order of the parameters."""
        normed = (self.qkv, self.gate, self.decay)
        dqkv, dgate, ddecay = (product.weight_gradient() for product in normed)
        dnorm = sum((product.norm_gradient() for product in normed[1:]), self.qkv.norm_gradient())
        return LinearParameters(
            dnorm, dqkv, self.dconv, ddecay, self.ddecay_bias, dgate,
            self.out.norm_gradient(), self.out.weight_gradient(), *self.mlp.gradients(),
        )  # fmt: skip
