"""Recurrences along any order of a grid's dims, with or without a shard."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor

from xdist.errors import ShapeError, StrategyError
from xdist.grid_shard import GridShard, resolve_grid
from xdist.ops.graph_break import graph_break
from xdist.ops.linear import delta_rule, linear_attention
from xdist.ops.prefix import prefix_attention
from xdist.ops.state_space import selective_scan, ssd
from xdist.parallel import delta_rule as delta_rule_parallel
from xdist.parallel import linear_attention as linear_attention_parallel
from xdist.parallel import prefix_attention as prefix_attention_parallel
from xdist.parallel import selective_scan as selective_scan_parallel
from xdist.parallel import ssd as ssd_parallel
from xdist.parallel.backend import check_own
from xdist.parallel.grid_scan import run_grid
from xdist.parallel.recurrence import Recurrence
from xdist.parallel.recurrent import Request
from xdist.parallel.selective_local import Local
from xdist.shard import DerivedShard, SequenceShard

Inputs = Mapping[str, Any] | Sequence[Tensor | None]
Op = Callable[..., Any] | Recurrence


class _Known(NamedTuple):
    """A public recurrence: how its request is made, its inputs with tokens, the first of which has
    `behind` dims behind its tokens."""

    request: Callable[..., Request]
    tokens: tuple[str, ...]
    behind: int = 2


def _selective_scan(
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    **rest: Any,
) -> Request:
    local = Local(D, z, delta_bias, delta_softplus)
    return selective_scan_parallel.request(local=local, **rest)


_KNOWN: dict[Callable[..., Any], _Known] = {
    linear_attention: _Known(linear_attention_parallel.request, ("v", "q", "k", "log_decay")),
    delta_rule: _Known(delta_rule_parallel.request, ("v", "q", "k", "beta", "log_decay")),
    ssd: _Known(ssd_parallel.request, ("x", "dt", "B", "C")),
    selective_scan: _Known(_selective_scan, ("u", "delta", "B", "C", "z"), 1),
    prefix_attention: _Known(prefix_attention_parallel.request, ("v", "k")),
}
# Rows start afresh, and grid_scan has a shard and directions of its own.
_OURS = ("shard", "reverse", "initial_state", "output_final_state")


@graph_break
def grid_scan(
    op: Op,
    inputs: Inputs | tuple[Inputs, Inputs],
    gshard: GridShard | None = None,
    *,
    order: Sequence[int],
    reverse: bool | str = False,
    backend: str = "auto",
) -> Any:
    """A recurrence over the tokens of a grid, taken in the order of some or all of its dims.

    Args:
        op: `xdist.linear_attention`, `delta_rule`, `ssd`, `selective_scan` or `prefix_attention`,
            a functools.partial of one with keyword arguments (`strategy`, `algorithm`, `scale`,
            ...), or a `xdist.Recurrence` of your own.
        inputs: op's arguments by name (for a Recurrence: its inputs in order). Those with tokens
            are this rank's part `[B, S1, ..., Sk, ...]` where op has `[B, n, ...]`; the others
            (A, D, a `[H]` decay, ...) are as op wants them. With reverse="both" also a pair of
            such inputs, forward and backward.
        gshard: where this rank's part lies; None is one device.
        order: dims of the grid from the outermost to the innermost (a dim of a tensor is one
            more). A dim that is left out makes rows: each of its positions starts afresh.
        reverse: False from each row's first token to its last, True the other way, "both" one scan
            in each direction.
        backend: as in `xdist.linear_attention`; a Recurrence of your own takes "auto" alone.

    Returns:
        The outputs of op on the same part of the grid, `[B, S1, ..., Sk, ...]`; with "both"
        (forward, backward). The current token counts in each direction.

    What moves (bytes: `xdist.cost.grid_scan.grid_scan_bytes`):
        nothing, where the sharded dim is not in the order;
        states, where it is the outermost dim of the order, both directions in one exchange;
        otherwise the inputs, switched to where one of these holds, and the outputs back. Whether
        to the outermost dim or to a dim of rows is decided by counted bytes, forward and backward,
        and so is a switch of tokens where states would be more bytes. Nothing needs to divide
        anything.
    Saved for backward: the inputs as given, without permuted copies, and a state for every 4,096
    tokens of a row.

    Raises:
        StrategyError: op has no directions, an unknown strategy, algorithm or backend, or a forced
            backend that cannot serve.
        ShapeError: inputs that op does not take or that do not lie on the grid; an order that is
            empty, names a dim twice or one that the grid does not have.

    Source: one ordering a layer as Li, Singh and Grover, "Mamba-ND" (2024), section 3.2; rows as
    its axis-wise variant; several orders as Liu et al., "VMamba" (2024), section 4.2.
    """
    function, options = _bare(op)
    known = None if isinstance(function, Recurrence) else _known(function)
    strategy = options.pop("strategy", "auto")
    algorithm = options.pop("algorithm", "auto")
    if known is None:
        check_own(function, backend)
    else:
        options.setdefault("backend", backend)
    ways = _directions(inputs, reverse)
    first = ways[0][0]
    token, behind = _first_token(function, known, first, options)
    dims = len(gshard.sizes) if gshard is not None else token.dim() - 1 - behind
    gshard = resolve_grid(gshard, token, dims)
    ordered = _checked_order(order, dims)
    shard = DerivedShard(gshard.mesh, gshard.layout)
    made: dict[int, Request] = {}
    requests = []
    for own, backwards in ways:
        if id(own) not in made:
            made[id(own)] = _request(function, known, own, options, gshard, shard)
        requests.append(_turned(made[id(own)], backwards))
    outs = run_grid(requests, gshard, ordered, strategy=strategy, algorithm=algorithm)
    grids = [out.unflatten(1, gshard.local_sizes) for out in outs]
    return (grids[0], grids[1]) if reverse == "both" else grids[0]


def _bare(op: Op) -> tuple[Op, dict[str, Any]]:
    """The function of a partial and its keyword arguments."""
    if not isinstance(op, functools.partial):
        return op, {}
    if op.args:
        raise ShapeError(
            "grid_scan takes a partial of keyword arguments",
            f"this one holds {len(op.args)} positional",
            "pass them by name, in inputs",
        )
    function, options = _bare(op.func)
    return function, {**options, **op.keywords}


def _known(function: Callable[..., Any]) -> _Known:
    if not isinstance(function, Hashable) or function not in _KNOWN:
        raise StrategyError(
            "grid_scan needs a recurrence",
            f"it was given {getattr(function, '__name__', function)!r}",
            f"use one of {', '.join(one.__name__ for one in _KNOWN)}, or an xdist.Recurrence",
        )
    return _KNOWN[function]


def _directions(inputs: Any, reverse: bool | str) -> list[tuple[Inputs, bool]]:
    pair = not isinstance(inputs, Mapping) and any(
        isinstance(one, (Mapping, list, tuple)) for one in inputs
    )
    if reverse != "both" and (pair or not isinstance(reverse, bool)):
        raise ShapeError(
            "grid_scan takes one set of inputs, or a pair with reverse='both'",
            f"reverse is {reverse!r}" + (", inputs are several sets" if pair else ""),
            "reverse is False, True or 'both'",
        )
    if reverse != "both":
        return [(inputs, bool(reverse))]
    if pair and len(inputs) != 2:
        raise ShapeError("both directions take two sets of inputs", f"got {len(inputs)}")
    first, second = inputs if pair else (inputs, inputs)
    return [(first, False), (second, True)]


def _first_token(
    function: Op, known: _Known | None, own: Inputs, options: Mapping[str, Any]
) -> tuple[Tensor, int]:
    """An input with tokens, and how many dims it has behind them."""
    if known is None:
        whole = cast("Recurrence", function).whole
        given = [x for i, x in enumerate(own) if isinstance(x, Tensor) and i not in whole]
        if not given:
            raise ShapeError("a recurrence needs an input with tokens", "all are None or whole")
        return given[0], 2
    found = {**options, **cast("Mapping[str, Any]", own)}.get(known.tokens[0])
    if not isinstance(found, Tensor):
        name = cast("Callable[..., Any]", function).__name__
        raise ShapeError(
            f"grid_scan of {name} takes its inputs by name",
            f"{known.tokens[0]} is {type(found).__name__}",
            f"pass a dict of the arguments of xdist.{name}",
        )
    return found, known.behind


def _request(
    function: Op,
    known: _Known | None,
    own: Inputs,
    options: Mapping[str, Any],
    gshard: GridShard,
    shard: SequenceShard,
) -> Request:
    """The request over this rank's tokens, the last dim of the grid fastest."""

    def flat(x: Tensor) -> Tensor:
        gshard.check(x)
        return x.flatten(1, len(gshard.sizes))

    if known is None:
        recurrence = cast("Recurrence", function)
        if options:
            raise ShapeError("a Recurrence has no options", f"got {sorted(options)}")
        given = tuple(
            x if x is None or i in recurrence.whole else flat(x)
            for i, x in enumerate(cast("Sequence[Tensor | None]", own))
        )
        return Request(type(recurrence).__name__, recurrence, given)
    arguments = {**options, **cast("Mapping[str, Any]", own)}
    _check_arguments(cast("Callable[..., Any]", function), arguments)
    for name in known.tokens:
        x = arguments.get(name)
        # A decay [H] has no tokens.
        if isinstance(x, Tensor) and x.dim() > 1:
            arguments[name] = flat(x)
    return known.request(**arguments, shard=shard)


def _turned(request: Request, backwards: bool) -> Request:
    return Request(
        request.name,
        request.op,
        request.inputs,
        reverse=backwards,
        finish=request.finish,
    )


def _check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    try:
        if extra := sorted(set(_OURS) & set(arguments)):
            raise TypeError(f"{extra} do not belong to the rows of a grid")
        inspect.signature(function).bind(**arguments)
    except TypeError as error:
        raise ShapeError(
            f"grid_scan takes the arguments of {function.__name__} by name",
            str(error),
            "each row of the grid starts afresh; pass gshard and reverse to grid_scan",
        ) from error


def _checked_order(order: Sequence[int], dims: int) -> tuple[int, ...]:
    found = tuple(order)
    if not found or len(set(found)) != len(found) or not set(found) <= set(range(dims)):
        raise ShapeError(
            f"an order names some of the grid's {dims} dims once each, from 0",
            f"got {found}",
            f"pass, for example, order={tuple(range(dims))}",
        )
    return found
