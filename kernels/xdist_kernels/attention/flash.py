"""Pieces of attention by torch's own CPU kernel, which takes no mask but the causal one.

    for each batch row and a few key heads at once:
        forward                                             for each piece of the run's keys
            o, l = kernel(q, k, v, causal on the diagonal or not)
            merge (o, l) into what earlier pieces gave
        backward
            y = a vector with rowsum(dO * y) = delta        what the kernel takes for the output
            dq, dk, dv += kernel's gradients of (q, k, v) given lse and y

The kernel sees q, k and v through strides: nothing is copied for shared key heads. Everything is
float32, float64 for float64; narrower inputs are widened a few heads at a time, because the kernel
would round what pieces add. Extra memory: one chunk of heads of a run's outputs; where all heads
go at once (`forward_whole`, `backward_whole`) nothing, and y where the output is not at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from xdist_kernels.attention.pieces import Piece
from xdist_kernels.merge.torch import merge_

_NAME = "_scaled_dot_product_flash_attention_for_cpu"
_forward: Any = getattr(torch.ops.aten, _NAME, None)
_backward: Any = getattr(torch.ops.aten, _NAME + "_backward", None)
# Elements of one chunk's queries: short runs take several key heads a call.
_CHUNK_ELEMENTS = 512 * 1024
# From this version on the kernel itself reads one key head for several query heads, and adds up
# its gradients. Before, it is shown each key head as often.
_SHARES_HEADS = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)
# The kernel hands row strides to a matrix product that counts in 32 bits.
_FAR = 2**31


def refusal(q: Tensor, k: Tensor, v: Tensor, softcap: float | None, drops: bool) -> str | None:
    """Why the kernel cannot serve this call at all; None where it can."""
    if _forward is None or _backward is None:
        return f"this torch has no aten::{_NAME}"
    if q.device.type != "cpu":
        return f"tensors are on {q.device}"
    if softcap is not None:
        return "there is a softcap"
    if drops:
        return "there is dropout"
    if q.shape[3] != v.shape[3]:
        return f"head dims differ: {q.shape[3]} and {v.shape[3]}"
    if q.shape[3] == 0 or q.shape[0] == 0:
        return "there are no elements"
    if any(x.stride(1) >= _FAR or x.stride(2) >= _FAR for x in (q, k, v)):
        return "tokens or heads lie 2^31 elements apart"
    return None


def heads_at_once(batch: int, rows: int, dim: int) -> int:
    """How many heads of `rows` queries fill a call: as many as there are threads, over which the
    kernel's backward shares heads out, and more where they are short."""
    return max(torch.get_num_threads(), _CHUNK_ELEMENTS // max(1, batch * rows * dim))


def forward_whole(
    q: Tensor, k: Tensor, v: Tensor, pieces: tuple[Piece, ...], scale: float
) -> tuple[Tensor, Tensor] | None:
    """`forward_run` of all queries and heads at once, the kernel's result not copied; None for
    several batch rows, or a dtype narrower than sums."""
    if not pieces or not _is_wide(q.dtype) or q.shape[0] != 1:
        return None
    per_group = q.shape[2] // k.shape[2]
    out, lse = _merged(_heads(q[0], per_group, q.dtype), k[0], v[0], pieces, scale)
    return _ungrouped(out), _ungrouped(lse.unsqueeze(-1)).squeeze(-1).contiguous()


def backward_whole(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor | None, dout: Tensor,
    out: Tensor | None, pieces: tuple[Piece, ...], scale: float,
) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
    """`backward_run` of all queries and heads at once, dq, dk, dv `[B,m,G,D]` not copied; None for
    a dtype narrower than sums, several pieces, or key heads that this torch cannot share."""
    one = len(pieces) == 1 and (pieces[0].start, pieces[0].stop) == (0, k.shape[1])
    shared = q.shape[2] != k.shape[2]
    if not one or (shared and not _SHARES_HEADS) or not _is_wide(q.dtype):
        return None
    # Heads stay heads: seen as rows of a batch, the kernel would copy one of its results.
    q_, k_, v_, do_ = (_last_contiguous(x).transpose(1, 2) for x in (q, k, v, dout))
    if out is not None:
        y_ = _last_contiguous(out).transpose(1, 2)
    elif delta is not None:
        y_ = _stand_in(do_, delta.transpose(1, 2).unsqueeze(-1))
    else:
        return None
    l_, causal = lse.transpose(1, 2), pieces[0].causal
    dq, dk, dv = _backward(do_, q_, k_, v_, y_, l_, 0.0, causal, scale=scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def forward_run(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pieces: tuple[Piece, ...],
    scale: float,
) -> None:  # fmt: skip
    """Fills `out` `[B,r,H,E]` and `lse` `[B,r,H]` of a run of queries q `[B,r,H,D]`.

    k `[B,m,G,D]`, v `[B,m,G,E]` are all keys, of which `pieces` are seen.
    """
    if not pieces:
        out.zero_()
        lse.fill_(-torch.inf)
        return
    wide = out.dtype
    for b, hs, gs in _chunks(q, k):
        per_group = (hs.stop - hs.start) // (gs.stop - gs.start)
        q_ = _heads(q[b, :, hs], per_group, wide)
        found = _merged(q_, k[b, :, gs], v[b, :, gs], pieces, scale)
        _grouped(out[b, :, hs], per_group).copy_(found[0])
        _grouped(lse[b, :, hs].unsqueeze(-1), per_group).copy_(found[1].unsqueeze(-1))


def backward_run(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dout: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, pieces: tuple[Piece, ...], scale: float,
) -> None:  # fmt: skip
    """Fills `dq` of a run of queries and adds to `dk` `[B,G,m,D]` and `dv` `[B,G,m,E]`."""
    if not pieces:
        dq.zero_()
        return
    wide = dq.dtype
    for b, hs, gs in _chunks(q, k):
        per_group = (hs.stop - hs.start) // (gs.stop - gs.start)
        q_, do_ = (_heads(x[b, :, hs], per_group, wide) for x in (q, dout))
        l_, delta_ = (_heads(x[b, :, hs].unsqueeze(-1), per_group, wide) for x in (lse, delta))
        y_ = _stand_in(do_, delta_)
        dq_ = _grouped(dq[b, :, hs], per_group)
        for i, piece in enumerate(pieces):
            at = slice(piece.start, piece.stop)
            k_, v_ = (_shared(x[b, at, gs], per_group, wide) for x in (k, v))
            got_q, got_k, got_v = _backward(
                do_, q_, k_, v_, y_, l_.squeeze(-1), 0.0, piece.causal, scale=scale
            )
            if i == 0:
                dq_.copy_(got_q)
            else:
                dq_.add_(got_q)
            dk[b, gs, at] += got_k.sum(1) if per_group > 1 else got_k[:, 0]
            dv[b, gs, at] += got_v.sum(1) if per_group > 1 else got_v[:, 0]


def _merged(
    q: Tensor, k: Tensor, v: Tensor, pieces: tuple[Piece, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """Out `[G,R,r,E]` and lse `[G,R,r]` of q `[G,R,r,D]` over all pieces of k, v `[m,G,D]`."""
    found: tuple[Tensor, Tensor] | None = None
    for piece in pieces:
        at = slice(piece.start, piece.stop)
        k_, v_ = (_shared(x[at], q.shape[1], q.dtype) for x in (k, v))
        o_, l_ = _forward(q, k_, v_, 0.0, piece.causal, scale=scale)
        if found is None:
            found = o_, l_
        else:
            merge_(*found, o_, l_)
    assert found is not None
    return found


def _is_wide(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def _stand_in(dout: Tensor, delta: Tensor) -> Tensor:
    """Rows y with rowsum(dout * y) = delta: delta / dout_j at one element j, 0 at the others.

    The kernel asks for the output, and uses nothing of it but that sum. j is the first element;
    where that is zero or too small for the quotient, the largest one of every row. A row of zeros
    has delta zero and y zero.
    """
    first = delta / dout[..., :1]
    if bool(first.isfinite().all()):
        found = torch.zeros_like(dout)
        found[..., :1] = first
        return found
    at = dout.abs().argmax(-1, keepdim=True)
    top = dout.gather(-1, at)
    return torch.zeros_like(dout).scatter_(-1, at, (delta / top).masked_fill_(top == 0, 0.0))


def _chunks(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """(batch row, query heads, key heads) of one call: heads in multiples of the threads, over
    which the kernel's backward shares them out, and more of them where they are short."""
    batch, rows, heads, dim = q.shape
    groups = k.shape[2]
    per_group = heads // groups
    most = max(heads_at_once(1, rows, dim), per_group)
    count = min(groups, max(1, most // per_group))
    for b in range(batch):
        for g in range(0, groups, count):
            stop = min(groups, g + count)
            yield b, slice(g * per_group, stop * per_group), slice(g, stop)


def _grouped(x: Tensor, per_group: int) -> Tensor:
    """`[r,H,D]` seen as `[G,R,r,D]`."""
    return x.unflatten(1, (-1, per_group)).permute(1, 2, 0, 3)


def _ungrouped(x: Tensor) -> Tensor:
    """`[G,R,r,D]` as `[1,r,H,D]`: a view, where the kernel kept the order of its queries."""
    return x.permute(2, 0, 1, 3).flatten(1, 2).unsqueeze(0)


def _heads(x: Tensor, per_group: int, dtype: torch.dtype) -> Tensor:
    return _grouped(_last_contiguous(x.to(dtype)), per_group)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _shared(x: Tensor, per_group: int, dtype: torch.dtype) -> Tensor:
    """Keys or values `[m,G,D]` as `[G,R,m,D]`, one memory for the R query heads of a key head."""
    x = _last_contiguous(x.to(dtype))
    return x.transpose(0, 1).unsqueeze(1).expand(-1, per_group, -1, -1)
