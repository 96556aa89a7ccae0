"""Gated linear attention over one tile on Triton kernels: the functions of torch.py.

    E        = what each span of some hundred tokens adds to the state      triton_states.py
    S        = the states at the spans' borders, from E one after another   triton_states.py
    out      = each span from its state, chunk by chunk                     triton_scan.py

A tile goes twice through k and v and once through q, whatever its length; states exist at the
borders of spans only, and only while the tile is worked on. The backward pass does the same in both
directions of time. Shapes are those of torch.py; states are float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.launch import target_of
from xdist_kernels.linear.chunks import collect
from xdist_kernels.linear.triton_diagonal import Weighed, gradients, weigh
from xdist_kernels.linear.triton_gate import gate
from xdist_kernels.linear.triton_scan import Decays, Scan, scan
from xdist_kernels.linear.triton_shapes import (
    LARGEST_DIM,
    cdiv,
    chunk_tokens,
    scan_blocks,
    span_tokens,
)
from xdist_kernels.linear.triton_states import Sums, chain, contiguous_last, sums_of

# Tokens of a tile: one state is kept for each, and a tile's own states and weighed keys exist while
# it is worked on.
TILE_TOKENS = 32768


class Found(NamedTuple):
    """What was made of a tile ahead of the call that needs it; None: not yet."""

    weighed: Weighed | None = None
    sums: Sums | None = None
    dsums: Sums | None = None
    half: Half | None = None


class Half(NamedTuple):
    """The backward pass as far as the gradient of the state after the tile plays no part."""

    states: Tensor  # [B, H, spans + 1, K, V]
    dsums: Sums
    dq: Tensor  # [B, T, H, K]; diagonal decay: the state's part, without decays and scale
    q_rows: Tensor | None  # [blocks, B, H, T] q . dq


class Prepared(NamedTuple):
    """A tile without its state."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    scale: float
    ids: Tensor | None  # int32 [T]: documents begun up to each token
    found: Found = Found()

    @property
    def heads(self) -> int:
        return self.v.shape[2]

    @property
    def keyed(self) -> bool:
        """Whether every key dim has a decay of its own."""
        return self.log_decay is not None and self.log_decay.shape[3] > 1

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return chunk_tokens(self.v, max(self.k.shape[3], self.v.shape[3]))

    def span(self, *, gated: bool = False) -> int:
        batch, tokens, heads, width = self.v.shape
        key_dim = self.k.shape[3]
        one = scan_blocks(key_dim, width, self.v, target_of(self.v.device))
        parts = cdiv(width, one.second)
        return span_tokens(tokens, batch * heads, parts, gated=gated)


def refusal(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> str | None:
    """Why these kernels cannot serve tensors of these shapes; None: they can."""
    largest = max(k.shape[3], v.shape[3])
    if largest > LARGEST_DIM:
        return (
            f"head dims go up to {LARGEST_DIM}, these are {k.shape[3]} and {v.shape[3]}: use more "
            "heads, or backend='torch'"
        )
    return None


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    *,
    scale: float,
    starts: Tensor | None = None,
) -> Prepared:
    """A tile: any strides but the last dim's, which is copied where it is not 1."""
    ids = None if starts is None else starts.cumsum(0, dtype=torch.int32)
    if log_decay is not None and log_decay.shape[3] > 1:
        log_decay = contiguous_last(log_decay)
    q, k, v = (contiguous_last(x) for x in (q, k, v))
    return Prepared(q, k, v, log_decay, scale, ids)


def _weighed(p: Prepared) -> Weighed:
    if p.found.weighed is not None:
        return p.found.weighed
    assert p.log_decay is not None
    return weigh(p.q, p.k, p.log_decay, p.ids, scale=p.scale, chunk=p.chunk, inner=True)


def _sums(p: Prepared, span: int, weighed: Weighed | None = None) -> Sums:
    """What the spans of the tile add to the state."""
    if p.found.sums is not None and p.found.sums.span == span:
        return p.found.sums
    if not p.keyed:
        return sums_of(
            p.k, p.v, p.log_decay, None, p.ids,
            heads=p.heads, span=span, scale=1.0, reverse=False,
        )  # fmt: skip
    assert p.log_decay is not None
    if weighed is None:
        weighed = weigh(None, p.k, p.log_decay, p.ids, scale=p.scale, chunk=p.chunk, inner=False)
    assert weighed.k is not None
    return sums_of(
        weighed.k, p.v, None, weighed.totals, p.ids,
        heads=p.heads, span=span, scale=1.0, reverse=False,
    )  # fmt: skip


def _dsums(p: Prepared, dout: Tensor, span: int, weighed: Weighed | None = None) -> Sums:
    """What the outputs of the spans add to the gradient of the state."""
    if p.found.dsums is not None and p.found.dsums.span == span:
        return p.found.dsums
    if not p.keyed:
        return sums_of(
            p.q, dout, p.log_decay, None, p.ids,
            heads=p.heads, span=span, scale=p.scale, reverse=True,
        )  # fmt: skip
    assert p.log_decay is not None
    if weighed is None:
        weighed = weigh(p.q, None, p.log_decay, p.ids, scale=p.scale, chunk=p.chunk, inner=False)
    assert weighed.q is not None
    return sums_of(
        weighed.q, dout, None, weighed.totals, p.ids,
        heads=p.heads, span=span, scale=1.0, reverse=True,
    )  # fmt: skip


def transition(p: Prepared) -> Tensor | None:
    """Log M of a tile without `starts`: [B,H,1] or [B,H,K], summed in float64; None: no decay."""
    if p.log_decay is None:
        return None
    if p.found.sums is not None and p.found.sums.logs is not None:
        return (p.found.sums.logs.sum(2, dtype=torch.float64) * math.log(2.0)).float()
    return p.log_decay.sum(1, dtype=torch.float64).float()


def advance(p: Prepared, state: Tensor) -> Tensor:
    """The state after the tile [B,H,K,V]; no outputs are computed."""
    return chain(_sums(p, p.span()), state, reverse=False, keep=False)[1]


def summed(p: Prepared) -> Prepared:
    """The tile with what its spans add to a state: `transition`, `advance` and `run` share it."""
    return p._replace(found=p.found._replace(sums=_sums(p, p.span())))


def ahead(p: Prepared) -> Prepared:
    """The tile with all that needs no state and no second pass: what its spans add to one."""
    weighed = _weighed(p) if p.keyed else None
    return p._replace(found=Found(weighed, _sums(p, p.span(), weighed)))


def run(p: Prepared, state: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out [B,T,H,V] in the dtype of v and the state after the tile [B,H,K,V].

    out: where to write the outputs; any strides but the last.
    """
    span, weighed = p.span(), _weighed(p) if p.keyed else None
    decays, (q, k) = _forward_decays(p, weighed)
    if p.found.sums is None and p.v.shape[1] <= span:
        first = state.to(torch.float32).contiguous()
        end = torch.empty_like(first)
        what = Scan(q, k, p.v, first, reverse=False, transposed=False)
        found, _ = scan(what, decays, heads=p.heads, span=span, scale=p.scale, out=out, end=end)
        return found, end
    borders, end = chain(_sums(p, span, weighed), state, reverse=False, keep=True)
    assert borders is not None
    what = Scan(q, k, p.v, borders, reverse=False, transposed=False)
    found, _ = scan(what, decays, heads=p.heads, span=span, scale=p.scale, out=out)
    return found, end


def _forward_decays(p: Prepared, weighed: Weighed | None) -> tuple[Decays, tuple[Tensor, Tensor]]:
    """How a state decays along keys, and the queries and keys that go with it."""
    if weighed is None:
        return Decays(log_decay=p.log_decay, ids=p.ids), (p.q, p.k)
    assert weighed.q is not None
    assert weighed.k is not None
    return Decays(totals=weighed.totals, inner=weighed.inner), (weighed.q, weighed.k)


def _gradient_span(p: Prepared) -> int:
    return p.span(gated=p.log_decay is not None)


def adjoint(p: Prepared, dout: Tensor, dstate: Tensor) -> Tensor:
    """Gradient of the state before the tile from those of outputs and of the state after it."""
    dsums = _dsums(p, _like_inputs(p, dout), _gradient_span(p))
    return chain(dsums, dstate, reverse=True, keep=False)[1]


def summed_back(p: Prepared, dout: Tensor) -> Prepared:
    """The tile with what its outputs' gradients, `dout` in all calls, add to that of a state:
    `adjoint`, `backward_ahead` and `backward` share it."""
    dsums = _dsums(p, _like_inputs(p, dout), _gradient_span(p))
    return p._replace(found=p.found._replace(dsums=dsums))


def _like_inputs(p: Prepared, dout: Tensor) -> Tensor:
    return contiguous_last(dout.to(p.v.dtype))


def backward_ahead(p: Prepared, state: Tensor, dout: Tensor) -> Prepared:
    """The tile with all of `backward` that does not need the gradient of the state after it."""
    weighed = _weighed(p) if p.keyed else None
    return p._replace(found=Found(weighed, half=_half(p, state, _like_inputs(p, dout), weighed)))


def _half(p: Prepared, state: Tensor, dout: Tensor, weighed: Weighed | None) -> Half:
    span = _gradient_span(p)
    states, _ = chain(_sums(p, span, weighed), state, reverse=False, keep=True)
    assert states is not None
    dsums = _dsums(p, dout, span, weighed)
    if weighed is None:
        what = Scan(dout, p.v, p.k, states, reverse=False, transposed=True)
        decays = Decays(log_decay=p.log_decay, ids=p.ids)
        rows = None if p.log_decay is None else p.q
        dq, q_rows = scan(what, decays, heads=p.heads, span=span, scale=p.scale, rows=rows)
        return Half(states, dsums, dq, q_rows)
    assert weighed.k is not None
    what = Scan(dout, p.v, weighed.k, states, reverse=False, transposed=True)
    before, _ = scan(what, Decays(totals=weighed.totals), heads=p.heads, span=span, scale=p.scale)
    return Half(states, dsums, before, None)


def backward(
    p: Prepared, state: Tensor, dout: Tensor, dstate: Tensor
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """(dq, dk, dv like the inputs, dlog_decay), and the gradient of the state before the tile.

    `state` is the one before the tile. dlog_decay has the shape of log_decay and is float32; None
    without decay. Everything but the state is recomputed.
    """
    dout = _like_inputs(p, dout)
    weighed = _weighed(p) if p.keyed else None
    half = p.found.half
    if half is None:
        half = _half(p, state, dout, weighed)
    span = half.dsums.span
    dstates, before = chain(half.dsums, dstate, reverse=True, keep=True)
    assert dstates is not None
    decays, (q, k) = _forward_decays(p, weighed)
    what = Scan(k, q, dout, dstates, reverse=True, transposed=False)
    dv, _ = scan(what, decays, heads=p.heads, span=span, scale=p.scale)
    dlog: Tensor | None = None
    if weighed is not None:
        assert p.log_decay is not None
        dq, dk, dlog = gradients(
            p.q, p.k, p.v, dout, p.log_decay, p.ids, (half.states, dstates), half.dq,
            span=span, scale=p.scale,
        )  # fmt: skip
    else:
        dq = half.dq
        what = Scan(p.v, dout, p.q, dstates, reverse=True, transposed=True)
        rows = None if p.log_decay is None else p.k
        dk, k_rows = scan(what, decays, heads=p.heads, span=span, scale=p.scale, rows=rows)
        if p.log_decay is not None:
            assert half.q_rows is not None
            assert k_rows is not None
            dlog = gate(half.q_rows, k_rows, (half.states, dstates), p.ids, span=span)
    group = p.heads // max(1, p.k.shape[2])
    return (collect(dq, max(1, group)), collect(dk, max(1, group)), dv, dlog), before
