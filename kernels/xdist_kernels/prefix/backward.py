"""Every gradient of one tile of prefix attention, by hand.

With L_t = log sum_{i<=t} e^{s_i}, G_i = sum_{t>=i} e^{-L_t} do_t and h_i = sum_{t>=i} e^{-L_t}
<do_t, o_t>:

    dv_i = e^{s_i} G_i,   ds_i = e^{s_i} (<v_i, G_i> - h_i),   dq = scale sum ds_i k_i

What later tokens ask, (h, G), travels backwards as a state of its own, (g, h, G) for e^g (h, G),
and g = -m of the earliest token in it: s_i + g is at most 0, as large as scores may be.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xdist_kernels.prefix.chunks import (
    Prepared,
    Totals,
    after_chunks,
    ahead,
    before_chunks,
    finite,
    to_chunks,
    to_tokens,
    totals,
)


def adjoint(p: Prepared, state: Tensor, dout: Tensor, dstate: Tensor) -> Tensor:
    """(g, h, G) [B,H,1,2+V] before the tile, from that after it; `state` is the true one."""
    seen = totals(p, before_chunks(p, state))
    return after_chunks(p, _asked(p, seen, _wanted(p, seen, dout)), dstate)[:, :, :1]


def backward_ahead(p: Prepared) -> Prepared:
    """With every token's sums inside its chunk."""
    return ahead(p)


def backward(
    p: Prepared, state: Tensor, dout: Tensor, dstate: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Gradients of q (this tile's part), k and v, float32 or wider, and (g, h, G) before it."""
    p = ahead(p)
    seen = totals(p, before_chunks(p, state))
    wanted = _wanted(p, seen, dout)
    borders = after_chunks(p, _asked(p, seen, wanted), dstate)
    later = borders[:, :, 1:, None]  # [B, H, R, 1, 2 + V]
    weights = _weights(p, seen).mT @ wanted
    reach = (p.scores + later[..., 0]).clamp_(max=0.0)
    if p.goes_on is not None:
        reach = reach.masked_fill(~p.goes_on, -math.inf)
    weights += reach.exp_().unsqueeze(-1) * later[..., 1:]
    h, dvalues = weights[..., 0], weights[..., 1:]
    dscores = (p.values[..., 1:] * dvalues).sum(-1) - h
    tokens = p.k.shape[1]
    ds = to_tokens(dscores, tokens) * p.scale  # [B, T, H]
    dq = torch.einsum("bth,bthd->hd", ds, p.k.to(ds.dtype))
    dk = ds.unsqueeze(-1) * p.q.to(ds.dtype)
    return (dq, dk, to_tokens(dvalues, tokens)), borders[:, :, :1]


def _weights(p: Prepared, seen: Totals) -> Tensor:
    """e^{s_i - L_t} of tokens t and i of one chunk, [B, H, R, C, C]."""
    scores = p.scores.unsqueeze(-2).masked_fill(~p.sees, -math.inf)
    return (scores - finite(seen.tops).unsqueeze(-1)).exp_() * _shrink(seen).unsqueeze(-1)


def _shrink(seen: Totals) -> Tensor:
    """1 / u; 0 for a token without any finite score."""
    return seen.weights.masked_fill(seen.weights == 0, math.inf).reciprocal()


def _wanted(p: Prepared, seen: Totals, dout: Tensor) -> Tensor:
    """(<do, o>, do) of every token, [B, H, R, C, 1 + V]."""
    dout = to_chunks(dout.to(p.values.dtype), p.scores.shape[3])
    return torch.cat([(dout * seen.out).sum(-1, keepdim=True), dout], -1)


def _asked(p: Prepared, seen: Totals, wanted: Tensor) -> Tensor:
    """What the tokens of each chunk ask of the state before it: (g, h, G), [B, H, R, 2 + V]."""
    exponents = -seen.tops.masked_fill(seen.weights == 0, math.inf)
    if p.sees_before is not None:
        exponents = exponents.masked_fill(~p.sees_before, -math.inf)
    top = exponents.amax(-1, keepdim=True)
    sizes = (exponents - finite(top)).exp_() * _shrink(seen)
    return torch.cat([top, (sizes.unsqueeze(-2) @ wanted).squeeze(-2)], -1)
