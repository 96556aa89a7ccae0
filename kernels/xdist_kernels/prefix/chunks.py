"""A tile of prefix attention in chunks, and its states from chunk to chunk.

A state (m, u, w) stands for e^m (u, w): m is the largest score so far, so that u is at least 1 and
nothing overflows; the state of no tokens is (-inf, 0, 0). Gradients travel in the same form. Two
states are added by bringing both to the larger m.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

LONGEST_CHUNK = 64


class Prepared(NamedTuple):
    """One tile of R chunks of C tokens; the last chunk is filled up with scores of -inf."""

    q: Tensor  # [H, D]
    k: Tensor  # [B, T, H, D] as given
    v: Tensor  # [B, T, H, V] as given
    scale: Tensor  # a number
    scores: Tensor  # [B, H, R, C] scale * q . k
    values: Tensor  # [B, H, R, C, 1 + V]: a one, then v
    sees: Tensor  # bool [R or 1, C, C]: token t sees token i
    sees_before: Tensor | None  # bool [R, C]: its document began before the chunk; None: all
    goes_on: Tensor | None  # bool [R, C]: its document goes on behind the chunk; None: all
    reaches: Tensor  # bool [R + 1, R + 1]: what of item i is left at border t (documents alone)
    tops: Tensor | None = None  # [B, H, R, C] largest score of the chunk so far
    sums: Tensor | None = None  # [B, H, R, C, 1 + V] sum of e^(score - top) (1, v) so far


def wide_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunk_tokens(tokens: int) -> int:
    """C: a power of two."""
    return min(LONGEST_CHUNK, 1 << (tokens - 1).bit_length())


def to_chunks(x: Tensor, chunk: int, fill: float = 0.0) -> Tensor:
    """[B, T, H, ...] as [B, H, R, C, ...]."""
    x = x.transpose(1, 2)
    x = pad(x, (0, 0) * (x.dim() - 3) + (0, -x.shape[2] % chunk), value=fill)
    return x.unflatten(2, (x.shape[2] // chunk, chunk))


def to_tokens(x: Tensor, tokens: int) -> Tensor:
    """[B, H, R, C, ...] as [B, T, H, ...]."""
    return x.flatten(2, 3)[:, :, :tokens].transpose(1, 2)


def prepare(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, starts: Tensor | None = None
) -> Prepared:
    """One tile. q [H,D], k [B,T,H,D], v [B,T,H,V]; starts bool [T] or None."""
    wide, tokens = wide_dtype(v), k.shape[1]
    chunk = chunk_tokens(tokens)
    scores = to_chunks(scale * (k.to(wide) * q.to(wide)).sum(-1), chunk, -math.inf)
    values = pad(to_chunks(v.to(wide), chunk), (1, 0), value=1.0)
    chunks = scores.shape[2]
    sees = torch.ones(1, chunk, chunk, dtype=torch.bool, device=k.device).tril()
    reaches = torch.ones(chunks + 1, chunks + 1, dtype=torch.bool, device=k.device)
    before = after = None
    if starts is not None:
        ids = pad(starts, (0, -tokens % chunk)).cumsum(0).view(chunks, chunk)
        borders = torch.cat([ids.new_zeros(1), ids[:, -1]])
        sees = sees & (ids.unsqueeze(2) == ids.unsqueeze(1))
        before, after = ids == borders[:-1, None], ids == borders[1:, None]
        reaches = borders.unsqueeze(1) == borders.unsqueeze(0)
    number = torch.tensor(scale, dtype=wide)
    return Prepared(q, k, v, number, scores, values, sees, before, after, reaches)


def finite(top: Tensor) -> Tensor:
    """An exponent that may be subtracted: 0 in place of -inf."""
    return top.masked_fill(top == -math.inf, 0.0)


def joined(tops: Tensor, sums: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the seen items, for each of several sights.

    tops [..., I], sums [..., I, S], seen bool [..., J, I] -> tops [..., J], sums [..., J, S].
    """
    exponents = tops.unsqueeze(-2).masked_fill(~seen, -math.inf)
    top = exponents.amax(-1)
    return top, (exponents - finite(top).unsqueeze(-1)).exp_() @ sums


def ahead(p: Prepared) -> Prepared:
    """With every token's sums inside its chunk."""
    if p.sums is not None:
        return p
    tops, sums = joined(p.scores, p.values, p.sees)
    return p._replace(tops=tops, sums=sums)


def chunk_sums(p: Prepared) -> tuple[Tensor, Tensor]:
    """What each chunk hands on: [B, H, R] and [B, H, R, 1 + V]."""
    if p.tops is not None and p.sums is not None:
        return p.tops[..., -1], p.sums[..., -1, :]
    tops, sums = joined(p.scores, p.values, p.sees[:, -1:])
    return tops.squeeze(-1), sums.squeeze(-2)


def before_chunks(p: Prepared, state: Tensor) -> Tensor:
    """The states before each chunk and after the tile, [B, H, R + 1, 2 + V]."""
    tops, sums = chunk_sums(p)
    return _along_borders(p.reaches.tril(), torch.cat([state, _packed(tops, sums)], 2))


def after_chunks(p: Prepared, asked: Tensor, dstate: Tensor) -> Tensor:
    """The gradients of the states before each chunk and after the tile: what each chunk's own
    tokens ask, [B, H, R, 2 + V], and all later ones."""
    # A gradient of nothing says nothing, whatever its exponent.
    nothing = (dstate[..., 1:] == 0).all(-1)
    last = torch.cat(
        [dstate[..., :1].masked_fill(nothing.unsqueeze(-1), -math.inf), dstate[..., 1:]], -1
    )
    return _along_borders(p.reaches.triu(), torch.cat([asked, last], 2))


def _along_borders(seen: Tensor, items: Tensor) -> Tensor:
    return _packed(*joined(items[..., 0], items[..., 1:], seen))


def _packed(tops: Tensor, sums: Tensor) -> Tensor:
    return torch.cat([tops.unsqueeze(-1), sums], -1)


class Totals(NamedTuple):
    """Every token's sums over its document so far."""

    tops: Tensor  # [B, H, R, C]
    weights: Tensor  # [B, H, R, C] sum of e^(score - top); 0 where there is no finite score
    out: Tensor  # [B, H, R, C, V]


def totals(p: Prepared, before: Tensor) -> Totals:
    """The tokens' chunk sums and the states before the chunks, [B, H, R + 1, 2 + V], together."""
    p = ahead(p)
    assert p.tops is not None
    assert p.sums is not None
    earlier = before[:, :, :-1, None]  # [B, H, R, 1, 2 + V]
    from_before = earlier[..., 0]
    if p.sees_before is not None:
        from_before = from_before.masked_fill(~p.sees_before, -math.inf)
    tops = torch.maximum(p.tops, from_before)
    base = finite(tops)
    sums = p.sums * (p.tops - base).exp_().unsqueeze(-1)
    sums += (from_before - base).exp_().unsqueeze(-1) * earlier[..., 1:]
    weights = sums[..., :1]
    out = sums[..., 1:] / weights.masked_fill(weights == 0, 1.0)
    return Totals(tops, weights.squeeze(-1), out)
