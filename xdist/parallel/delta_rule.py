"""The delta rule over a sharded sequence: its checks and its request."""

from __future__ import annotations

from torch import Tensor

from xdist.comm.checks import checks_are_on
from xdist.errors import ShapeError, StrategyError
from xdist.parallel.backend import chosen
from xdist.parallel.recurrence import state_dtype
from xdist.parallel.recurrences.delta import DeltaRule
from xdist.parallel.recurrent import Request, check_values
from xdist.shard import SequenceShard
from xdist_kernels import delta
from xdist_kernels.errors import KernelError

PRECISIONS = ("ieee", "tf32x3")


def request(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    shard: SequenceShard,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
    precision: str = "ieee",
) -> Request:
    """`xdist.delta_rule` with the shard resolved, checked; see there."""
    try:
        delta.check(q, k, v, beta, log_decay)
    except KernelError as error:
        raise ShapeError("delta_rule was given tensors that do not fit", str(error)) from error
    if checks_are_on():
        _check_values(q, k, v, beta, log_decay, initial_state, shard)
    wide = state_dtype((q,))
    fixed = log_decay is not None and log_decay.dim() == 1
    if log_decay is not None:
        log_decay = log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(-1)
        log_decay = log_decay.to(wide)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    backend = chosen(
        "delta_rule",
        backend,
        v,
        lambda: delta.refusal(
            q, k, v, beta, log_decay.expand(*beta.shape, 1) if fixed and log_decay is not None
            else log_decay,
        ),
    )  # fmt: skip
    _check_precision(precision, backend)
    return Request(
        "delta_rule",
        DeltaRule(scale, fixed=fixed, backend=backend, precision=precision),
        (q, k, v, beta.unsqueeze(-1).to(wide), log_decay),
        initial_state,
        output_final_state,
        reverse,
    )


def _check_precision(precision: str, backend: str) -> None:
    if precision not in PRECISIONS:
        raise StrategyError(
            f"delta_rule has no precision {precision!r}", "", f"use one of {PRECISIONS}"
        )
    if precision != "ieee" and backend != "triton":
        raise StrategyError(
            f"delta_rule cannot take precision {precision!r} here",
            f"the call runs on {backend}, which multiplies in full",
            "leave precision at 'ieee', or run it on Triton kernels",
        )


def _check_values(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    shard: SequenceShard,
) -> None:
    """Under `xdist.checks()`: outside [0, 2] a token's transition grows what it should forget."""
    lowest, highest = (float(x) for x in beta.aminmax()) if beta.numel() else (0.0, 0.0)
    decay = float(log_decay.max()) if log_decay is not None and log_decay.numel() else 0.0
    check_values(
        "delta_rule",
        shard,
        (q, k, v, beta, log_decay, initial_state),
        lowest < 0 or highest > 2 or decay > 0,
        "0 <= beta <= 2 and log_decay at most 0",
        lowest_beta=lowest,
        highest_beta=highest,
        highest_log_decay=decay,
    )
