"""Recurrences over a sharded sequence: checks, the choice of a strategy, and the call.

Strategies: `scan` (recurrent_scan.py) moves states, `switch` (recurrent_switch.py) moves tokens.
`auto` takes the one that sends fewer bytes in forward and backward together, summed over ranks: a
pure function of shapes, layout and documents, the same on every rank. The logger `xdist` says at
level DEBUG what it chose.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import Tensor

from xdist.comm.checks import checks_are_on, raise_together
from xdist.comm.scan import Transition
from xdist.cost import recurrent as cost
from xdist.errors import NumericsError, ShapeError, StrategyError
from xdist.parallel.recurrent_heads import HeadExchange
from xdist.parallel.recurrent_op import LinearAttention, Local, RecurrentOp
from xdist.parallel.recurrent_scan import ScanRecurrence, ScanRequest
from xdist.parallel.recurrent_segments import Segments
from xdist.parallel.recurrent_switch import SwitchRecurrence, SwitchRequest
from xdist.shard import SequenceShard
from xdist_kernels import linear
from xdist_kernels.errors import KernelError

STRATEGIES = ("auto", "scan", "switch")
_log = logging.getLogger("xdist")


@dataclass(frozen=True)
class States:
    """What a call says of states: initial ones given, final ones wanted."""

    initial: Tensor | None = None
    want_final: bool = False


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    shard: SequenceShard,
    *,
    scale: float | None,
    states: States,
    strategy: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """`xdist.linear_attention` with the shard resolved; see there."""
    if strategy not in STRATEGIES:
        raise StrategyError(
            f"linear_attention has no strategy {strategy!r}", "", f"use one of {STRATEGIES}"
        )
    try:
        linear.check(q, k, v, log_decay)
    except KernelError as error:
        raise ShapeError(
            "linear_attention was given tensors that do not fit", str(error)
        ) from error
    if v.shape[1] != shard.local_length:
        raise ShapeError(
            "linear_attention needs this rank's share of the sequence",
            f"the tensors have {v.shape[1]} tokens, the shard has {shard.local_length}",
            "pass shard.scatter(x), or the shard these tensors were made for",
        )
    if checks_are_on():
        _check_values(q, k, v, log_decay, shard)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    decay = None if log_decay is None else log_decay.to(linear.state_dtype(q))
    local = (q, k, v, linear.canonical_decay(decay, v, q.shape[3]))
    kind = _transition(local[3])
    problem = cost.Problem(
        layout=shard.layout,
        documents=shard.documents,
        batch=v.shape[0],
        value_heads=v.shape[2],
        key_heads=q.shape[2],
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        transition=kind,
        element_bytes=v.element_size(),
        want_final=states.want_final,
    )
    op = LinearAttention(scale, kind)
    return run_recurrence(op, local, shard, states, _chosen(problem, strategy))


def _transition(log_decay: Tensor | None) -> Transition:
    """The kind of M for a canonical log_decay."""
    if log_decay is None:
        return "none"
    return "scalar" if log_decay.shape[3] == 1 else "diagonal"


def _chosen(problem: cost.Problem, strategy: str) -> str:
    if strategy != "auto":
        return strategy
    choice = cost.choose(problem)
    _log.debug("linear_attention: %s", choice)
    return choice.strategy


def _check_values(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, shard: SequenceShard
) -> None:
    """Under `xdist.checks()`: inputs finite and log_decay at most 0, one error on all ranks."""
    finite = all(bool(x.isfinite().all()) for x in (q, k, v))
    highest = 0.0
    if log_decay is not None and log_decay.numel():
        finite = finite and bool(log_decay.isfinite().all())
        highest = float(log_decay.max())
    raise_together(
        shard.group,
        not finite or highest > 0,
        lambda ranks: NumericsError(
            "linear_attention needs finite inputs and log_decay at most 0",
            f"sequence ranks {ranks} hold others (largest log_decay here: {highest:g})",
            "make log_decay with logsigmoid or -softplus, and look for NaN upstream",
        ),
    )


def run_recurrence(
    op: RecurrentOp, local: Local, shard: SequenceShard, states: States, strategy: str
) -> Tensor | tuple[Tensor, Tensor]:
    """`op` over the sequence of which `local` is this rank's share; out, or (out, final states).

    States are [B,H,K,V], or [B,documents,H,K,V] where the shard was given documents. `strategy`
    is scan or switch; one rank has nothing to move and runs its segments one after another.
    """
    documents = shard.documents
    initial = _initial(op, local, shard, states.initial)
    starting = initial
    if starting is None and states.want_final:
        batch, *rest = op.state_shape(local)
        like = op.out_like(local)
        starting = like.new_zeros(batch, documents.count, *rest, dtype=linear.state_dtype(like))
    if strategy == "switch" and shard.group is not None:
        exchange = HeadExchange(shard.layout, shard.rank, shard.group)
        request = SwitchRequest(op, exchange, documents, states.want_final)
        out, final = SwitchRecurrence.apply(request, starting, initial, *local)
    else:
        plan = Segments(shard.layout, documents, shard.rank)
        scan = ScanRequest(op, plan, shard.group, states.want_final)
        out, final = ScanRecurrence.apply(scan, starting, initial, *local)
    if not states.want_final:
        return out
    return out, final if shard.packed else final.squeeze(1)


def _initial(
    op: RecurrentOp, local: Local, shard: SequenceShard, initial: Tensor | None
) -> Tensor | None:
    """The initial states as [B,documents,H,K,V] in the states' dtype."""
    if initial is None:
        return None
    batch, *rest = op.state_shape(local)
    wanted = (batch, shard.documents.count, *rest) if shard.packed else (batch, *rest)
    if tuple(initial.shape) != wanted:
        axes = "[B, documents, H, K, V]" if shard.packed else "[B, H, K, V]"
        raise ShapeError(
            f"initial_state must be {axes} = {list(wanted)}", f"got {list(initial.shape)}"
        )
    initial = initial.to(linear.state_dtype(op.out_like(local)))
    return initial if shard.packed else initial.unsqueeze(1)
