"""Starts the delta rule's Triton kernels: what each writes is allocated here.

Shapes inside: R = B * H rows, N = chunks of a row, C tokens of a chunk, KP and VP the dims filled
up to whole blocks. `operand` is the dtype in which products are taken and parts are kept: that of
q, k and v, or float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xdist_kernels.delta.torch import Inputs
from xdist_kernels.delta.triton_blocks import Blocks, Sizes, blocks_of, sizes_of
from xdist_kernels.delta.triton_chain import (
    backward_chain_kernel,
    both_chains_kernel,
    forward_chain_kernel,
)
from xdist_kernels.delta.triton_prepare import prepare_kernel
from xdist_kernels.launch import launch

NONE, SCALAR, DIAGONAL = 0, 1, 2


class Parts(NamedTuple):
    """What of a tile needs no state, as prepare_kernel wrote it."""

    weight: Tensor  # [R, N, C, KP] -P K'
    entry: Tensor | None  # [R, N, C, VP] P V
    reads: Tensor | None  # [R, N, C, KP]
    own: Tensor | None  # [R, N, C, VP]
    keys: Tensor | None  # [R, N, C, KP]; None: the keys as they were given
    fade: Tensor  # [R, N, C] float32
    since: Tensor | None  # [R, N, C] float32, for one decay a token
    until: Tensor | None
    whole: Tensor | None  # [R, N] or [R, N, KP] float32
    scores: Tensor | None  # [R, N, C, C]
    lows: Tensor | None
    inverse: Tensor | None

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.weight.shape[2]


class Wanted(NamedTuple):
    """Which of the parts."""

    entry: bool = False
    reads: bool = False
    own: bool = False
    saved: bool = False


def decay_of(x: Inputs) -> int:
    """The kernels' DECAY."""
    if x.log_decay is None:
        return NONE if x.starts is None else SCALAR
    return DIAGONAL if x.log_decay.dim() == 4 else SCALAR


def blocks_for(x: Inputs, operand: torch.dtype, precision: str, chunk: int) -> tuple[Sizes, Blocks]:
    """Sizes and blocks of a tile."""
    size = sizes_of(x.k, x.v)
    diagonal = decay_of(x) == DIAGONAL
    return size, blocks_of(size, operand, precision, x.v.device, chunk, diagonal=diagonal)


def strides_of(letter: str, x: Tensor | None) -> dict[str, int]:
    """The kernels' strides of batch, tokens and heads."""
    found = (0, 0, 0) if x is None else x.stride()[:3]
    return {f"stride_{letter}{dim}": step for dim, step in zip("bth", found, strict=True)}


def dims_of(size: Sizes, blocks: Blocks) -> dict[str, int]:
    """The kernels' sizes, as given and filled up."""
    return {
        "T": size.tokens,
        "H": size.heads,
        "K": size.key_dim,
        "V": size.value_dim,
        "KP": blocks.keys,
        "VP": blocks.values,
        "C": blocks.chunk,
    }


def marks_of(x: Inputs) -> Tensor | None:
    """Where documents start, as bytes."""
    return None if x.starts is None else x.starts.view(torch.uint8)


def prepare(x: Inputs, operand: torch.dtype, chunk: int, precision: str, wanted: Wanted) -> Parts:
    """The parts of a tile that are wanted."""
    size, blocks = blocks_for(x, operand, precision, chunk)
    decay, grid = decay_of(x), (size.rows, -(-size.tokens // chunk))

    def made(*dims: int, when: bool = True, dtype: torch.dtype = operand) -> Tensor | None:
        return torch.empty(*grid, *dims, dtype=dtype, device=x.v.device) if when else None

    wide = torch.float32
    whole = (blocks.keys,) if decay == DIAGONAL else ()
    weight, fade = made(chunk, blocks.keys), made(chunk, dtype=wide)
    assert weight is not None
    assert fade is not None
    parts = Parts(
        weight,
        made(chunk, blocks.values, when=wanted.entry),
        made(chunk, blocks.keys, when=wanted.reads),
        made(chunk, blocks.values, when=wanted.own),
        made(chunk, blocks.keys, when=decay == DIAGONAL),
        fade,
        made(chunk, when=decay == SCALAR and wanted.saved, dtype=wide),
        made(chunk, when=decay == SCALAR and wanted.saved, dtype=wide),
        made(*whole, when=decay != NONE, dtype=wide),
        *(made(chunk, chunk, when=wanted.saved) for _ in range(3)),
    )
    launch(
        prepare_kernel,
        grid[0] * grid[1],
        blocks.prepare,
        device=x.v.device,
        p_q=x.q,
        p_k=x.k,
        p_v=x.v,
        p_beta=x.beta,
        p_g=x.log_decay,
        p_starts=marks_of(x),
        **{f"p_{name}": part for name, part in parts._asdict().items()},
        GROUP=size.group,
        scale=x.scale,
        **strides_of("q", x.q),
        **strides_of("k", x.k),
        **strides_of("v", x.v),
        **strides_of("b", x.beta),
        **strides_of("g", x.log_decay),
        **dims_of(size, blocks),
        LEVELS=blocks.levels,
        BK=blocks.block,
        BV=blocks.block,
        DECAY=decay,
        PRECISION=precision,
        # Inverses are made in float32; for narrower operands a product of three parts is exact
        # far beyond what is kept of it.
        INVERSE=precision if operand == wide else "tf32x3",
    )
    return parts


def _keys(x: Inputs, size: Sizes, parts: Parts) -> dict[str, Any]:
    """The keys that the chain meets: as given, or decayed, as rows of their own for each head."""
    keys, group = x.k, size.group
    if parts.keys is not None:
        keys, group = parts.keys.view(size.batch, size.heads, -1, parts.keys.shape[-1]), 1
        keys = keys.transpose(1, 2)
    return {"p_keys": keys, "GROUP": group, **strides_of("k", keys)}


def forward_chain(
    x: Inputs,
    parts: Parts,
    start: Tensor,
    precision: str,
    *,
    out: Tensor | None = None,
    states: Tensor | None = None,
) -> Tensor:
    """The state after a tile [B,H,K,W] from `start` of that shape; W need not be V where the parts
    have no entry. out [B,T,H,V] and states [R,N,KP,VP] are written where given."""
    size, blocks = blocks_for(x, parts.weight.dtype, precision, parts.chunk)
    if parts.entry is None:
        size = size._replace(value_dim=start.shape[3])
        diagonal = parts.keys is not None
        blocks = blocks_of(
            size, parts.weight.dtype, precision, x.v.device, parts.chunk, diagonal=diagonal
        )
    start = start.to(torch.float32).contiguous()
    end = torch.empty_like(start)
    launch(
        forward_chain_kernel,
        size.rows * (blocks.values // blocks.chain),
        blocks.walk,
        device=x.v.device,
        p_weight=parts.weight,
        p_entry=parts.entry,
        p_reads=None if out is None else parts.reads,
        p_own=None if out is None else parts.own,
        p_fade=parts.fade,
        p_whole=parts.whole,
        p_start=start,
        p_states=states,
        p_out=out,
        p_end=end,
        **_keys(x, size, parts),
        **dims_of(size, blocks),
        BK=blocks.chain_keys,
        BV=blocks.chain,
        DECAY=decay_of(x),
        PRECISION=precision,
    )
    return end


def backward_chain(
    x: Inputs,
    parts: Parts,
    dout: Tensor,
    dend: Tensor,
    precision: str,
    *,
    dstates: Tensor | None = None,
) -> Tensor:
    """The gradient of the state before a tile [B,H,K,V]; dstates [R,N,KP,VP] is written where
    given."""
    size, blocks = blocks_for(x, parts.weight.dtype, precision, parts.chunk)
    dend = dend.to(torch.float32).contiguous()
    dstart = torch.empty_like(dend)
    launch(
        backward_chain_kernel,
        size.rows * (blocks.values // blocks.chain),
        blocks.walk,
        device=x.v.device,
        p_weight=parts.weight,
        p_reads=parts.reads,
        p_fade=parts.fade,
        p_whole=parts.whole,
        p_dout=dout,
        p_dend=dend,
        p_dstates=dstates,
        p_dstart=dstart,
        **_keys(x, size, parts),
        **strides_of("o", dout),
        **dims_of(size, blocks),
        BK=blocks.chain_keys,
        BV=blocks.chain,
        DECAY=decay_of(x),
        PRECISION=precision,
    )
    return dstart


def both_chains(
    x: Inputs, parts: Parts, start: Tensor, dout: Tensor, dend: Tensor, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    """States before each chunk and gradients of those behind, [R,N,KP,VP], and the gradient of
    the state before the tile [B,H,K,V]: both chains in one launch."""
    size, blocks = blocks_for(x, parts.weight.dtype, precision, parts.chunk)
    start, dend = (y.to(torch.float32).contiguous() for y in (start, dend))
    dstart, states = torch.empty_like(dend), states_of(x, parts, precision)
    dstates = torch.empty_like(states)
    programs = size.rows * (blocks.values // blocks.chain)
    launch(
        both_chains_kernel,
        2 * programs,
        blocks.walk,
        device=x.v.device,
        p_weight=parts.weight,
        p_entry=parts.entry,
        p_reads=parts.reads,
        p_fade=parts.fade,
        p_whole=parts.whole,
        p_start=start,
        p_states=states,
        p_dout=dout,
        p_dend=dend,
        p_dstates=dstates,
        p_dstart=dstart,
        forward_programs=programs,
        **_keys(x, size, parts),
        **strides_of("o", dout),
        **dims_of(size, blocks),
        BK=blocks.chain_keys,
        BV=blocks.chain,
        DECAY=decay_of(x),
        PRECISION=precision,
    )
    return states, dstates, dstart


def states_of(x: Inputs, parts: Parts, precision: str) -> Tensor:
    """Room for one state a chunk [R,N,KP,VP]."""
    _, blocks = blocks_for(x, parts.weight.dtype, precision, parts.chunk)
    return parts.weight.new_empty(*parts.weight.shape[:2], blocks.keys, blocks.values)
