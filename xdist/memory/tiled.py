"""A token-wise layer (an MLP, a head) applied tile by tile: memory of one tile, not of all tokens.

    kept for backward   x [B, n, C], nothing else
    working memory      the layer's own for `tile_tokens` tokens, in forward and in backward
    what moves          nothing: each token stands alone

The method of ALST's TiledMLP (Bekman et al. 2025, section 3.1), with the parameters' gradients
summed in float32 (float64 for float64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xdist.comm.first_order import first_order
from xdist.errors import ShapeError
from xdist_kernels.autocast import Autocast, autocast_again

TILE_TOKENS = 4096


def tiled(layer: nn.Module, x: Tensor, *, tile_tokens: int = TILE_TOKENS) -> Tensor:
    """`layer(x)` for x [B, n, C], where each token's output depends on that token alone.

    tile_tokens: tokens of a tile in one row of the batch; layer must not draw random numbers.
    Returns [B, n, D] for a layer from C to D channels.

    Raises:
        ShapeError: x is not [B, n, C], or tile_tokens < 1.
    """
    if x.dim() != 3 or tile_tokens < 1:
        raise ShapeError(
            "tiled() cannot cut this input into tiles of tokens",
            f"x has shape {tuple(x.shape)}, tile_tokens is {tile_tokens}",
            "pass x as [B, n, C] and tile_tokens of at least 1",
        )
    return _Tiled.apply(layer, tile_tokens, x, *layer.parameters())


def _slices(n: int, tokens: int) -> list[slice]:
    # An empty share still goes through the layer once, so that its output has the right width.
    return [slice(start, min(start + tokens, n)) for start in range(0, max(n, 1), tokens)]


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: nn.Module, tokens: int, x: Tensor, *held: Tensor) -> Tensor:
        ctx.layer, ctx.tokens, ctx.autocast = layer, tokens, Autocast.now(x)
        ctx.save_for_backward(x, *held)
        out: Tensor | None = None
        for tile in _slices(x.shape[1], tokens):
            part = layer(x[:, tile])
            if out is None:
                out = part.new_empty(*x.shape[:2], part.shape[2])
            out[:, tile] = part
        assert out is not None
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *held = ctx.saved_tensors
        wanted = [p for p in held if p.requires_grad]
        sums = [torch.zeros(p.shape, dtype=_wide(p), device=p.device) for p in wanted]
        dx = torch.empty_like(x)
        for tile in _slices(x.shape[1], ctx.tokens):
            with torch.enable_grad(), autocast_again(ctx.autocast):
                own = x[:, tile].detach().requires_grad_()
                out = ctx.layer(own)
            parts = torch.autograd.grad(out, (own, *wanted), grad[:, tile], allow_unused=True)
            dx[:, tile] = parts[0]
            for total, part in zip(sums, parts[1:], strict=True):
                if part is not None:
                    total += part
        found = iter([s.to(p.dtype) for s, p in zip(sums, wanted, strict=True)])
        gradients = [next(found) if p.requires_grad else None for p in held]
        return (None, None, dx if ctx.needs_input_grad[2] else None, *gradients)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
