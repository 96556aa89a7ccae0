"""Linear attention over a sharded sequence: its checks and its request."""

from __future__ import annotations

from torch import Tensor

from xdist.comm.checks import checks_are_on
from xdist.errors import ShapeError
from xdist.parallel.backend import chosen
from xdist.parallel.recurrences.linear import LinearAttention
from xdist.parallel.recurrent import Request, check_values
from xdist.shard import SequenceShard
from xdist_kernels import linear
from xdist_kernels.errors import KernelError


def request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Request:
    """`xdist.linear_attention` with the shard resolved, checked; see there."""
    try:
        linear.check(q, k, v, log_decay)
    except KernelError as error:
        raise ShapeError(
            "linear_attention was given tensors that do not fit", str(error)
        ) from error
    if checks_are_on():
        highest = float(log_decay.max()) if log_decay is not None and log_decay.numel() else 0.0
        check_values(
            "linear_attention", shard, (q, k, v, log_decay, initial_state), highest > 0,
            "log_decay at most 0", highest_log_decay=highest,
        )  # fmt: skip
    scale = q.shape[3] ** -0.5 if scale is None else scale
    decay = None if log_decay is None else log_decay.to(linear.state_dtype(q))
    decay = linear.canonical_decay(decay, v, q.shape[3])
    inputs = (q, k, v, decay)
    backend = chosen("linear_attention", backend, v, lambda: linear.refusal(*inputs))
    return Request(
        "linear_attention",
        LinearAttention.of(inputs, scale, backend),
        inputs,
        initial_state,
        output_final_state,
        reverse,
    )
