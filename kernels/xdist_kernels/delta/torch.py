"""Chunked delta rule over one tile of tokens, the WY / UT form: forward. Backward: backward.py.

With D_ij the decay from token j to token i, K' = K decayed from the chunk's start, Q' likewise,
K" = K decayed to the chunk's end, g the whole chunk's decay, b = beta:

    for each chunk (batched, not looped):                              prepare
        A = tril(Q K^T * D),  L = tril(K K^T * D, -1)
        P = (I + L diag(b))^-1,  U = P V,  W = P K'
    for each chunk, in order (two products over all rows):             advance
        R = U - W S                  what the keys' old values lack
        S <- g S + (b K")^T R
    O = Q' S + A (b R)                                                 run
      = (A b U) + (Q' - A b W) S     the first part needs no state     ahead

The transition of a tile is the same chain run on the identity with U = 0.

Shapes: q, k [B,T,Hk,K], v [B,T,H,V], beta [B,T,H], log_decay None, [B,T,H] or [B,T,H,K], states
[B,H,K,V]; inside, those of chunks.py. All of it runs in float32, or in float64 with float64
inputs: the chain of transitions loses digits that narrower products cannot spare.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels import linear
from xdist_kernels.delta.chunks import Decays, chunk_size, fused, to_chunks, to_tokens
from xdist_kernels.delta.inverse import unit_inverse
from xdist_kernels.delta.products import scores
from xdist_kernels.errors import KernelError

CHUNK_TOKENS = 64


class Inputs(NamedTuple):
    """A tile as it was given."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    log_decay: Tensor | None
    scale: float
    starts: Tensor | None


class Links(NamedTuple):
    """What the chain over a tile's chunks needs."""

    entry: Tensor  # [N, C, V] U
    weight: Tensor  # [N, C, K] W
    writes: Tensor  # [N, C, K] b K"
    whole: Tensor | None  # [N, Kd, 1] g; None: 1


class Prepared(NamedTuple):
    """What of a tile needs no state."""

    inputs: Inputs
    both: Tensor  # [N, 2C, K] scale * q above k
    beta: Tensor  # [N, C, 1]
    decays: Decays | None  # None: no decay, and no document starts inside
    scores: Tensor  # [N, 2C, C] A above L
    inverse: Tensor  # [N, C, C] P
    links: Links


class Ahead(NamedTuple):
    """All of a tile that `run` still needs once the part without a state is made."""

    inputs: Inputs
    links: Links
    own: Tensor  # [N, C, V] A b U
    reads: Tensor  # [N, C, K] Q' - A b W


def check(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> None:
    """Raise KernelError unless shapes and dtypes fit; log_decay may be `[H]` too."""
    linear.check(q, k, v, log_decay)
    if beta.shape != v.shape[:3] or not beta.is_floating_point():
        raise KernelError(
            f"beta must be [B,n,H] = {list(v.shape[:3])} and floating; "
            f"got {list(beta.shape)}, {beta.dtype}"
        )


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of everything inside: float32, or float64 when `x` is float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _token_decays(x: Inputs, chunk: int, wide: torch.dtype) -> Tensor | None:
    """exp(log_decay) [N, C, Kd], 0 where a document starts; None where all are 1."""
    batch, n, heads, _ = x.v.shape
    if x.log_decay is None:
        if x.starts is None:
            return None
        factors = torch.ones(batch, n, heads, 1, dtype=wide, device=x.v.device)
    else:
        given = x.log_decay if x.log_decay.dim() == 4 else x.log_decay[..., None]
        factors = given.to(wide).exp()
    if x.starts is not None:
        factors = factors.masked_fill(x.starts[:, None, None], 0.0)
    # What fills the last chunk must not forget.
    if n % chunk:
        factors = torch.nn.functional.pad(factors, (0, 0, 0, 0, 0, -n % chunk), value=1.0)
    return fused(to_chunks(factors, chunk), wide)


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    starts: Tensor | None = None,
    *,
    chunk: int = CHUNK_TOKENS,
) -> Prepared:
    """What of a tile of T >= 1 tokens needs no state; shapes above, `chunk` a power of two.

    starts: bool [T], True where a document starts inside the tile, never at its first token.
    """
    x = Inputs(q, k, v, beta, log_decay, scale, starts)
    n, heads = v.shape[1:3]
    wide, chunk = wide_dtype(v), chunk_size(n, chunk)
    group = max(1, heads // max(1, k.shape[2]))
    keys = to_chunks(k, chunk, group)
    both = torch.empty(*keys.shape[:3], 2 * chunk, k.shape[3], dtype=wide, device=k.device)
    torch.mul(to_chunks(q, chunk, group).to(wide), scale, out=both[..., :chunk, :])
    both[..., chunk:, :] = keys
    both = both.flatten(0, 2)
    values = fused(to_chunks(v, chunk), wide)
    b = fused(to_chunks(beta[..., None], chunk), wide)

    found, decays = scores(both, _token_decays(x, chunk, wide))
    inverse = unit_inverse(found[:, chunk:] * b.mT)
    writes = both[:, chunk:] * b
    if decays is not None:
        writes.mul_(decays.until_end)
    links = Links(
        torch.bmm(inverse, values),
        torch.bmm(inverse, since_start(both[:, chunk:], decays)),
        writes,
        None if decays is None else decays.whole(),
    )
    return Prepared(x, both, b, decays, found, inverse, links)


def since_start(x: Tensor, decays: Decays | None) -> Tensor:
    """x [N, C, K] decayed from the chunk's start."""
    return x if decays is None else x * decays.since_start


def queries(p: Prepared) -> Tensor:
    """Q' [N, C, K]."""
    return since_start(p.both[:, : p.both.shape[1] // 2], p.decays)


class Chain(NamedTuple):
    """The chain over a tile's chunks; rows = B * H."""

    states: Tensor  # [chunks + 1, rows, K, V] at every border
    lacks: Tensor  # [N, C, V] R


def by_chunk(x: Tensor, rows: int) -> Tensor:
    """[N, ..] -> [chunks, rows, ..]; without rows there are no chunks."""
    return x.view(x.shape[0] // max(1, rows), rows, *x.shape[1:])


def _steps(
    links: Links, state: Tensor, *, entering: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """R and the state behind it [rows, K, V] for each chunk, in order; without `entering` as if U
    were zero."""
    rows = state.shape[0]
    weight, writes = by_chunk(links.weight, rows), by_chunk(links.writes, rows)
    whole = None if links.whole is None else by_chunk(links.whole, rows)
    own = by_chunk(links.entry, rows) if entering else None
    for i in range(weight.shape[0]):
        if own is None:
            lacks = torch.bmm(weight[i], state).neg_()
        else:
            lacks = torch.baddbmm(own[i], weight[i], state, alpha=-1)
        kept = state if whole is None else state * whole[i]
        state = torch.baddbmm(kept, writes[i].mT, lacks)
        yield lacks, state


def chain(links: Links, state: Tensor) -> Chain:
    """Run `state` [rows, K, V] through the tile."""
    rows, chunk = state.shape[0], links.weight.shape[1]
    count = links.weight.shape[0] // max(1, rows)
    states = state.new_empty(count + 1, *state.shape)
    lacks = state.new_empty(count, rows, chunk, state.shape[2])
    states[0] = state
    for i, (lack, behind) in enumerate(_steps(links, state)):
        lacks[i], states[i + 1] = lack, behind
    return Chain(states, lacks.flatten(0, 1))


def _end(links: Links, state: Tensor, *, entering: bool) -> Tensor:
    """The state [rows, K, V] behind the tile."""
    behind = state
    for _, behind in _steps(links, state, entering=entering):  # noqa: B007
        pass
    return behind


def transition(p: Prepared) -> Tensor:
    """M [B,H,K,K] of a tile in which no document starts."""
    batch, heads, key_dim = p.inputs.v.shape[0], p.inputs.v.shape[2], p.both.shape[-1]
    one = torch.eye(key_dim, dtype=p.both.dtype, device=p.both.device).expand(batch * heads, -1, -1)
    return _end(p.links, one, entering=False).view(batch, heads, key_dim, key_dim)


def advance(p: Prepared, state: Tensor) -> Tensor:
    """The state after the tile [B,H,K,V] from the one before it."""
    return _end(p.links, state.flatten(0, 1), entering=True).view(state.shape)


def ahead(p: Prepared) -> Ahead:
    """The part of the outputs that needs no state."""
    seen = p.scores[:, : p.beta.shape[1]] * p.beta.mT
    reads = torch.baddbmm(queries(p), seen, p.links.weight, alpha=-1)
    return Ahead(p.inputs, p.links, torch.bmm(seen, p.links.entry), reads)


def run(p: Prepared | Ahead, state: Tensor) -> tuple[Tensor, Tensor]:
    """out [B,T,H,V] in the dtype of v, and the state after the tile [B,H,K,V]."""
    batch, n, heads, _ = p.inputs.v.shape
    states, lacks = chain(p.links, state.flatten(0, 1))
    into = states[:-1].flatten(0, 1)
    if isinstance(p, Ahead):
        out = torch.baddbmm(p.own, p.reads, into)
    else:
        own = torch.bmm(p.scores[:, : p.beta.shape[1]], lacks.mul_(p.beta))
        out = torch.baddbmm(own, queries(p), into)
    out = to_tokens(out.to(p.inputs.v.dtype), batch, heads, n)
    return out, states[-1].clone().view(state.shape)
