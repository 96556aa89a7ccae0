"""Per-layer checkpointing that repeats no exchange.

    policy            the layer's input and everything its exchanges received are kept; the rest
                      is computed again in backward
    what moves again  nothing: a recompute takes the received tensors from the kept ones
    kept bytes        input + received bytes of the layer's forward (the ledger's number)

torch's own checkpoint would send again in every recompute, and its early stop could skip an
exchange on one rank that another makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xdist.comm import keep
from xdist.comm.first_order import first_order
from xdist_kernels.autocast import Autocast, autocast_again


def checkpoint(layer: nn.Module | Callable[..., Tensor], x: Tensor, *rest: Any) -> Tensor:
    """`layer(x, *rest)`, keeping x and the received data; layer must not draw random numbers.

    layer: a module (its parameters get their gradients), or a function without parameters; rest
    is handed on and gets no gradient (a shard, for example). Returns one tensor.
    """
    parameters = list(layer.parameters()) if isinstance(layer, nn.Module) else []
    return _Checkpoint.apply(layer, rest, x, *parameters)


class _Checkpoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: Any, rest: tuple[Any, ...], x: Tensor, *held: Tensor) -> Tensor:
        with keep.recording() as tape:
            out = layer(x, *rest)
        ctx.layer, ctx.rest, ctx.tape, ctx.autocast = layer, rest, tape, Autocast.now(x)
        ctx.save_for_backward(x, *held)
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, *held = ctx.saved_tensors
        with torch.enable_grad():
            again = x.detach().requires_grad_(x.requires_grad)
            with keep.replaying(ctx.tape), autocast_again(ctx.autocast):
                out = ctx.layer(again, *ctx.rest)
        wanted = [t for t in (again, *held) if t.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
        gradients = [next(found) if t.requires_grad else None for t in (again, *held)]
        return (None, None, *gradients)
