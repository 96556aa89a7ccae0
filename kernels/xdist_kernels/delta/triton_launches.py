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
from xdist_kernels.delta.triton_gradients import keys_kernel, writes_kernel
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


def _strides(letter: str, x: Tensor | None) -> dict[str, int]:
    """Of batch, tokens and heads."""
    found = (0, 0, 0) if x is None else x.stride()[:3]
    return {f"stride_{letter}{dim}": step for dim, step in zip("bth", found, strict=True)}


def _dims(size: Sizes, blocks: Blocks) -> dict[str, int]:
    return {
        "T": size.tokens,
        "H": size.heads,
        "K": size.key_dim,
        "V": size.value_dim,
        "KP": blocks.keys,
        "VP": blocks.values,
        "C": blocks.chunk,
    }


def _marks(x: Inputs) -> Tensor | None:
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
        p_starts=_marks(x),
        **{f"p_{name}": part for name, part in parts._asdict().items()},
        GROUP=size.group,
        scale=x.scale,
        **_strides("q", x.q),
        **_strides("k", x.k),
        **_strides("v", x.v),
        **_strides("b", x.beta),
        **_strides("g", x.log_decay),
        **_dims(size, blocks),
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
    return {"p_keys": keys, "GROUP": group, **_strides("k", keys)}


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
        **_dims(size, blocks),
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
        **_strides("o", dout),
        **_dims(size, blocks),
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
        **_strides("o", dout),
        **_dims(size, blocks),
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


class Found(NamedTuple):
    """Gradients; dq and dk of every value head."""

    dq: Tensor  # [B, T, H, K]
    dk: Tensor  # [B, T, H, K]
    dv: Tensor  # [B, T, H, V]
    dbeta: Tensor  # [B, T, H] float32
    dlog: Tensor | None  # as log_decay, float32


def gradients(
    x: Inputs,
    parts: Parts,
    states: Tensor,
    dstates: Tensor,
    dout: Tensor,
    precision: str,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
) -> Found:
    """Gradients of a tile's inputs, those of q, k and v in `dtypes`."""
    size, blocks = blocks_for(x, parts.weight.dtype, precision, parts.chunk)
    decay, device = decay_of(x), x.v.device
    tokens = (size.batch, size.tokens, size.heads)
    gated = x.log_decay is not None

    def made(*dims: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*tokens, *dims, dtype=dtype, device=device)

    diagonal = (size.key_dim,) if decay == DIAGONAL else ()
    found = Found(
        made(size.key_dim, dtype=dtypes[0]),
        made(size.key_dim, dtype=dtypes[1]),
        made(size.value_dim, dtype=dtypes[2]),
        made(),
        made(*diagonal) if gated else None,
    )
    assert parts.scores is not None
    writes = parts.weight.new_empty(*parts.weight.shape[:3], blocks.values)
    dscores, dlows = torch.empty_like(parts.scores), torch.empty_like(parts.scores)
    given: dict[str, Any] = {
        "p_q": x.q,
        "p_k": x.k,
        "p_g": x.log_decay,
        "p_starts": _marks(x),
        "p_since": parts.since,
        "p_until": parts.until,
        "p_whole": parts.whole,
        "p_dout": dout,
        "p_states": states,
        "p_dstates": dstates,
        "p_n": writes,
        "p_dscores": dscores,
        "p_dlows": dlows,
        "p_dg": found.dlog,
        "GROUP": size.group,
        "scale": x.scale,
        **_strides("q", x.q),
        **_strides("k", x.k),
        **_strides("o", dout),
        **_strides("g", x.log_decay),
        **_dims(size, blocks),
        "DECAY": decay,
        "PRECISION": precision,
    }
    programs = parts.weight.shape[0] * parts.weight.shape[1]
    launch(
        writes_kernel,
        programs,
        blocks.writes,
        device=device,
        p_keys=parts.keys,
        p_v=x.v,
        p_weight=parts.weight,
        p_entry=parts.entry,
        p_beta=x.beta,
        p_scores=parts.scores,
        p_lows=parts.lows,
        p_inverse=parts.inverse,
        p_dv=found.dv,
        p_dbeta=found.dbeta,
        **_strides("v", x.v),
        **_strides("b", x.beta),
        BK=blocks.block,
        BV=blocks.writes_values,
        **given,
    )
    launch(
        keys_kernel,
        programs * (blocks.keys // blocks.block),
        blocks.grads,
        device=device,
        p_dx=found.dv,
        p_dq=found.dq,
        p_dk=found.dk,
        LEVELS=blocks.levels,
        BK=blocks.block,
        BV=blocks.block,
        **given,
    )
    return found
