"""Linear attention from both ends of a sequence that one device holds, summed in one pass.

Two calls would read q, k and v twice and write two outputs; Triton's kernels make the sum as they
go (xdist_kernels/linear/bidirectional.py). Saved for backward: the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdist.errors import ShapeError
from xdist.memory.carry import Carry
from xdist.parallel.backend import chosen
from xdist.parallel.first_order import first_order
from xdist.parallel.noted import notes
from xdist.shard import SequenceShard
from xdist_kernels import linear
from xdist_kernels.errors import KernelError
from xdist_kernels.linear.bidirectional import Sides, backward_merged, run_merged


def both_ways(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    **states: Any,
) -> Tensor | None:
    """The sum of both directions [B,n,H,V]; None where it is made of two calls: on several ranks,
    with states or a decay for every key dim, and where Triton does not serve.

    Raises:
        ShapeError: shapes that do not fit.
        StrategyError: Triton is forced and cannot serve.
    """
    try:
        linear.check(q, k, v, log_decay)
    except KernelError as error:
        raise ShapeError(
            "linear_attention was given tensors that do not fit", str(error)
        ) from error
    decay = None if log_decay is None else log_decay.to(linear.state_dtype(q))
    decay = linear.canonical_decay(decay, v, q.shape[3])
    name = chosen("linear_attention", backend, v, lambda: linear.refusal(q, k, v, decay))
    apart = any(x is not None and x is not False for x in states.values())
    gate = decay is None or decay.shape[3] == 1
    if name != "triton" or apart or not gate or not _whole(shard, v):
        return None
    scale = q.shape[3] ** -0.5 if scale is None else scale
    found: Tensor = _BothWays.apply(q, k, v, decay, _starts(shard, v.device), scale)
    return found


def _whole(shard: SequenceShard, v: Tensor) -> bool:
    """Whether this device holds the sequence, in order, and is asked for values."""
    if isinstance(shard, Carry) or shard.group is not None or notes() is not None:
        return False
    return list(shard.layout.segments(0)) == [(0, v.shape[1])]


def _starts(shard: SequenceShard, device: torch.device) -> Tensor | None:
    """Bool [n], True where a document starts behind the first token."""
    cuts = [cut for cut in shard.documents.cu_seqlens if 0 < cut < shard.layout.length]
    if not cuts:
        return None
    marks = torch.zeros(shard.layout.length, dtype=torch.bool)
    marks[cuts] = True
    return marks.to(device)


class _BothWays(torch.autograd.Function):
    """(q, k, v, log_decay [B,n,H,1] or None, starts, scale) -> out."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        starts: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, log_decay, starts)
        ctx.scale = scale
        return run_merged(q, k, v, log_decay, starts, _nothing(k, v), scale=scale)[0]

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, starts = ctx.saved_tensors
        none = _nothing(k, v)
        grads, _ = backward_merged(q, k, v, log_decay, starts, none, dout, none, scale=ctx.scale)
        return (*grads, None, None)


def _nothing(k: Tensor, v: Tensor) -> Sides:
    """No state before the first token nor behind the last."""
    shape = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    zero = v.new_zeros(shape, dtype=torch.float32)
    return Sides(zero, zero)
