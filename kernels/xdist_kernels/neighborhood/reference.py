"""Attention over sets of a grid by a loop over queries, in float64: the definition, for tests.

Each query lists its keys by the words of the paper, not by the rules that the tiles follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor


def near(size: int, window: int, dilation: int = 1) -> list[list[int]]:
    """Of each position its `window` nearest in its class modulo `dilation`."""
    found = []
    for position in range(size):
        members = range(position % dilation, size, dilation)
        by_distance = sorted(members, key=lambda other: (abs(other - position), other))
        found.append(sorted(by_distance[:window]))
    return found


def blocks(size: int, window: int, shift: int = 0) -> list[list[int]]:
    """Of each position its block; blocks are cut at shift, shift + window, ..."""
    number = [(position - shift) // window for position in range(size)]
    return [[other for other in range(size) if number[other] == mine] for mine in number]


def strided(size: int, step: int) -> list[list[int]]:
    """Of each position its class modulo `step`."""
    return [list(range(position % step, size, step)) for position in range(size)]


def sets_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sees: Sequence[Sequence[Sequence[int]]],
    *,
    scale: float | None = None,
    position_bias: Tensor | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """out [B,S1..Sk,H,E] float64 from q [B,S1..Sk,H,D], k [B,S1..Sk,G,D], v [B,S1..Sk,G,E].

    `sees[dim][position]` lists the positions seen along each dim. position_bias [H,W1..Wk] is
    added at (key - query) / step, counted from the middle. Differentiable by autograd.
    """
    q, k, v = q.double(), k.double(), v.double()
    shared = q.shape[-2] // k.shape[-2]
    k, v = k.repeat_interleave(shared, -2), v.repeat_interleave(shared, -2)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    steps = [1] * len(sees) if steps is None else steps
    sizes = q.shape[1:-2]
    outs = []
    for place in product(*(range(size) for size in sizes)):
        mine = _at(q, place)  # [B,H,D]
        seen = list(product(*(dim[at] for dim, at in zip(sees, place, strict=True))))
        keys = torch.stack([_at(k, at) for at in seen], 1)  # [B,m,H,D]
        values = torch.stack([_at(v, at) for at in seen], 1)
        scores = factor * torch.einsum("bhd,bmhd->bhm", mine, keys)
        if position_bias is not None:
            middles = [size // 2 for size in position_bias.shape[1:]]
            at = [
                [
                    (key - query) // step + middle
                    for key, query, step, middle in zip(one, place, steps, middles, strict=True)
                ]
                for one in seen
            ]
            extra = torch.stack([_at(position_bias.double(), one) for one in at], 1)
            scores = scores + extra
        outs.append(torch.einsum("bhm,bmhd->bhd", scores.softmax(-1), values))
    return torch.stack(outs, 1).unflatten(1, sizes)


def _at(x: Tensor, place: Sequence[int]) -> Tensor:
    index: tuple[slice | int, ...] = (slice(None), *place)
    return x[index]
