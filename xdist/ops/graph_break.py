"""torch.compile and the public functions: each call is one graph break, and runs as it is.

What a call does depends on integers in Python (layouts, documents, masks), on process groups and on
buffers in flight: nothing that a graph of tensor operations holds. So the compiled graph ends
before the call and another begins after it; gradients go through autograd as always.
`fullgraph=True` refuses a graph break, and with it these calls.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

# The outside form of each function, made when it is first met inside a graph: to make it loads
# the compiler, which `import xdist` must not.
_OUTSIDE: dict[Callable[..., object], Callable[..., object]] = {}


def graph_break(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which torch.compile leaves alone, with all that it calls."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            return _outside(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def _outside(function: Callable[P, R]) -> Callable[P, R]:
    if function not in _OUTSIDE:
        reason = f"xdist.{function.__name__} is one graph break (docs/compile.md)"
        _OUTSIDE[function] = torch.compiler.disable(function, reason=reason)
    return _OUTSIDE[function]  # type: ignore[return-value]
