"""State-space duality (Mamba-2) over a sharded sequence: its checks and its request.

It is linear attention with q = C, k = B, v = dt x, log_decay = dt A and scale 1; the skip D x is
local to a token.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from xdist.comm.checks import checks_are_on
from xdist.errors import ShapeError
from xdist.parallel.backend import chosen
from xdist.parallel.recurrence import state_dtype
from xdist.parallel.recurrences.linear import LinearAttention
from xdist.parallel.recurrent import Request, Result, check_values
from xdist.parallel.ssd_local import Skip, Values
from xdist.shard import SequenceShard
from xdist_kernels import linear


def request(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    shard: SequenceShard,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Request:
    """`xdist.ssd` with the shard resolved, checked; see there."""
    _check(x, dt, A, B, C, D)
    _check_state(x, B, initial_state, shard)
    if checks_are_on():
        _check_values(x, dt, A, B, C, D, initial_state, shard)
    wide = state_dtype((x,))
    # The decay of a long run is a sum of these: never in less than float32.
    steps = dt.to(wide)
    log_decay = (steps * A.to(wide))[..., None]
    backend = chosen("ssd", backend, x, lambda: linear.refusal(C, B, x, log_decay))
    return Request(
        "ssd",
        LinearAttention(1.0, "scalar", backend),
        (C, B, Values.apply(steps, x), log_decay),
        initial_state,
        output_final_state,
        reverse,
        partial(_finish, x, D),
    )


def _finish(x: Tensor, D: Tensor | None, result: Result) -> Result:
    """The skip."""
    if D is None:
        return result
    if isinstance(result, tuple):
        return Skip.apply(result[0], x, D), result[1]
    out: Tensor = Skip.apply(result, x, D)
    return out


def _check(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise ShapeError(
            "ssd: x must be [B,n,H,D] and B and C [B,n,G,N]",
            f"got x {list(x.shape)}, B {list(B.shape)}, C {list(C.shape)}",
        )
    tokens, heads = list(x.shape[:2]), x.shape[2]
    wanted = {
        "dt": (dt, "[B,n,H]", [*tokens, heads]),
        "A": (A, "[H]", [heads]),
        "B": (B, "[B,n,G,N]", [*tokens, *B.shape[2:]]),
        "C": (C, "[B,n,G,N], as B,", list(B.shape)),
        "D": (D, "[H]", [heads]),
    }
    for name, (given, axes, shape) in wanted.items():
        if given is not None and list(given.shape) != shape:
            raise ShapeError(
                f"ssd: {name} must be {axes} = {shape} beside x [B,n,H,D] = {list(x.shape)}",
                f"got {list(given.shape)}",
            )
    groups = B.shape[2]
    if heads % max(1, groups) or bool(groups) != bool(heads):
        raise ShapeError(
            "ssd: the heads of x must be a multiple of the groups of B and C",
            f"{heads} heads, {groups} groups",
        )
    kinds = {"x": x.dtype, "dt": dt.dtype, "A": A.dtype, "B": B.dtype, "C": C.dtype}
    floating = all(kind.is_floating_point for kind in kinds.values())
    if not floating or not x.dtype == B.dtype == C.dtype:
        raise ShapeError(
            "ssd needs floating point inputs, x, B and C of one dtype",
            ", ".join(f"{name} {kind}" for name, kind in kinds.items()),
        )


def _check_state(x: Tensor, B: Tensor, initial: Tensor | None, shard: SequenceShard) -> None:
    if initial is None:
        return
    count = (shard.documents.count,) if shard.packed else ()
    wanted = [x.shape[0], *count, x.shape[2], B.shape[3], x.shape[3]]
    if list(initial.shape) != wanted:
        axes = "[B, documents, H, N, D]" if shard.packed else "[B, H, N, D]"
        raise ShapeError(
            f"ssd: initial_state must be {axes} = {wanted}", f"got {list(initial.shape)}"
        )


def _check_values(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    shard: SequenceShard,
) -> None:
    least = float(dt.min()) if dt.numel() else 1.0
    highest = float(A.max()) if A.numel() else -1.0
    check_values(
        "ssd",
        shard,
        (x, dt, A, B, C, D, initial),
        least <= 0 or highest > 0,
        "dt above 0 and A at most 0",
        least_dt=least,
        highest_A=highest,
    )
