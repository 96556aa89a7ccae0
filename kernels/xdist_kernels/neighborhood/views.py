"""Tiles of a grid's tensors as batches of small matrices, and back.

A run of tiles is a strided view of its tensor; reading copies it, writing goes through it.
B batch, S1..Sk and M1..Mk grids of queries and keys, H and G heads, R = H / G, D channels; T tiles,
n queries and m keys in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.neighborhood.tiles import Run


class Place(NamedTuple):
    """Of one dim: where the tiles of a run start, and how long the piece of each is."""

    run: Run
    start: int
    length: int


def _blocks(x: Tensor, places: Sequence[Place]) -> Tensor:
    """A view [B,T1..T2k,n1..nk,H,D] of x [B,S1..Sk,H,D]: classes and tiles of each dim."""
    offset = x.storage_offset()
    counts, lengths, hops, steps = [], [], [], []
    for dim, (run, start, length) in enumerate(places, 1):
        stride = x.stride(dim)
        offset += start * stride
        counts += [run.classes, run.tiles]
        hops += [stride, run.hop * stride]
        lengths.append(length)
        steps.append(run.step * stride)
    return x.as_strided(
        (x.shape[0], *counts, *lengths, *x.shape[-2:]),
        (x.stride(0), *hops, *steps, *x.stride()[-2:]),
        offset,
    )


def _query_blocks(x: Tensor, rows: slice, part: Sequence[Run], groups: int) -> Tensor:
    """A view [B,T1..T2k,G,R,n1..nk,D]."""
    view = _blocks(x[rows], [Place(run, run.queries, run.rows) for run in part])
    return _heads_first(view, len(part)).unflatten(2 * len(part) + 1, (groups, -1))


def _key_blocks(x: Tensor, rows: slice, places: Sequence[Place]) -> Tensor:
    """A view [B,T1..T2k,G,m1..mk,D]."""
    return _heads_first(_blocks(x[rows], places), len(places))


def _heads_first(view: Tensor, dims: int) -> Tensor:
    """Heads in front of the positions of a tile."""
    return view.movedim(-2, 2 * dims + 1)


def queries(x: Tensor, rows: slice, part: Sequence[Run], groups: int, dtype: torch.dtype) -> Tensor:
    """A copy [T G, R n, D]."""
    view = _query_blocks(x, rows, part, groups)
    return _copied(view, dtype).flatten(0, 2 * len(part) + 1).flatten(1, -2)


def keys(x: Tensor, rows: slice, part: Sequence[Run], dtype: torch.dtype) -> Tensor:
    """A copy [T G, m, D]."""
    view = _key_blocks(x, rows, [Place(run, run.keys, run.columns) for run in part])
    return _copied(view, dtype).flatten(0, 2 * len(part) + 1).flatten(1, -2)


def _copied(view: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(view.shape, dtype=dtype, device=view.device).copy_(view)


def put(x: Tensor, rows: slice, part: Sequence[Run], tiles: Tensor) -> None:
    """Writes [T G, R n, D] where its queries lie."""
    view = _query_blocks(x, rows, part, 1).squeeze(2 * len(part) + 1)
    view.copy_(tiles.view(view.shape))


def add(x: Tensor, rows: slice, part: Sequence[Run], tiles: Tensor) -> None:
    """Adds [T G, m, D] where its keys lie.

    Keys of neighbouring tiles of a class overlap; pieces as long as a hop never do.
    """
    dims = len(part)
    counts = [count for run in part for count in (run.classes, run.tiles)]
    columns = [run.columns for run in part]
    tiles = tiles.view(-1, *counts, x.shape[-2], *columns, x.shape[-1])
    for starts in product(*(range(0, run.columns, _apart(run)) for run in part)):
        places, piece = [], tiles
        for dim, (run, start) in enumerate(zip(part, starts, strict=True)):
            length = min(_apart(run), run.columns - start)
            places.append(Place(run, run.keys + start * run.step, length))
            piece = piece.narrow(2 * dims + 2 + dim, start, length)
        _key_blocks(x, rows, places).add_(piece)


def _apart(run: Run) -> int:
    """Keys of a tile that no other tile of the run has."""
    return run.columns if run.tiles == 1 else min(run.columns, run.hop // run.step)
