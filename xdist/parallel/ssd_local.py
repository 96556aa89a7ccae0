"""What ssd does token by token: steps times x before the recurrence, the skip behind it.

Written by hand, tile by tile, so that backward keeps only the tensors given, and a sequence in
bfloat16 has no float32 copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xdist.parallel.recurrence import state_dtype
from xdist_kernels.autocast import in_given_dtypes

TILE_TOKENS = 4096


def _tiles(x: Tensor) -> Iterator[slice]:
    for start in range(0, x.shape[1], TILE_TOKENS):
        yield slice(start, start + TILE_TOKENS)


class Values(torch.autograd.Function):
    """(dt [B,n,H] in the states' dtype, x [B,n,H,D]) -> dt x in the dtype of x, rounded once."""

    @staticmethod
    @in_given_dtypes
    def forward(ctx: Any, dt: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(dt, x)
        found = torch.empty_like(x, memory_format=torch.contiguous_format)
        for at in _tiles(x):
            found[:, at] = dt[:, at, :, None] * x[:, at].to(dt.dtype)
        return found

    @staticmethod
    @in_given_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dt, x = ctx.saved_tensors
        wide = dt.dtype
        ddt = torch.empty_like(dt)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        for at in _tiles(x):
            part = grad[:, at].to(wide)
            dx[:, at] = dt[:, at, :, None] * part
            ddt[:, at] = torch.linalg.vecdot(part, x[:, at].to(wide))
        return ddt, dx


class Skip(torch.autograd.Function):
    """(out, x [B,n,H,D], D [H]) -> out + D x in the dtype of out."""

    @staticmethod
    @in_given_dtypes
    def forward(ctx: Any, out: Tensor, x: Tensor, D: Tensor) -> Tensor:
        ctx.save_for_backward(x, D)
        wide = state_dtype((x,))
        found = torch.empty_like(out, memory_format=torch.contiguous_format)
        for at in _tiles(x):
            found[:, at] = out[:, at].to(wide) + D.to(wide)[:, None] * x[:, at].to(wide)
        return found

    @staticmethod
    @in_given_dtypes
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, D = ctx.saved_tensors
        wide = state_dtype((x,))
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dD = torch.zeros(D.shape, dtype=wide, device=D.device)
        for at in _tiles(x):
            part = grad[:, at].to(wide)
            dx[:, at] = D.to(wide)[:, None] * part
            dD += torch.linalg.vecdot(part, x[:, at].to(wide)).sum((0, 1))
        return grad, dx, dD.to(D.dtype)
