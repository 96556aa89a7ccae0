"""Starts the kernels that make gradients of the inputs; shapes as in triton_launches.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xdist_kernels.delta.torch import Inputs
from xdist_kernels.delta.triton_blocks import Blocks, Sizes
from xdist_kernels.delta.triton_gradients import keys_kernel, writes_kernel
from xdist_kernels.delta.triton_launches import (
    DIAGONAL,
    Parts,
    blocks_for,
    decay_of,
    dims_of,
    marks_of,
    strides_of,
)
from xdist_kernels.launch import launch


class Found(NamedTuple):
    """Gradients; dq and dk of every value head."""

    dq: Tensor  # [B, T, H, K]
    dk: Tensor  # [B, T, H, K]
    dv: Tensor  # [B, T, H, V]
    dbeta: Tensor  # [B, T, H] float32
    dlog: Tensor | None  # as log_decay, float32


class Chains(NamedTuple):
    """What both chains kept."""

    states: Tensor  # [R, N, KP, VP] before each chunk
    dstates: Tensor  # [R, N, KP, VP] gradients of those behind


def _room(x: Inputs, size: Sizes, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> Found:
    def made(*dims: int, dtype: torch.dtype = torch.float32) -> Tensor:
        tokens = (size.batch, size.tokens, size.heads)
        return torch.empty(*tokens, *dims, dtype=dtype, device=x.v.device)

    diagonal = (size.key_dim,) if decay_of(x) == DIAGONAL else ()
    return Found(
        made(size.key_dim, dtype=dtypes[0]),
        made(size.key_dim, dtype=dtypes[1]),
        made(size.value_dim, dtype=dtypes[2]),
        made(),
        None if x.log_decay is None else made(*diagonal),
    )


def gradients(
    x: Inputs,
    parts: Parts,
    chains: Chains,
    dout: Tensor,
    precision: str,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
) -> Found:
    """Gradients of a tile's inputs, those of q, k and v in `dtypes`."""
    size, blocks = blocks_for(x, parts.weight.dtype, precision, parts.chunk)
    found = _room(x, size, dtypes)
    assert parts.scores is not None
    given: dict[str, Any] = {
        "p_q": x.q,
        "p_k": x.k,
        "p_g": x.log_decay,
        "p_starts": marks_of(x),
        "p_since": parts.since,
        "p_until": parts.until,
        "p_whole": parts.whole,
        "p_dout": dout,
        "p_states": chains.states,
        "p_dstates": chains.dstates,
        "p_n": parts.weight.new_empty(*parts.weight.shape[:3], blocks.values),
        "p_dscores": torch.empty_like(parts.scores),
        "p_dlows": torch.empty_like(parts.scores),
        "p_dg": found.dlog,
        "GROUP": size.group,
        "scale": x.scale,
        **strides_of("q", x.q),
        **strides_of("k", x.k),
        **strides_of("o", dout),
        **strides_of("g", x.log_decay),
        **dims_of(size, blocks),
        "DECAY": decay_of(x),
        "PRECISION": precision,
    }
    _start(x, parts, found, blocks, given)
    return found


def _start(x: Inputs, parts: Parts, found: Found, blocks: Blocks, given: dict[str, Any]) -> None:
    programs = parts.weight.shape[0] * parts.weight.shape[1]
    launch(
        writes_kernel,
        programs,
        blocks.writes,
        device=x.v.device,
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
        **strides_of("v", x.v),
        **strides_of("b", x.beta),
        BK=blocks.block,
        BV=blocks.writes_values,
        **given,
    )
    launch(
        keys_kernel,
        programs * (blocks.keys // blocks.grads_keys),
        blocks.grads,
        device=x.v.device,
        p_dx=found.dv,
        p_dq=found.dq,
        p_dk=found.dk,
        LEVELS=blocks.levels,
        BK=blocks.grads_keys,
        BV=blocks.block,
        **given,
    )
