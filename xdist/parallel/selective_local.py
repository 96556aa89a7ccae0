"""What a selective scan does token by token: steps before it, skip and gate behind it.

Written by hand so that backward keeps no tensor of its own: the steps' gradient comes from the
steps themselves, which the recurrence keeps anyway, and the gate is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from xdist_kernels.autocast import in_given_dtypes

TILE_TOKENS = 4096
# Beyond this torch's softplus is the identity, in value and gradient.
LINEAR_ABOVE = 20.0


@dataclass(frozen=True)
class Local:
    """What `xdist.selective_scan` is given beside the recurrence's inputs."""

    D: Tensor | None = None  # [C]
    z: Tensor | None = None  # [B, n, C]
    delta_bias: Tensor | None = None  # [C]
    delta_softplus: bool = False

    def steps(self, delta: Tensor) -> Tensor:
        """delta as the recurrence takes it: a softplus in less than float32 would lose steps."""
        if self.delta_bias is None and not self.delta_softplus:
            return delta
        wide = _wide(delta)
        if not self.delta_softplus:
            assert self.delta_bias is not None
            return delta.to(wide) + self.delta_bias.to(wide)
        found: Tensor = _Steps.apply(delta, self.delta_bias)
        return found

    def finish(self, u: Tensor, out: Tensor) -> Tensor:
        """(out + D u) * silu(z), [B, n, C], rounded once."""
        if self.D is None and self.z is None:
            return out
        found: Tensor = _Finish.apply(out, u, self.D, self.z)
        return found


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tiles(x: Tensor) -> Iterator[slice]:
    for start in range(0, x.shape[1], TILE_TOKENS):
        yield slice(start, start + TILE_TOKENS)


class _Steps(torch.autograd.Function):
    """(delta, bias or None) -> softplus(delta + bias) in float32 or wider."""

    @staticmethod
    @in_given_dtypes
    def forward(ctx: Any, delta: Tensor, bias: Tensor | None) -> Tensor:
        wide = _wide(delta)
        found = softplus(delta.to(wide) if bias is None else delta.to(wide) + bias.to(wide))
        ctx.dtype, ctx.bias_dtype = delta.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(found)
        return found

    @staticmethod
    @in_given_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        (steps,) = ctx.saved_tensors
        # softplus'(x) = sigmoid(x) = 1 - e^{-softplus(x)}
        slope = steps.neg().expm1_().neg_().masked_fill_(steps > LINEAR_ABOVE, 1.0)
        found = slope.mul_(grad)
        dbias = None if ctx.bias_dtype is None else found.sum((0, 1)).to(ctx.bias_dtype)
        return found.to(ctx.dtype), dbias


class _Finish(torch.autograd.Function):
    """(out, u, D or None, z or None) -> (out + D u) * silu(z) in the dtype of out."""

    @staticmethod
    @in_given_dtypes
    def forward(ctx: Any, out: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
        found = torch.empty_like(out, memory_format=torch.contiguous_format)
        for at in _tiles(out):
            total = _before_gate(out[:, at], u[:, at], D)
            found[:, at] = total if z is None else total * silu(z[:, at].to(total.dtype))
        # Without a gate the gradients need neither of the two.
        ctx.save_for_backward(None if z is None else out, None if D is None else u, D, z)
        ctx.dtypes = (out.dtype, u.dtype)
        return found

    @staticmethod
    @in_given_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, u, D, z = ctx.saved_tensors
        wide = _wide(grad)
        of_out, of_u = ctx.dtypes
        dout = torch.empty(grad.shape, dtype=of_out, device=grad.device)
        du = None if D is None else torch.empty(grad.shape, dtype=of_u, device=grad.device)
        dD = None if D is None else torch.zeros(D.shape, dtype=wide, device=grad.device)
        dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
        for at in _tiles(grad):
            part = grad[:, at].to(wide)
            if dz is not None:
                own = z[:, at].to(wide)
                gate = own.sigmoid()
                total = _before_gate(out[:, at], None if u is None else u[:, at], D)
                dz[:, at] = part * total * gate * (1 + own * (1 - gate))
                part = part * own * gate
            dout[:, at] = part
            if du is not None and dD is not None:
                du[:, at] = part * D.to(wide)
                dD += (part * u[:, at]).sum((0, 1))
        return dout, du, None if dD is None else dD.to(D.dtype), dz


def _before_gate(out: Tensor, u: Tensor | None, D: Tensor | None) -> Tensor:
    wide = _wide(out)
    if D is None or u is None:
        return out.to(wide)
    return torch.addcmul(out.to(wide), u.to(wide), D.to(wide))
