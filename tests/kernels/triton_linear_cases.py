"""Tiles of linear attention for the Triton kernels' tests: drawn, and what the token loop says."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from xdist_kernels.linear.reference import linear_attention_reference

SCALE = 0.3
# float32 is law 1's; float16: operands, scores, states and results are rounded to 2^-11 each.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


class Drawn(NamedTuple):
    """float64 leaves with values that the dtype under test holds, in memory with gaps."""

    q: Tensor  # [B, T, G, K]
    k: Tensor  # [B, T, G, K]
    v: Tensor  # [B, T, H, V]
    log_decay: Tensor | None  # [B, T, H, 1 or K]
    state: Tensor  # [B, H, K, V]


class Wanted(NamedTuple):
    """Of a float64 loop over tokens, with random gradients of both results."""

    out: Tensor
    end: Tensor
    dout: Tensor
    dend: Tensor
    grads: list[Tensor | None]  # as Drawn


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-300))


def drawn(
    n: int,
    decay: str,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    heads: tuple[int, int] = (2, 1),
    dims: tuple[int, int] = (20, 12),
    strength: float = 0.1,
) -> Drawn:
    """heads: value heads and key heads; dims: K and V."""
    (value_heads, key_heads), (key_dim, width) = heads, dims

    def made(*sizes: int, exact: torch.dtype = dtype) -> Tensor:
        return torch.randn(sizes).to(exact).double()

    sizes = {"scalar": 1, "diagonal": key_dim}
    log_decay = None
    if decay != "none":
        # Laid out by heads, as a projection per head leaves it.
        shape = (batch, value_heads, n, sizes[decay])
        log_decay = (-strength * torch.rand(shape)).double().transpose(1, 2)
    return Drawn(
        made(batch, n, key_heads, key_dim),
        made(batch, n, key_heads, key_dim),
        made(batch, n, value_heads, width),
        log_decay,
        made(batch, value_heads, key_dim, width, exact=torch.float32),
    )


def token_loop(
    given: Drawn, cuts: tuple[int, ...], dtype: torch.dtype, dout: Tensor | None = None
) -> Wanted:
    """cuts: borders of documents, 0 and n among them; dout: drawn where it is None."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in given]
    q, k, v, log_decay, state = leaves
    assert q is not None
    assert k is not None
    assert v is not None
    assert state is not None
    decay = log_decay
    if log_decay is not None and log_decay.shape[3] == 1:
        decay = log_decay[..., 0]
    zeros = state.new_zeros(state.shape[0], len(cuts) - 2, *state.shape[1:])
    firsts = torch.cat([state[:, None], zeros], 1)
    out, ends = linear_attention_reference(
        q, k, v, decay, initial_state=firsts, cu_seqlens=cuts, scale=SCALE
    )
    end = ends[:, -1]
    if dout is None:
        dout = torch.randn(out.shape).to(dtype).double()
    dend = torch.randn(end.shape).double()
    wanted = [x for x in leaves if x is not None]
    loss = (out * dout).sum() + (end * dend).sum()
    rest = iter(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    grads = [None if x is None else next(rest) for x in leaves]
    return Wanted(out.detach(), end.detach(), dout, dend, grads)


def narrowed(given: Drawn, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v in `dtype` as slices of one tensor, log_decay and the state in float32."""
    parts = [given.q, given.k, given.v]
    fused = torch.cat([x.flatten(2) for x in parts], -1).to(dtype)
    sizes = [x.shape[2] * x.shape[3] for x in parts]
    views = [
        view.unflatten(2, x.shape[2:])
        for view, x in zip(fused.split(sizes, -1), parts, strict=True)
    ]
    decay: Any = None if given.log_decay is None else given.log_decay.float()
    return (*views, decay, given.state.float())


def apart(*values: Tensor) -> list[Tensor]:
    """The same values [1,T,1,D], of one dtype, as views of one memory: the last token lies 2^31
    elements behind the first, and pages between two tokens are never touched."""
    tokens, widths = values[0].shape[1], [x.shape[3] for x in values]
    stride = 2**31 // (tokens - 1) + 1
    memory = torch.empty(stride * (tokens - 1) + sum(widths), dtype=values[0].dtype)
    rows = memory.as_strided((1, tokens, 1, sum(widths)), (0, stride, sum(widths), 1))
    views = list(rows.split(widths, -1))
    for view, x in zip(views, values, strict=True):
        assert (tokens - 1) * view.stride(1) > 2**31
        view.copy_(x)
    return views


def starts_of(cuts: tuple[int, ...]) -> Tensor | None:
    """True where a document starts behind the first token; None where none does."""
    if len(cuts) == 2:
        return None
    starts = torch.zeros(cuts[-1], dtype=torch.bool)
    starts[list(cuts[1:-1])] = True
    return starts


def compare(found: Any, wanted: Any, dtype: torch.dtype, way: str) -> None:
    """Each result within its tolerance; None is not compared."""
    for index, (x, want) in enumerate(zip(found, wanted, strict=True)):
        if x is None or want is None:
            continue
        assert x.shape == want.shape, (way, index, x.shape, want.shape)
        if want.abs().max() == 0:
            assert x.abs().max() == 0, (way, index)
        else:
            size = error(x, want)
            assert size <= TOLERANCE[dtype], (way, index, size)
