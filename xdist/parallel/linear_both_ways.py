"""Linear attention from both ends of a sequence that one device holds, summed in one pass.

Two calls would read q, k and v twice and write two outputs; Triton's kernels make the sum as they
go (xdist_kernels/linear/bidirectional.py). Saved for backward: the inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xdist.comm.first_order import first_order
from xdist.memory.carry import Carry
from xdist.parallel.noted import notes
from xdist.parallel.recurrences.linear import LinearAttention
from xdist.parallel.recurrent import Request
from xdist.shard import SequenceShard
from xdist_kernels.autocast import in_given_dtypes
from xdist_kernels.linear.bidirectional import Sides, backward_merged, run_merged


def both_ways(request: Request, shard: SequenceShard) -> Tensor | None:
    """The sum of both directions [B,n,H,V] of a checked linear attention; None where it is made of
    two calls: on several ranks, with states or a decay for every key dim, of more tokens than a
    tile, and where Triton does not serve.

    request: that of either direction, whose arguments the other one shares.
    """
    op = request.op
    assert isinstance(op, LinearAttention)
    q, k, v, decay = request.inputs
    assert q is not None
    assert k is not None
    assert v is not None
    states = request.want_final or request.initial is not None
    if op.kernel_tile_tokens is None or op.transition == "diagonal" or states:
        return None
    # Its states, one in 256 tokens, all exist at once: two calls go by tiles instead.
    if v.shape[1] > op.kernel_tile_tokens or not _whole(shard, v):
        return None
    starts = shard.once(("starts", v.device), lambda: _starts(shard, v.device))
    found: Tensor = _BothWays.apply(q, k, v, decay, starts, op.scale)
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
    # Kept with the shard, and saved for backward by calls outside inference mode.
    with torch.inference_mode(False):
        marks = torch.zeros(shard.layout.length, dtype=torch.bool)
        marks[cuts] = True
        return marks.to(device)


class _BothWays(torch.autograd.Function):
    """(q, k, v, log_decay [B,n,H,1] or None, starts, scale) -> out."""

    @staticmethod
    @in_given_dtypes
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
