"""What every chunked form shares: tokens cut into chunks, documents as ids, states at the borders.

Shapes: rows = B*H; R = rows * chunks, fused in that order; C = tokens of a chunk; a tile's chunk
*borders* are numbered 0 (its start) to `chunks` (its end).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from xdist_kernels.linear.halves import sums_between

# torch's exp2 takes a third of exp's time on a CPU: log decays are turned to base 2 once.
LOG2_E = 1.0 / math.log(2.0)


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and decays: float32, or float64 when `x` is float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def to_chunks(x: Tensor, chunk: int) -> Tensor:
    """[B, n, H, D] -> [R, C, D] contiguous, the last chunk filled up with zeros."""
    batch, n, heads, dim = x.shape
    rows = x.transpose(1, 2)
    if n % chunk:
        rows = pad(rows, (0, 0, 0, -n % chunk))
    return rows.reshape(batch * heads * (rows.shape[2] // chunk), chunk, dim).contiguous()


def to_tokens(x: Tensor, batch: int, heads: int, n: int) -> Tensor:
    """Undo `to_chunks`: a [B, n, H, D] view without the filling."""
    return x.reshape(batch, heads, -1, x.shape[-1])[:, :, :n].transpose(1, 2)


def spread(x: Tensor, group: int) -> Tensor:
    """[B,n,Hk,K] -> [B,n,H,K], each key head repeated for its `group` value heads."""
    return x if group == 1 else x.repeat_interleave(group, 2)


def collect(x: Tensor, group: int) -> Tensor:
    """Adjoint of `spread`, added in the states' dtype: [B,n,H,K] -> [B,n,Hk,K]."""
    if group == 1:
        return x
    return x.unflatten(2, (-1, group)).sum(3, dtype=state_dtype(x)).to(x.dtype)


def group_size(k: Tensor, v: Tensor) -> int:
    """Value heads per key head; 1 when there are no heads at all."""
    return max(1, v.shape[2] // max(1, k.shape[2]))


class DocumentIds(NamedTuple):
    """How many documents have started: up to each token, up to each border."""

    tokens: Tensor  # [chunks, C] int64
    borders: Tensor  # [chunks + 1] int64

    def same(self) -> Tensor:
        """[chunks, C, C] bool: two tokens of a chunk are of one document."""
        return self.tokens[:, :, None] == self.tokens[:, None, :]

    def since_start(self, rows: int) -> Tensor:
        """[R, C, 1] bool: no document starts between the chunk's start and the token."""
        return (self.tokens == self.borders[:-1, None]).repeat(rows, 1)[..., None]

    def until_end(self, rows: int) -> Tensor:
        """[R, C, 1] bool: no document starts between the token and the chunk's end."""
        return (self.tokens == self.borders[1:, None]).repeat(rows, 1)[..., None]


def document_ids(resets: Tensor | None, chunk: int) -> DocumentIds | None:
    """Ids from `resets` bool [n], True at the first token of each document."""
    if resets is None:
        return None
    ids = pad(resets, (0, -resets.shape[0] % chunk)).to(torch.int64).cumsum(0).reshape(-1, chunk)
    return DocumentIds(ids, pad(ids[:, -1], (1, 0)))


def border_decays(totals: Tensor, ids: DocumentIds | None, wide: torch.dtype) -> Tensor:
    """Decay from border j to border s, [rows, Kd, chunks+1, chunks+1], 0 for j > s.

    `totals` [rows, chunks, Kd] are the chunks' log decays to base 2 (Kd = 1, or one per key dim).
    The borders are few, so that float64 costs little over a long tile.
    """
    between = sums_between(totals.double().mT)
    count = between.shape[-1]
    keep = torch.ones(count, count, dtype=torch.bool, device=between.device).tril()
    if ids is not None:
        keep = keep & (ids.borders[:, None] == ids.borders[None, :])
    return between.to(wide).exp2_() * keep


def carry(decays: Tensor, entries: Tensor) -> Tensor:
    """States at the borders that `decays` has rows for, [rows, borders, K, V], from what enters at
    each border [rows, chunks+1, K, V]."""
    if decays.shape[1] == 1:
        return torch.bmm(decays[:, 0], entries.flatten(2)).unflatten(-1, entries.shape[2:])
    return torch.matmul(decays, entries.transpose(1, 2)).transpose(1, 2).contiguous()


def gate_gradient(own: Tensor, ends: Tensor, ids: DocumentIds | None) -> Tensor:
    """Gradient of the log decays [R, C, Kd].

    `own` [R, C, Kd] is q.dq - k.dk and `ends` [R, 1, Kd] is <dS, S> at each chunk's last token:
    d(log a_t) = sum of `own` over i >= t of t's document, plus `ends` where that document reaches
    the chunk's end (MATH.md section 0). Summing inside a chunk keeps rounding from piling up.
    """
    chunk = own.shape[1]
    later = torch.ones(chunk, chunk, dtype=own.dtype, device=own.device).triu()
    if ids is None:
        return torch.matmul(later, own) + ends
    count = ids.tokens.shape[0]
    same = ids.same()
    sums = torch.matmul(later * same, own.view(-1, count, chunk, own.shape[-1]))
    reaches = same[:, :, -1:].to(own.dtype)
    return (sums + ends.view(-1, count, 1, own.shape[-1]) * reaches).view(own.shape)
