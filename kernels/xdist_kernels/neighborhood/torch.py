"""Softmax attention over sets of a grid, tile by tile, with an explicit backward.

    for each part of the grid (one run of tiles a dim, a bounded number of tiles):
        Q, K, V   the tiles' queries and keys, copied into batches of small matrices
        P = softmax(scale Q K^T + bias), minus infinity where a row does not see a column
        out = P V                                      backward:  dV += P^T dO
                                                                  dS = P (dO V^T - rowsum)
    A query's keys lie in one tile, so its softmax is whole there and nothing is merged.

B batch, S1..Sk the grid of queries, M1..Mk of keys, H query heads, G key heads, D, E head dims;
R = H / G; T tiles, n queries and m keys in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.errors import KernelError
from xdist_kernels.neighborhood.tiles import Run, parts_of
from xdist_kernels.neighborhood.views import add, keys, put, queries

Runs = Sequence[Sequence[Run]]
# Scores of one part: its matrices stay near a core's cache.
PART_SCORES = 2**19


class Gradients(NamedTuple):
    """What backward adds to, but dq, which it writes; dk, dv, dbias in float32 or wider."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None


class Tiles(NamedTuple):
    """One run a dim: what every part of it shares."""

    runs: tuple[Run, ...]
    hidden: Tensor | None
    """bool [n,m], True where a row does not see a column."""
    offsets: Tensor | None
    """int64 [n,m], each pair's place in the flattened bias."""

    @property
    def shape(self) -> tuple[int, int]:
        """Queries and keys of a tile."""
        return prod(run.rows for run in self.runs), prod(run.columns for run in self.runs)


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
    """[B,S1..Sk,H,E], in `out` where it is given, else in the dtype of q.

    Scores and sums are float32, float64 for float64. q [B,S1..Sk,H,D], k [B,M1..Mk,G,D], v
    [B,M1..Mk,G,E]; `runs` of each dim, in local indices of q and of k. bias [H,2r1-1,..,2rk-1] is
    added at (key - query) / step + r - 1.

    Raises:
        KernelError: shapes or dtypes that do not fit together.
    """
    _check(q, k, v, bias, len(runs))
    if out is None:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
    for tiles, rows, part in _parts(q, k, runs, bias):
        p = _probabilities(q, k, tiles, rows, part, scale, bias)
        y = torch.bmm(p, keys(v, rows, part, p.dtype))
        put(out, rows, part, y)
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
    """Gradients of q, k, v and the bias, in `into` where it is given, else in `zeros` of them.

    Probabilities are computed again: besides its inputs forward keeps nothing.
    """
    wide = _wide(q.dtype)
    into = zeros(q, k.shape, v.shape, bias) if into is None else into
    dq, dk, dv, dbias = into
    for tiles, rows, part in _parts(q, k, runs, bias):
        p = _probabilities(q, k, tiles, rows, part, scale, bias)
        do, v_ = queries(dout, rows, part, k.shape[-2], wide), keys(v, rows, part, wide)
        add(dv, rows, part, torch.bmm(p.transpose(1, 2), do))
        ds = torch.bmm(do, v_.transpose(1, 2))
        ds.sub_((ds * p).sum(-1, keepdim=True)).mul_(p)
        del p, do, v_
        if dbias is not None and tiles.offsets is not None:
            per_head = ds.view(-1, q.shape[-2], tiles.offsets.numel()).sum(0)
            dbias.view(q.shape[-2], -1).index_add_(1, tiles.offsets.flatten(), per_head)
        ds.mul_(scale)
        put(dq, rows, part, torch.bmm(ds, keys(k, rows, part, wide)))
        q_ = queries(q, rows, part, k.shape[-2], wide)
        add(dk, rows, part, torch.bmm(ds.transpose(1, 2), q_))
    return into


def zeros(
    q: Tensor, k_shape: Sequence[int], v_shape: Sequence[int], bias: Tensor | None
) -> Gradients:
    """Gradients to fill: dq in the dtype of q, the others in float32 or wider."""
    wide = torch.empty((), dtype=_wide(q.dtype), device=q.device)
    return Gradients(
        torch.empty_like(q, memory_format=torch.contiguous_format),
        wide.new_zeros(*k_shape),
        wide.new_zeros(*v_shape),
        None if bias is None else wide.new_zeros(bias.shape),
    )


def _parts(
    q: Tensor, k: Tensor, runs: Runs, bias: Tensor | None
) -> Iterator[tuple[Tiles, slice, tuple[Run, ...]]]:
    for one in product(*runs):
        tiles = Tiles(one, _hidden(one, q.device), _offsets(one, bias))
        most = PART_SCORES // max(1, prod(tiles.shape) * q.shape[-2])
        for rows, part in parts_of(one, q.shape[0], most):
            yield tiles, rows, part


def _probabilities(
    q: Tensor,
    k: Tensor,
    tiles: Tiles,
    rows: slice,
    part: tuple[Run, ...],
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """[T G, R n, m]"""
    wide, groups = _wide(q.dtype), k.shape[-2]
    q_, k_ = queries(q, rows, part, groups, wide), keys(k, rows, part, wide)
    scores = q_.new_empty(q_.shape[0], q_.shape[1], k_.shape[1])
    torch.baddbmm(scores, q_, k_.transpose(1, 2), beta=0, alpha=scale, out=scores)
    by_head = scores.view(-1, q.shape[-2], *tiles.shape)
    if bias is not None and tiles.offsets is not None:
        by_head += bias.flatten(1)[:, tiles.offsets.flatten()].view(-1, *tiles.shape)
    if tiles.hidden is not None:
        by_head.masked_fill_(tiles.hidden, -torch.inf)
    return torch.softmax(scores, -1)


def _hidden(runs: Sequence[Run], device: torch.device) -> Tensor | None:
    if all(run.seen is None for run in runs):
        return None
    rows, columns = [run.rows for run in runs], [run.columns for run in runs]
    seen = torch.ones(*rows, *columns, dtype=torch.bool, device=device)
    for dim, run in enumerate(runs):
        if run.seen is None:
            continue
        bounds = torch.tensor(run.seen, device=device)
        column = torch.arange(run.columns, device=device)
        mine = (column >= bounds[:, :1]) & (column < bounds[:, 1:])
        seen &= _along(mine, dim, len(runs))
    return ~seen.view(prod(rows), prod(columns))


def _offsets(runs: Sequence[Run], bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    rows, columns = [run.rows for run in runs], [run.columns for run in runs]
    found = torch.zeros(*rows, *columns, dtype=torch.int64, device=bias.device)
    for dim, run in enumerate(runs):
        size = bias.shape[dim + 1]
        row = torch.arange(run.rows, device=bias.device)[:, None]
        column = torch.arange(run.columns, device=bias.device)
        # Pairs that are not seen may lie outside the table; they are hidden wherever they point.
        place = (column - row + run.offset + size // 2).clamp(0, size - 1)
        found = found * size + _along(place, dim, len(runs))
    return found.view(prod(rows), prod(columns))


def _along(pairs: Tensor, dim: int, dims: int) -> Tensor:
    """[n,m] of one dim, shaped to broadcast over [n1..nk,m1..mk]."""
    shape = [1] * (2 * dims)
    shape[dim], shape[dims + dim] = pairs.shape
    return pairs.view(shape)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dims: int) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == dims + 3 or k.shape[:-1] != v.shape[:-1]:
        raise KernelError(
            f"q, k and v need a batch, {dims} grid dims, heads and channels: {shapes}"
        )
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise KernelError(f"q and k do not fit together: {shapes}")
    if not q.shape[-2] or not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        raise KernelError(f"{q.shape[-2]} query heads do not divide into {k.shape[-2]} key heads")
    if not q.dtype == k.dtype == v.dtype or not q.dtype.is_floating_point:
        raise KernelError(f"one float dtype is needed: {q.dtype}, {k.dtype}, {v.dtype}")
    if bias is not None and (bias.dim() != dims + 1 or bias.shape[0] != q.shape[-2]):
        raise KernelError(f"the bias is [H, one size a dim]; got {tuple(bias.shape)} for {shapes}")
