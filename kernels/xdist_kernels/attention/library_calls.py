"""The calls of other projects' attention kernels: the one file that knows their signatures.

    order queries and keys as the plan says (only where they lie otherwise: one pass over each)
    sequences of one length are rows of a batch, views where rows lie so; others are packed
    the library's forward, or its backward given the output and the log-sum-exp of all keys
    back into the order of the caller; keys that nobody sees get gradients of zero

Every query sees a key (library_masks.py sees to it), so no log-sum-exp is infinite. Results are in
the inputs' dtype. Extra memory: what is ordered otherwise, or lies at addresses that the kernels
cannot load from, and backward's copies of out and dout where they are not contiguous.
"""

from __future__ import annotations

import importlib.metadata
import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from xdist_kernels.attention.library_masks import Sequences

_aten: Any = torch.ops.aten


@lru_cache(maxsize=1)
def flash_attn_version() -> tuple[int, int] | None:
    """Of the package flash-attn; None where it is not installed or does not load."""
    try:
        version = importlib.metadata.version("flash-attn")
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        import flash_attn.flash_attn_interface  # noqa: F401
    except (ImportError, OSError) as error:
        # Built for another torch or another CUDA: said, because it was installed to be used.
        logging.getLogger("xdist").warning("flash-attn %s does not load: %s", version, error)
        return None
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def forward(
    name: str, q: Tensor, k: Tensor, v: Tensor, plan: Sequences, *, scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out `[B,n,H,E]` in q's dtype and lse `[B,n,H]` float32 of q `[B,n,H,D]`, k `[B,m,G,D]`,
    v `[B,m,G,E]`, by the library `name`, which must not have refused `plan`."""
    batch = q.shape[0]
    at = plan.placed(q.device, batch)
    q_ = _laid(_ordered(q, at.q_order), plan, plan.q_starts)
    k_, v_ = (_laid(_seen(x, at.k_order, plan), plan, plan.k_starts) for x in (k, v))
    if name == "cudnn":
        out, lse = _cudnn_forward(q_, k_, v_, plan, scale)
    elif name == "flash_attn":
        out, lse = _flash_attn_forward(q_, k_, v_, plan, at.q_starts, at.k_starts, scale, softcap)
    else:
        out, lse = _flash_sdpa_forward(q_, k_, v_, plan, at.q_starts, at.k_starts, scale)
    out = out.reshape(batch, *q.shape[1:3], v.shape[3])
    lse = lse.transpose(-1, -2).reshape(q.shape[:3]).contiguous()
    return _unordered(out, at.q_order), _unordered(lse, at.q_order)


def backward(
    name: str, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, out: Tensor, dout: Tensor,
    plan: Sequences, *, scale: float, softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq `[B,n,H,D]`, dk `[B,m,G,D]`, dv `[B,m,G,E]` in q's dtype; `lse` `[B,n,H]` and `out`
    `[B,n,H,E]` are those of all keys, any float dtype."""
    batch = q.shape[0]
    at = plan.placed(q.device, batch)
    q_, out_, dout_ = (
        _laid(_ordered(x.to(q.dtype), at.q_order), plan, plan.q_starts) for x in (q, out, dout)
    )
    k_, v_ = (_laid(_seen(x, at.k_order, plan), plan, plan.k_starts) for x in (k, v))
    # cuDNN asks that both lie alike, flash copies what is not contiguous.
    out_, dout_ = out_.contiguous(), dout_.contiguous()
    lse_ = _heads_of(_ordered(lse, at.q_order), plan).float().contiguous()
    args = (q_, k_, v_, lse_, out_, dout_)
    if name == "cudnn":
        found = _cudnn_backward(*args, plan, scale)
    elif name == "flash_attn":
        found = _flash_attn_backward(*args, plan, at.q_starts, at.k_starts, scale, softcap)
    else:
        found = _flash_sdpa_backward(*args, plan, at.q_starts, at.k_starts, scale)
    dq = _unordered(found[0].reshape(q.shape), at.q_order)
    dk, dv = (
        _unseen(d.reshape(batch, -1, *x.shape[2:]), x.shape[1], at.k_order, plan)
        for d, x in zip(found[1:], (k, v), strict=True)
    )
    return dq, dk, dv


def _ordered(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(1, order)


def _unordered(x: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return x
    return torch.empty_like(x, memory_format=torch.contiguous_format).index_copy_(1, order, x)


def _seen(x: Tensor, order: Tensor | None, plan: Sequences) -> Tensor:
    """The keys that queries see, in the plan's order."""
    return x[:, plan.seen] if order is None else x.index_select(1, order[plan.seen])


def _unseen(d: Tensor, tokens: int, order: Tensor | None, plan: Sequences) -> Tensor:
    """Gradients of the keys seen, among all `tokens` keys."""
    if order is None and d.shape[1] == tokens:
        return d
    whole = d.new_zeros(d.shape[0], tokens, *d.shape[2:])
    if order is None:
        whole[:, plan.seen] = d
        return whole
    return whole.index_copy_(1, order[plan.seen], d)


def _laid(x: Tensor, plan: Sequences, starts: Tensor) -> Tensor:
    """`[B,n,...]` as `[B * sequences, length, ...]`, or packed `[B * n, ...]`."""
    x = x if _loadable(x) else x.contiguous()
    if not plan.alike:
        return x.flatten(0, 1)
    return x.unflatten(1, (plan.count, int(starts[1]))).flatten(0, 1)


def _loadable(x: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes, of which the kernels load at once."""
    step = 16 // x.element_size()
    strides = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    rows = all(size == 1 or stride % step == 0 for size, stride in strides)
    return rows and x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def _heads_of(lse: Tensor, plan: Sequences) -> Tensor:
    """`[B,n,H]` as `[B * sequences, H, length]`, or packed `[H, B * n]`."""
    if not plan.alike:
        return lse.flatten(0, 1).t()
    return lse.unflatten(1, (plan.count, int(plan.q_starts[1]))).flatten(0, 1).transpose(1, 2)


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Sequences, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    found = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, plan.right == 0, False, scale=scale
    )
    return found[0].transpose(1, 2), found[1].reshape(q.shape[:3])


def _cudnn_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, out: Tensor, dout: Tensor, plan: Sequences,
    scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    # torch keeps what it built for a backward by the strides of q, k and v alone (cudnn/MHA.cpp):
    # out and dout must lie in the order of q's dims, as any other caller's do.
    q = q if q.stride(1) >= q.stride(2) else q.contiguous()
    q, k, v, out, dout = (x.transpose(1, 2) for x in (q, k, v, out, dout))
    # Dropout's seed and offset, of which nothing is drawn.
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    found = _aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse.unsqueeze(-1), seed, seed, None, None, None,
        q.shape[2], k.shape[2], 0.0, plan.right == 0, scale=scale,
    )  # fmt: skip
    return tuple(x.transpose(1, 2) for x in found)


def _flash_sdpa_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Sequences, q_starts: Tensor, k_starts: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    causal, left, right = _window(plan)
    found = _aten._flash_attention_forward(
        q, k, v, *_packing(plan, q_starts, k_starts), 0.0, causal, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return found[0], found[1]


def _flash_sdpa_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, out: Tensor, dout: Tensor, plan: Sequences,
    q_starts: Tensor, k_starts: Tensor, scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    causal, left, right = _window(plan)
    # The state of a generator of which nothing is drawn.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    found = _aten._flash_attention_backward(
        dout, q, k, v, out, lse, *_packing(plan, q_starts, k_starts), 0.0, causal,
        state, torch.empty(0, device=q.device),
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return tuple(found)


def _flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Sequences, q_starts: Tensor, k_starts: Tensor,
    scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    import flash_attn.flash_attn_interface as flash_attn

    causal, left, right = _window(plan)
    options = {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": softcap or 0.0,
        "alibi_slopes": None,
        "return_softmax": False,
    }
    if plan.alike:
        found = flash_attn._wrapped_flash_attn_forward(q, k, v, **options)
    else:
        packing = _packing(plan, q_starts, k_starts)
        found = flash_attn._wrapped_flash_attn_varlen_forward(q, k, v, *packing, **options)
    return found[0], found[1]


def _flash_attn_backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, out: Tensor, dout: Tensor, plan: Sequences,
    q_starts: Tensor, k_starts: Tensor, scale: float, softcap: float | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    import flash_attn.flash_attn_interface as flash_attn

    causal, left, right = _window(plan)
    options = {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": softcap or 0.0,
        "alibi_slopes": None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "rng_state": None,
    }
    given = (dout, q, k, v, out, lse)
    found = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if plan.alike:
        flash_attn._wrapped_flash_attn_backward(*given, *found, **options)
    else:
        packing = _packing(plan, q_starts, k_starts)
        flash_attn._wrapped_flash_attn_varlen_backward(*given, *found, *packing, **options)
    return found


def _window(plan: Sequences) -> tuple[bool, int, int]:
    """Whether it is causal, and the window's two sides."""
    return (plan.left, plan.right) == (-1, 0), plan.left, plan.right


def _packing(plan: Sequences, q_starts: Tensor, k_starts: Tensor) -> tuple[Any, ...]:
    """Starts of queries and keys (None: rows of a batch), the longest sequence of each."""
    starts = (None, None) if plan.alike else (q_starts, k_starts)
    return *starts, *plan.longest
