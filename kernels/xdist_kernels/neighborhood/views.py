"""Tiles of a grid's tensors as batches of small matrices, and back.

A run of tiles is a strided view of its tensor; reading copies it, writing goes through it.
B batch, S1..Sk and M1..Mk grids of queries and keys, H and G heads, R = H / G, D channels; T tiles,
n queries and m keys in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from xdist_kernels.neighborhood.tiles import Run

Place = tuple[int, int, int, int, int]
"""Of one dim: start, count and hop of the tiles; length and step inside one."""


def _blocks(x: Tensor, places: Sequence[Place]) -> Tensor:
    """A view [B,T1..Tk,n1..nk,H,D] of x [B,S1..Sk,H,D]."""
    offset = x.storage_offset()
    counts, lengths, hops, steps = [], [], [], []
    for dim, (start, count, hop, length, step) in enumerate(places, 1):
        offset += start * x.stride(dim)
        counts.append(count)
        lengths.append(length)
        hops.append(hop * x.stride(dim))
        steps.append(step * x.stride(dim))
    return x.as_strided(
        (x.shape[0], *counts, *lengths, *x.shape[-2:]),
        (x.stride(0), *hops, *steps, *x.stride()[-2:]),
        offset,
    )


def _query_blocks(x: Tensor, rows: slice, part: Sequence[Run], groups: int) -> Tensor:
    """A view [B,T1..Tk,G,R,n1..nk,D]."""
    places = [(run.queries, run.tiles, run.hop, run.rows, run.step) for run in part]
    view = _blocks(x[rows], places)
    dims = len(part)
    heads = view.dim() - 2
    order = [*range(dims + 1), heads, *range(dims + 1, heads), heads + 1]
    return view.permute(order).unflatten(dims + 1, (groups, -1))


def _key_blocks(x: Tensor, rows: slice, places: Sequence[Place]) -> Tensor:
    """A view [B,T1..Tk,G,m1..mk,D]."""
    view = _blocks(x[rows], places)
    dims = len(places)
    heads = view.dim() - 2
    return view.permute([*range(dims + 1), heads, *range(dims + 1, heads), heads + 1])


def queries(x: Tensor, rows: slice, part: Sequence[Run], groups: int, dtype: torch.dtype) -> Tensor:
    """A copy [T G, R n, D]."""
    view = _query_blocks(x, rows, part, groups)
    return _copied(view, dtype).flatten(0, len(part) + 1).flatten(1, -2)


def keys(x: Tensor, rows: slice, part: Sequence[Run], dtype: torch.dtype) -> Tensor:
    """A copy [T G, m, D]."""
    places = [(run.keys, run.tiles, run.hop, run.columns, run.step) for run in part]
    view = _key_blocks(x, rows, places)
    return _copied(view, dtype).flatten(0, len(part) + 1).flatten(1, -2)


def _copied(view: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(view.shape, dtype=dtype, device=view.device).copy_(view)


def put(x: Tensor, rows: slice, part: Sequence[Run], tiles: Tensor) -> None:
    """Writes [T G, R n, D] where its queries lie."""
    view = _query_blocks(x, rows, part, 1).squeeze(len(part) + 1)
    view.copy_(tiles.view(view.shape))


def add(x: Tensor, rows: slice, part: Sequence[Run], tiles: Tensor) -> None:
    """Adds [T G, m, D] where its keys lie.

    Keys of neighbouring tiles overlap; runs of `hop` of them never do.
    """
    dims = len(part)
    counts = [run.tiles for run in part]
    columns = [run.columns for run in part]
    tiles = tiles.view(-1, *counts, x.shape[-2], *columns, x.shape[-1])
    for starts in product(*(range(0, run.columns, _apart(run)) for run in part)):
        places, piece = [], tiles
        for dim, (run, start) in enumerate(zip(part, starts, strict=True)):
            length = min(_apart(run), run.columns - start)
            places.append((run.keys + start * run.step, run.tiles, run.hop, length, run.step))
            piece = piece.narrow(dims + 2 + dim, start, length)
        _key_blocks(x, rows, places).add_(piece)


def _apart(run: Run) -> int:
    """Keys of a tile that no other tile of the run has."""
    if run.tiles == 1 or run.hop % run.step:
        return run.columns
    return min(run.columns, run.hop // run.step)
