"""Log decays between the tokens of a chunk: sums of one sign, never a difference of sums.

With c = cumulative log decay, c_i - c_j of two tokens behind one very strong decay has only the
digits that the strong one leaves to both sums: of -1e6 beside -0.01, none. A pair is taken apart at
the middle of the smallest aligned block that holds both tokens instead:

    c_i - c_j = (c_i - c_m) + (c_m - c_j)         m = the last token of the block's first half

Both parts grow from block to block by adding what the other half sums up to.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Level(NamedTuple):
    """Blocks of 2*half tokens, `blocks` = R * C / (2*half) of them; valid until the next level."""

    half: int
    since: Tensor  # [blocks, half, D] c_i - c_m of the second halves
    until: Tensor  # [blocks, half, D] c_m - c_j of the first halves


def halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """First and second halves of the blocks of x [R, C, D]: two [blocks, half, D] views."""
    blocks = x.view(-1, 2, half, x.shape[-1])
    return blocks[:, 0], blocks[:, 1]


def levels(g: Tensor) -> Iterator[Level]:
    """half = 1, 2, .. C/2 of the log decays g [R, C, D], C a power of two."""
    since = g.clone(memory_format=torch.contiguous_format)  # its blocks are views
    until, half = torch.zeros_like(since), 1
    while half < g.shape[1]:
        first, second = halves(since, half)
        to_middle = halves(until, half)[0]
        yield Level(half, second, to_middle)
        to_middle.add_(second[:, -1:])
        second.add_(first[:, -1:])
        half *= 2


def sums_behind(g: Tensor) -> Tensor:
    """c_C - c_i of the log decays g [R, C, D]."""
    return pad(g.flip(1)[:, :-1], (0, 0, 1, 0)).cumsum(1).flip(1)


def within(g: Tensor, dtype: torch.dtype) -> Tensor:
    """exp2(c_i - c_j) for j <= i, else 0, of the log decays g [R, C, 1]: [R, C, C] in `dtype`."""
    rows, chunk, _ = g.shape
    found = torch.eye(chunk, dtype=dtype, device=g.device).repeat(rows, 1, 1)
    for half, since, until in levels(g):
        count = chunk // (2 * half)
        corners = found.view(rows, count, 2, half, count, 2, half)[:, :, 1, :, :, 0]
        own = corners.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # [rows, count, half, half]
        own.copy_((since.exp2() * until.exp2().mT).view(own.shape))
    return found


def sums_between(totals: Tensor) -> Tensor:
    """Log decay from border j to border s, [..., n+1, n+1], 0 for j > s, of n decays one after
    another, totals [..., n]."""
    count = totals.shape[-1]
    behind = torch.ones(count + 1, count, dtype=torch.bool, device=totals.device).triu()
    return pad(torch.where(behind, totals[..., None, :], 0.0).cumsum(-1), (1, 0)).mT
