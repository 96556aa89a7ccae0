"""One tile of the delta rule, its rows in blocks: what `Recurrence` and users call.

Rows (batch x heads) do not meet. A block is as many of them as keep each of its tensors within
BLOCK_ELEMENTS: larger ones would be given back to the system and fetched again by every operation,
which costs a third of the time on a CPU. The functions are those of torch.py and backward.py, with
the same shapes and the same results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.delta import backward as back
from xdist_kernels.delta import torch as forward

BLOCK_ELEMENTS = 1 << 20


class Span(NamedTuple):
    """Which rows a block holds: batch entries, value heads, key heads."""

    batch: slice
    heads: slice
    keys: slice

    def of(self, state: Tensor) -> Tensor:
        """The block's part of a tensor [B,H,..]."""
        return state[self.batch, self.heads]


class Tile(NamedTuple):
    """A prepared tile; no blocks where there are no rows."""

    inputs: forward.Inputs
    spans: tuple[Span, ...]
    blocks: tuple[forward.Prepared, ...]


class Ahead(NamedTuple):
    """A tile whose outputs need no more than the state."""

    inputs: forward.Inputs
    spans: tuple[Span, ...]
    blocks: tuple[forward.Ahead, ...]


class Ready(NamedTuple):
    """A tile whose gradients need no more than that of the state after it."""

    inputs: forward.Inputs
    spans: tuple[Span, ...]
    blocks: tuple[back.Ready, ...]


def _spans(k: Tensor, v: Tensor, elements: int) -> Iterator[Span]:
    batch, n, heads, width = v.shape
    group = max(1, heads // max(1, k.shape[2]))
    rows = max(1, elements // (n * max(width, k.shape[3])))
    wide = max(group, min(heads, rows) // group * group)
    deep = max(1, rows // wide)
    for b in range(0, batch, deep):
        for h in range(0, heads, wide):
            last = min(h + wide, heads)
            yield Span(
                slice(b, min(b + deep, batch)), slice(h, last), slice(h // group, last // group)
            )


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    starts: Tensor | None = None,
    *,
    chunk: int = forward.CHUNK_TOKENS,
    elements: int = BLOCK_ELEMENTS,
) -> Tile:
    """What of a tile of T >= 1 tokens needs no state; shapes in torch.py, `chunk` a power of two.

    starts: bool [T], True where a document starts inside the tile, never at its first token.
    """
    x = forward.Inputs(q, k, v, beta, log_decay, scale, starts)
    spans = tuple(_spans(k, v, elements)) if v.numel() else ()
    blocks = tuple(
        forward.prepare(
            q[at.batch, :, at.keys],
            k[at.batch, :, at.keys],
            v[at.batch, :, at.heads],
            beta[at.batch, :, at.heads],
            None if log_decay is None else log_decay[at.batch, :, at.heads],
            scale,
            starts,
            chunk=chunk,
        )
        for at in spans
    )
    return Tile(x, spans, blocks)


def transition(p: Tile) -> Tensor:
    """M [B,H,K,K] of a tile in which no document starts."""
    batch, _, heads, _ = p.inputs.v.shape
    key_dim = p.inputs.k.shape[3]
    like = p.inputs.v.new_empty(batch, heads, key_dim, key_dim)
    return _joined(p.spans, [forward.transition(block) for block in p.blocks], like)


def advance(p: Tile, state: Tensor) -> Tensor:
    """The state after the tile [B,H,K,V] from the one before it."""
    pairs = zip(p.spans, p.blocks, strict=True)
    return _joined(p.spans, [forward.advance(block, at.of(state)) for at, block in pairs], state)


def ahead(p: Tile) -> Ahead:
    """The part of the outputs that needs no state."""
    return Ahead(p.inputs, p.spans, tuple(forward.ahead(block) for block in p.blocks))


def run(p: Tile | Ahead, state: Tensor) -> tuple[Tensor, Tensor]:
    """out [B,T,H,V] in the dtype of v, and the state after the tile [B,H,K,V]."""
    blocks: tuple[forward.Prepared | forward.Ahead, ...] = p.blocks
    pairs = zip(p.spans, blocks, strict=True)
    found = [forward.run(block, at.of(state)) for at, block in pairs]
    out = _joined(p.spans, [one for one, _ in found], p.inputs.v, heads=2)
    return out, _joined(p.spans, [end for _, end in found], state)


def adjoint(p: Tile, dout: Tensor, dstate: Tensor) -> Tensor:
    """Gradient of the state before the tile, from those of its outputs [B,T,H,V] and of the state
    after it [B,H,K,V]."""
    found = [
        back.adjoint(block, dout[at.batch, :, at.heads], at.of(dstate))
        for at, block in zip(p.spans, p.blocks, strict=True)
    ]
    return _joined(p.spans, found, dstate)


def backward_ahead(p: Tile, state: Tensor, dout: Tensor) -> Ready:
    """All of a tile's backward pass before the chain back; state: the one before the tile."""
    blocks = tuple(
        back.backward_ahead(block, at.of(state), dout[at.batch, :, at.heads])
        for at, block in zip(p.spans, p.blocks, strict=True)
    )
    return Ready(p.inputs, p.spans, blocks)


def backward(
    p: Tile | Ready, state: Tensor, dout: Tensor, dstate: Tensor
) -> tuple[back.Gradients, Tensor]:
    """Gradients of a tile's inputs, float32 or wider, and of the state before it."""
    blocks: tuple[forward.Prepared | back.Ready, ...] = p.blocks
    found = [
        back.backward(block, at.of(state), dout[at.batch, :, at.heads], at.of(dstate))
        for at, block in zip(p.spans, blocks, strict=True)
    ]
    grads = [one for one, _ in found]
    decays = [one.log_decay for one in grads if one.log_decay is not None]
    x = p.inputs
    joined = back.Gradients(
        _joined(p.spans, [one.q for one in grads], x.q, heads=2, keys=True),
        _joined(p.spans, [one.k for one in grads], x.k, heads=2, keys=True),
        _joined(p.spans, [one.v for one in grads], x.v, heads=2),
        _joined(p.spans, [one.beta for one in grads], x.beta, heads=2),
        None if x.log_decay is None else _joined(p.spans, decays, x.log_decay, heads=2),
    )
    return joined, _joined(p.spans, [before for _, before in found], state)


def _joined(
    spans: tuple[Span, ...],
    parts: list[Tensor],
    like: Tensor,
    *,
    heads: int = 1,
    keys: bool = False,
) -> Tensor:
    """The blocks' parts of one tensor, shaped as `like`; heads: their dim; keys: of key heads."""
    if not parts:
        return torch.empty_like(like)
    if len(parts) == 1:
        return parts[0]
    whole = parts[0].new_empty(like.shape)
    for at, part in zip(spans, parts, strict=True):
        first = (at.keys if keys else at.heads).start
        whole[at.batch].narrow(heads, first, part.shape[heads]).copy_(part)
    return whole
