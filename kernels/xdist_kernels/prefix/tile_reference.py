"""One tile of prefix attention by a loop over tokens, in float64: the functions of torch.py.

    state (m, u, w) stands for e^m (u, w)         L_t = log of the document's sum of e^s so far
    for t = 0 .. T-1:   (m, u, w) += e^{s_t} (1, v_t);   o_t = w / u;   L_t = m + log u
    for t = T-1 .. 0:   (g, h, G) += e^{-L_t} (<do_t, o_t>, do_t)
                        dv_t = e^{s_t + g} G;   ds_t = e^{s_t + g} (<v_t, G> - h)

where a document starts, (m, u, w) is empty before the token and (g, h, G) behind the loop's step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.prefix.chunks import wide_dtype


class Tile(NamedTuple):
    """A tile as it was given."""

    q: Tensor  # [H, D]
    k: Tensor  # [B, T, H, D]
    v: Tensor  # [B, T, H, V]
    scale: float
    starts: Tensor | None  # bool [T]


class _Walk(NamedTuple):
    scores: Tensor  # [B, T, H]
    logs: Tensor  # [B, T, H] L
    outs: Tensor  # [B, T, H, V]
    after: Tensor  # [B, H, 1, 2 + V]


def _added(items: Tensor, exponent: Tensor, values: Tensor) -> Tensor:
    """(m, sums) [B,H,1+S] plus e^exponent values, exponent [B,H], values [B,H,S]."""
    top = torch.maximum(items[..., 0], exponent)
    base = top.masked_fill(top == -math.inf, 0.0)
    kept = (items[..., 0] - base).exp()[..., None] * items[..., 1:]
    return torch.cat([top[..., None], kept + (exponent - base).exp()[..., None] * values], -1)


def _nothing(like: Tensor) -> Tensor:
    found = torch.zeros_like(like)
    found[..., 0] = -math.inf
    return found


def _fresh(p: Tile) -> list[bool]:
    tokens = p.k.shape[1]
    return [False] * tokens if p.starts is None else [bool(x) for x in p.starts.tolist()]


def _walk(p: Tile, state: Tensor) -> _Walk:
    items, v = state.double().squeeze(2), p.v.double()
    scores = p.scale * (p.k.double() * p.q.double()).sum(-1)
    outs, logs = [], []
    for t, fresh in enumerate(_fresh(p)):
        items = _nothing(items) if fresh else items
        one = torch.ones_like(v[:, t, :, :1])
        items = _added(items, scores[:, t], torch.cat([one, v[:, t]], -1))
        outs.append(items[..., 2:] / items[..., 1:2])
        logs.append(items[..., 0] + items[..., 1].log())
    return _Walk(scores, torch.stack(logs, 1), torch.stack(outs, 1), items.unsqueeze(2))


def prepare(q: Tensor, k: Tensor, v: Tensor, *, scale: float, starts: Tensor | None = None) -> Tile:
    """The tile as it is given; shapes in chunks.py."""
    return Tile(q, k, v, scale, starts)


def ahead(p: Tile) -> Tile:
    """The tile: a loop has nothing to make ahead."""
    return p


def run(p: Tile, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B,T,H,V] in the dtype of v, and the state after the tile."""
    found = _walk(p, state)
    return found.outs.to(p.v.dtype), found.after.to(state.dtype)


def advance(p: Tile, state: Tensor) -> Tensor:
    """The state [B,H,1,2+V] after the tile."""
    return run(p, state)[1]


def backward_ahead(p: Tile) -> Tile:
    """The tile: a loop has nothing to make ahead."""
    return p


def adjoint(p: Tile, state: Tensor, dout: Tensor, dstate: Tensor) -> Tensor:
    """(g, h, G) [B,H,1,2+V] before the tile, from that after it; `state` is the true one."""
    return backward(p, state, dout, dstate)[1]


def backward(
    p: Tile, state: Tensor, dout: Tensor, dstate: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Gradients of q (this tile's part), k and v, and (g, h, G) before the tile."""
    seen = _walk(p, state)
    q, k, v, douts = (x.double() for x in (p.q, p.k, p.v, dout))
    items = dstate.double().squeeze(2)
    # A gradient of nothing says nothing, whatever its exponent.
    nothing = (items[..., 1:] == 0).all(-1, keepdim=True)
    items = torch.cat([items[..., :1].masked_fill(nothing, -math.inf), items[..., 1:]], -1)
    dscores, dvs = torch.zeros_like(seen.scores), torch.zeros_like(v)
    for t, fresh in reversed(list(enumerate(_fresh(p)))):
        inner = (douts[:, t] * seen.outs[:, t]).sum(-1, keepdim=True)
        items = _added(items, -seen.logs[:, t], torch.cat([inner, douts[:, t]], -1))
        reach = (seen.scores[:, t] + items[..., 0]).exp()
        dvs[:, t] = reach[..., None] * items[..., 2:]
        dscores[:, t] = reach * ((v[:, t] * items[..., 2:]).sum(-1) - items[..., 1])
        items = _nothing(items) if fresh else items
    dscores = p.scale * dscores[..., None]
    wide = wide_dtype(p.v)
    grads = ((dscores * k).sum((0, 1)), dscores * q, dvs)
    return (grads[0].to(wide), grads[1].to(wide), grads[2].to(wide)), items.unsqueeze(2).to(wide)
