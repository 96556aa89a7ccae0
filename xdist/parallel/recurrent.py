"""Recurrences over a sharded sequence: the choice of a strategy, states, and the call.

Strategies: `scan` (recurrent_scan.py) moves states, `switch` (recurrent_switch.py) moves tokens.
`auto` takes the one that sends fewer bytes in forward and backward together, summed over ranks: a
pure function of shapes, layout and documents, the same on every rank. The logger `xdist` says at
level DEBUG what it chose. An op's own checks stand beside its request (linear_attention.py, ...).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from xdist.comm.checks import raise_together
from xdist.cost import recurrent as cost
from xdist.cost.scan import check_algorithm
from xdist.errors import NumericsError, ShapeError, StrategyError
from xdist.memory.carry import Carry
from xdist.parallel.carried import carried_recurrence
from xdist.parallel.noted import Noted, notes
from xdist.parallel.recurrence import Inputs, Recurrence, state_dtype
from xdist.parallel.recurrent_call import Call
from xdist.parallel.recurrent_heads import HeadExchange
from xdist.parallel.recurrent_scan import ScanRecurrence, ScanRequest
from xdist.parallel.recurrent_switch import SwitchRecurrence, SwitchRequest
from xdist.parallel.recurrent_tiles import Share
from xdist.shard import SequenceShard

STRATEGIES = ("auto", "scan", "switch")
ALGORITHMS = ("auto", "gather", "chain", "pipelined")
Result = Tensor | tuple[Tensor, Tensor]
_log = logging.getLogger("xdist")


def _as_is(result: Result) -> Result:
    return result


@dataclass(frozen=True)
class Request:
    """One checked call. `initial` [B,H,K,V], or [B,documents,H,K,V] where the shard was given
    documents; reverse: from the last token to the first; finish: turns out, or (out, final), into
    what the public function returns."""

    name: str
    op: Recurrence
    inputs: tuple[Tensor | None, ...]
    initial: Tensor | None = None
    want_final: bool = False
    reverse: bool = False
    finish: Callable[[Result], Result] = field(default=_as_is)


def run(request: Request, shard: SequenceShard, *, strategy: str, algorithm: str) -> Result:
    """One recurrence over the sequence of which its inputs are this rank's share."""
    return run_together([request], shard, strategy=strategy, algorithm=algorithm)[0]


def run_together(
    requests: Sequence[Request], shard: SequenceShard, *, strategy: str, algorithm: str
) -> list[Result]:
    """Several recurrences over one sequence, with one exchange of states between them.

    One rank has nothing to move and runs its segments one after another. A chunk (memory/carry.py)
    goes from the state it carries.

    Raises:
        StrategyError: no such strategy or algorithm, or an algorithm beside strategy switch.
        ShapeError: inputs of another length than the shard's, or states of another shape.
    """
    check_requests(requests, shard, strategy=strategy, algorithm=algorithm)
    if isinstance(shard, Carry):
        return [carried_recurrence(request, shard) for request in requests]
    noted = notes()
    if noted is not None:
        problems = tuple(problem_of(request, shard, algorithm) for request in requests)
        noted.append(Noted(problems, "scan" if algorithm != "auto" else strategy))
        return [request.finish(_without_values(request, shard)) for request in requests]
    chosen = _chosen(requests, shard, strategy, algorithm)
    calls, tensors = [], []
    for request in requests:
        share = Share(shard.layout, shard.documents, shard.rank, request.reverse)
        calls.append(Call(request.op, share, request.want_final, len(request.inputs)))
        initial = _initial(request, shard)
        tensors += [_starting(request, shard, initial), initial, *request.inputs]
    if chosen == "switch" and shard.group is not None:
        exchange = HeadExchange(shard.layout, shard.rank, shard.group)
        found = SwitchRecurrence.apply(SwitchRequest(tuple(calls), exchange), *tensors)
    else:
        found = ScanRecurrence.apply(ScanRequest(tuple(calls), shard.group, algorithm), *tensors)
    results = []
    for number, request in enumerate(requests):
        out, final = found[2 * number : 2 * number + 2]
        if request.want_final:
            results.append(request.finish((out, final if shard.packed else final.squeeze(1))))
        else:
            results.append(request.finish(out))
    return results


def check_requests(
    requests: Sequence[Request], shard: SequenceShard, *, strategy: str, algorithm: str
) -> None:
    """Raises what `run_together` would raise of them."""
    _check_strategy(requests[0].name, strategy, algorithm)
    for request in requests:
        check_algorithm(algorithm, request.op.transition)
        _check_length(request, shard)
        _check_sizes(request)


def _without_values(request: Request, shard: SequenceShard) -> Result:
    """Outputs, and the final state, of the right shapes."""
    op, inputs = request.op, request.inputs
    like = next(x for x in inputs if x is not None)
    batch, heads, *state = op.state_shape(inputs)
    shape = (batch, shard.local_length, heads, op.value_dim(inputs))
    out = like.new_empty(shape, dtype=op.output_dtype(inputs))
    if not request.want_final:
        return out
    documents = (shard.documents.count,) if shard.packed else ()
    final = like.new_empty((batch, *documents, heads, *state), dtype=state_dtype(inputs))
    return out, final


def problem_of(request: Request, shard: SequenceShard, algorithm: str = "auto") -> cost.Problem:
    """The call as the cost formulas see it."""
    op, inputs = request.op, request.inputs
    batch, heads, key_dim, value_dim = op.state_shape(inputs)
    moved = tuple(
        cost.TokenInput(x.shape[2], x.shape[3], x.element_size())
        for index, x in enumerate(inputs)
        if x is not None and index not in op.whole
    )
    lone = op.rates_of(inputs) is not None
    return cost.Problem(
        layout=shard.layout,
        documents=shard.documents,
        batch=batch,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        out_dim=op.value_dim(inputs),
        transition="scalar" if lone else op.transition,
        element_bytes=op.output_dtype(inputs).itemsize,
        inputs=moved,
        want_final=request.want_final,
        reverse=request.reverse,
        algorithm=algorithm,
    )


def _check_strategy(name: str, strategy: str, algorithm: str) -> None:
    if strategy not in STRATEGIES:
        raise StrategyError(f"{name} has no strategy {strategy!r}", "", f"use one of {STRATEGIES}")
    if algorithm not in ALGORITHMS:
        raise StrategyError(
            f"{name} has no scan algorithm {algorithm!r}", "", f"use one of {ALGORITHMS}"
        )
    if strategy == "switch" and algorithm != "auto":
        raise StrategyError(
            f"{name}: algorithm {algorithm!r} is one of strategy scan",
            "strategy 'switch' moves tokens and has no scan",
            "leave algorithm out, or use strategy 'scan'",
        )


def _check_length(request: Request, shard: SequenceShard) -> None:
    for index, x in enumerate(request.inputs):
        if x is None or index in request.op.whole:
            continue
        if x.shape[1] != shard.local_length:
            raise ShapeError(
                f"{request.name} needs this rank's share of the sequence",
                f"the tensors have {x.shape[1]} tokens, the shard has {shard.local_length}",
                "pass shard.scatter(x), or the shard these tensors were made for",
            )


def _check_sizes(request: Request) -> None:
    _, _, key_dim, value_dim = request.op.state_shape(request.inputs)
    if min(key_dim, value_dim, request.op.value_dim(request.inputs)) < 1:
        raise ShapeError(
            f"{request.name} needs head dims of at least 1",
            f"its states are {key_dim} x {value_dim} a head",
        )


def _chosen(
    requests: Sequence[Request], shard: SequenceShard, strategy: str, algorithm: str
) -> str:
    """An algorithm that is asked for is one of scan."""
    if strategy != "auto" or algorithm != "auto":
        return "scan" if strategy == "auto" else strategy
    choice = cost.choose(*(problem_of(request, shard) for request in requests))
    _log.debug("%s: %s", requests[0].name, choice)
    return choice.strategy


def _initial(request: Request, shard: SequenceShard) -> Tensor | None:
    """The initial states as [B,documents,H,K,V] in the states' dtype."""
    initial = request.initial
    if initial is None:
        return None
    batch, *rest = request.op.state_shape(request.inputs)
    wanted = (batch, shard.documents.count, *rest) if shard.packed else (batch, *rest)
    if tuple(initial.shape) != wanted:
        axes = "[B, documents, H, K, V]" if shard.packed else "[B, H, K, V]"
        raise ShapeError(
            f"initial_state must be {axes} = {list(wanted)}",
            f"got {list(initial.shape)}",
            "pass the final state of an earlier call, or zeros of this shape",
        )
    if not initial.is_floating_point():
        raise ShapeError("initial_state must be of a floating dtype", f"got {initial.dtype}")
    initial = initial.to(state_dtype(request.inputs))
    return initial if shard.packed else initial.unsqueeze(1)


def _starting(request: Request, shard: SequenceShard, initial: Tensor | None) -> Tensor | None:
    """What every document's state is before its first token; None where nobody asks."""
    if initial is not None or not request.want_final:
        return initial
    one = request.op.identity(request.inputs)
    return one.unsqueeze(1).expand(-1, shard.documents.count, *one.shape[1:])


def check_values(
    name: str, shard: SequenceShard, inputs: Inputs, wrong: bool, problem: str, **figures: Any
) -> None:
    """Under `xdist.checks()`: inputs finite and not `wrong`, or one NumericsError on all ranks.

    problem: what was needed; figures: this rank's numbers.
    """
    finite = all(bool(x.isfinite().all()) for x in inputs if x is not None)
    said = ", ".join(f"{key} {value:g}" for key, value in figures.items())
    raise_together(
        shard.group,
        not finite or wrong,
        lambda ranks: NumericsError(
            f"{name} needs finite inputs, {problem}",
            f"sequence ranks {ranks} hold others (here: {'finite' if finite else 'not finite'}"
            f"{', ' + said if said else ''})",
            "look for NaN upstream, and at how decays, steps and beta are made",
        ),
    )
