"""Recurrences of your own, and both directions of any recurrence in one exchange."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, cast, overload

from torch import Tensor

from xdist.errors import ShapeError, StrategyError
from xdist.ops.graph_break import graph_break
from xdist.ops.linear import delta_rule, linear_attention
from xdist.ops.prefix import prefix_attention
from xdist.ops.state_space import selective_scan, ssd
from xdist.parallel import delta_rule as delta_rule_parallel
from xdist.parallel import linear_attention as linear_attention_parallel
from xdist.parallel import prefix_attention as prefix_attention_parallel
from xdist.parallel import recurrent
from xdist.parallel import selective_scan as selective_scan_parallel
from xdist.parallel import ssd as ssd_parallel
from xdist.parallel.backend import check_own
from xdist.parallel.linear_both_ways import both_ways
from xdist.parallel.recurrence import Recurrence
from xdist.shard import SequenceShard, resolve


@graph_break
def recurrence(
    op: Recurrence,
    *inputs: Tensor | None,
    shard: SequenceShard | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    strategy: str = "auto",
    algorithm: str = "auto",
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """A recurrence of your own over a sharded sequence: docs/add_a_recurrence.md.

    Args:
        op: what one tile of tokens does, a subclass of `xdist.Recurrence`.
        inputs: as `op` wants them: `[B, n, heads, ...]`, this rank's tokens, or None; those whose
            index is in `op.whole` are the same on every rank, and get this rank's part of their
            gradient.
        shard: where this rank's tokens lie; None is one device.
        initial_state: `[B, H, K, V]`, or `[B, documents, H, K, V]` where the shard has documents;
            equal on all ranks.
        output_final_state, strategy, algorithm, reverse: as in `xdist.linear_attention`.
        backend: "auto": `op` is what computes, so nothing else can be asked for.

    Returns:
        out `[B, n, H, V]`, or `(out, final_state)`. Each document starts afresh.

    Raises:
        ShapeError: inputs of another length than the shard's, or a state of another shape.
        StrategyError: an unknown strategy or algorithm, or a backend.
    """
    check_own(op, backend)
    length = next(x.shape[1] for i, x in enumerate(inputs) if x is not None and i not in op.whole)
    request = recurrent.Request(
        type(op).__name__, op, inputs, initial_state, output_final_state, reverse
    )
    return recurrent.run(request, resolve(shard, length), strategy=strategy, algorithm=algorithm)


@overload
def bidirectional(
    op: Callable[..., Any] | Recurrence,
    forward: Mapping[str, Any] | Sequence[Tensor | None],
    backward: Mapping[str, Any] | Sequence[Tensor | None] | None = None,
    shard: SequenceShard | None = None,
    *,
    strategy: str = "auto",
    algorithm: str = "auto",
    backend: str = "auto",
    merge: Literal[False] = False,
) -> tuple[Any, Any]: ...


@overload
def bidirectional(
    op: Callable[..., Any] | Recurrence,
    forward: Mapping[str, Any] | Sequence[Tensor | None],
    backward: Mapping[str, Any] | Sequence[Tensor | None] | None = None,
    shard: SequenceShard | None = None,
    *,
    strategy: str = "auto",
    algorithm: str = "auto",
    backend: str = "auto",
    merge: Literal[True],
) -> Tensor: ...


@graph_break
def bidirectional(
    op: Callable[..., Any] | Recurrence,
    forward: Mapping[str, Any] | Sequence[Tensor | None],
    backward: Mapping[str, Any] | Sequence[Tensor | None] | None = None,
    shard: SequenceShard | None = None,
    *,
    strategy: str = "auto",
    algorithm: str = "auto",
    backend: str = "auto",
    merge: bool = False,
) -> tuple[Any, Any] | Tensor:
    """A recurrence from both ends of the sequence, with ONE exchange for the two directions.

    Args:
        op: `xdist.linear_attention`, `delta_rule`, `ssd`, `selective_scan` or `prefix_attention`,
            or a `xdist.Recurrence` of your own.
        forward: the arguments of the direction of positions by name (for a Recurrence: its inputs
            in order), in the order of this rank's tokens.
        backward: those of the other direction, also in the order of this rank's tokens: other
            gates, another A; None takes the same as forward.
        shard, strategy, algorithm, backend: as in `xdist.linear_attention`; a Recurrence of your
            own takes backend "auto" alone.
        merge: return the sum of the two outputs, which takes no state. Linear attention without a
            decay a key dim, of one set of arguments, on one device and of no more tokens
            than a tile of Triton's kernels (32,768), is then made in one pass over q, k and v
            where those kernels serve it.

    Returns:
        (out of the forward direction, out of the backward direction), each as `op` returns it, in
        the order of this rank's tokens; with `merge` their sum. The current token counts in both.

    Moves what the two calls move; each pair of ranks exchanges one message where two calls would
    exchange two.

    Raises:
        StrategyError: `op` has no directions, an unknown strategy, algorithm or backend, or a
            forced backend that cannot serve.
        ShapeError: as `op`; arguments that `op` does not take, or lacks.

    Source: scans in both directions as in Zhu et al., "Vision Mamba" (2024), section 3.3.
    """
    given = forward if backward is None else backward
    sides = ((forward, False), (given, True))
    if isinstance(op, Recurrence):
        check_own(op, backend)
        token = next(
            x
            for i, x in enumerate(cast("Sequence[Tensor | None]", forward))
            if x is not None and i not in op.whole
        )
        shard = resolve(shard, token.shape[1])
        requests = [
            recurrent.Request(type(op).__name__, op, tuple(cast("Any", own)), reverse=reverse)
            for own, reverse in sides
        ]
    else:
        build, tokens_of = _directed(op)
        for own, _ in sides:
            _check_arguments(op, own)
        shard = resolve(shard, cast("Any", forward)[tokens_of].shape[1])
        requests = [
            build(**cast("Any", own), shard=shard, reverse=reverse, backend=backend)
            for own, reverse in sides
        ]
        if merge and op is linear_attention and backward is None:
            ways = {"strategy": strategy, "algorithm": algorithm}
            recurrent.check_requests(requests, shard, **ways)
            added = both_ways(requests[0], shard)
            if added is not None:
                return added
    first, second = recurrent.run_together(requests, shard, strategy=strategy, algorithm=algorithm)
    if not merge:
        return first, second
    if isinstance(first, tuple) or isinstance(second, tuple):
        raise ShapeError(
            "bidirectional(merge=True) adds outputs, and states have no sum",
            "output_final_state was asked for",
            "leave out merge, or output_final_state",
        )
    return first + second


def _directed(op: Callable[..., Any]) -> tuple[Callable[..., recurrent.Request], str]:
    """How the request of a public recurrence is made, and which argument holds its tokens."""
    known: dict[Callable[..., Any], tuple[Callable[..., recurrent.Request], str]] = {
        linear_attention: (linear_attention_parallel.request, "v"),
        delta_rule: (delta_rule_parallel.request, "v"),
        ssd: (ssd_parallel.request, "x"),
        selective_scan: (_selective_scan, "u"),
        prefix_attention: (prefix_attention_parallel.request, "v"),
    }
    if not isinstance(op, Hashable) or op not in known:
        raise StrategyError(
            "bidirectional() needs a recurrence",
            f"it was given {getattr(op, '__name__', op)!r}",
            f"use one of {', '.join(function.__name__ for function in known)}",
        )
    return known[op]


def _check_arguments(op: Callable[..., Any], given: Any) -> None:
    name, ours = op.__name__, {"shard", "reverse", "strategy", "algorithm", "backend"}
    try:
        if ours & set(given):
            raise TypeError(f"{sorted(ours & set(given))} belong to the call of both directions")
        inspect.signature(op).bind(**given)
    except TypeError as error:
        raise ShapeError(
            f"bidirectional() takes the arguments of one direction of {name} by name",
            str(error),
            f"pass a dict such as those of xdist.{name}(**arguments)",
        ) from error


def _selective_scan(
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **rest: Any,
) -> recurrent.Request:
    local = selective_scan_parallel.Local(D, z, delta_bias, delta_softplus)
    return selective_scan_parallel.request(local=local, **rest)
