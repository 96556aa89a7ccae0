"""Runs of queries and the keys they see by a loop over queries in float64: torch.py's functions.

    for each query:  o = softmax(scale q . k of the keys it sees + bias) v

Gradients by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from xdist_kernels.neighborhood.tiles import Run
from xdist_kernels.neighborhood.torch import Gradients, Runs, zeros

__all__ = ["Gradients", "Runs", "backward", "forward", "zeros"]

# A key's place along one dim, and how many steps it lies behind the query.
Key = tuple[int, int]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    runs: Runs,
    scale: float,
    bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """[B,S1..Sk,H,E], in `out` where it is given; arguments in torch.py."""
    if out is None:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
    if out.numel():
        wide = None if bias is None else bias.double()
        out.copy_(_outputs(q.double(), k.double(), v.double(), wide, runs, scale))
    return out


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    *,
    runs: Runs,
    scale: float,
    bias: Tensor | None = None,
    into: Gradients | None = None,
) -> Gradients:
    """Gradients of q, k, v and the bias, in `into` where it is given, else in `zeros` of them."""
    into = zeros(q, k.shape, v.shape, bias) if into is None else into
    if not dout.numel():
        return into
    with torch.enable_grad():
        q_, k_, v_ = (x.detach().double().requires_grad_() for x in (q, k, v))
        bias_ = None if bias is None else bias.detach().double().requires_grad_()
        wanted = [x for x in (q_, k_, v_, bias_) if x is not None]
        y = _outputs(q_, k_, v_, bias_, runs, scale)
        dq, dk, dv, *rest = torch.autograd.grad(y, wanted, dout.double(), materialize_grads=True)
    into.dq.copy_(dq)
    into.dk.add_(dk)
    into.dv.add_(dv)
    if into.dbias is not None:
        into.dbias.add_(rest[0])
    return into


def _outputs(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, runs: Runs, scale: float
) -> Tensor:
    """[B,S1..Sk,H,E] of float64 inputs."""
    shared = q.shape[-2] // k.shape[-2]
    k, v = (x.repeat_interleave(shared, -2) for x in (k, v))
    found = []
    for place in product(*(_seen(one) for one in runs)):
        query = _at(q, [position for position, _ in place])  # [B,H,D]
        keys = list(product(*(seen for _, seen in place)))
        at = torch.tensor([[key for key, _ in one] for one in keys]).unbind(-1)
        scores = scale * torch.einsum("bhd,bmhd->bhm", query, _at(k, at))
        if bias is not None:
            middles = [size // 2 for size in bias.shape[1:]]
            steps = torch.tensor([[step for _, step in one] for one in keys])
            scores = scores + _at(bias, (steps + torch.tensor(middles)).unbind(-1))
        found.append(torch.einsum("bhm,bmhd->bhd", scores.softmax(-1), _at(v, at)))
    return torch.stack(found, 1).unflatten(1, q.shape[1:-2])


def _at(x: Tensor, place: Sequence[int | Tensor]) -> Tensor:
    """x of all rows (heads of a bias) at places of the grid."""
    index: tuple[slice | int | Tensor, ...] = (slice(None), *place)
    return x[index]


def _seen(runs: Sequence[Run]) -> list[tuple[int, list[Key]]]:
    """Of each query along one dim, in order, its place and its keys."""
    found = []
    for run in runs:
        for number, tile, row in product(range(run.classes), range(run.tiles), range(run.rows)):
            start = number + tile * run.hop
            low, high = (0, run.columns) if run.seen is None else run.seen[row]
            keys = [
                (run.keys + start + column * run.step, column - row + run.offset)
                for column in range(low, high)
            ]
            found.append((run.queries + start + row * run.step, keys))
    return sorted(found)
