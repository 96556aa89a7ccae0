"""Causal depthwise convolution over a run of tokens, with an explicit backward.

    y = activation(bias + sum over d = 0..W-1 of weight[:, W-1-d] * (x shifted by d tokens))

A tap reads x d tokens back only where the token is at least d tokens into its document. The
W-1 tokens before the run come as `prefix`. Shifts are views, so a run costs W multiply-adds over
[B,n,C]; work proceeds in tiles, and the backward pass recomputes the sum before the activation.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from xdist_kernels.errors import KernelError

# Some hundred channels of a tile stay in a core's cache: a third faster than 4096 tokens.
TILE_TOKENS = 1024


def check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> None:
    """Raise KernelError unless x is [B,n,C], weight [C,W], bias [C], activation None or silu."""
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or not weight.shape[1]:
        raise KernelError(
            f"x must be [B,n,C] and weight [C,W], W >= 1; got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise KernelError(f"bias must be [C] = [{weight.shape[0]}]; got {tuple(bias.shape)}")
    if activation not in (None, "silu"):
        raise KernelError(f"activation must be None or 'silu'; got {activation!r}")


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _weight_of(
    weight: Tensor, shift: int, into_document: Tensor | None, wide: torch.dtype
) -> Tensor:
    """[C], or [n,C] zero where the token `shift` back is of another document."""
    column = weight[:, weight.shape[1] - 1 - shift].to(wide)
    if into_document is None or shift == 0:
        return column
    return (into_document >= shift)[:, None] * column


def _padded(x: Tensor, prefix: Tensor, start: int, stop: int) -> Tensor:
    """Tokens [start - (W-1), stop) of the run, the first of them from `prefix` [B,W-1,C]."""
    before = prefix.shape[1]
    if start >= before:
        return x[:, start - before : stop]
    return torch.cat([prefix[:, start:], x[:, :stop]], 1)


def _sums(
    around: Tensor, weight: Tensor, bias: Tensor | None, into_document: Tensor | None
) -> Tensor:
    """The tile before its activation, [B,n,C] in float32 or wider."""
    wide = _wide(around)
    # Converted first: a product of two dtypes is five times slower than one of equal dtypes.
    around = around.to(wide)
    last = weight.shape[1] - 1
    n = around.shape[1] - last
    total = around[:, last:] * _weight_of(weight, 0, None, wide)
    for shift in range(1, last + 1):
        taps = _weight_of(weight, shift, into_document, wide)
        total.addcmul_(around[:, last - shift : last - shift + n], taps)
    return total if bias is None else total.add_(bias)


def _zero_prefix(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2])


def causal_conv_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    prefix: Tensor | None = None,
    into_document: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y [B,n,C] in the dtype of x, written to `out` where one is given (its dtype then).

    x [B,n,C], weight [C,W], bias [C] or None; `prefix` [B,W-1,C] holds the tokens before the run
    (zeros when None; a shorter history is filled with zeros in front by the caller);
    `into_document` int64 [n] counts the tokens of its document before each token (None: no
    document starts at or near the run). Products run in float32, or float64 for float64.
    """
    prefix = _zero_prefix(x, weight) if prefix is None else prefix
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for start in range(0, x.shape[1], TILE_TOKENS):
        stop = min(start + TILE_TOKENS, x.shape[1])
        inside = None if into_document is None else into_document[start:stop]
        total = _sums(_padded(x, prefix, start, stop), weight, bias, inside)
        out[:, start:stop] = silu(total, inplace=True) if activation else total
    return out


def causal_conv_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    *,
    activation: str | None = None,
    prefix: Tensor | None = None,
    into_document: Tensor | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """dx [B,n,C], dweight [C,W], dbias (None without bias), dprefix [B,W-1,C].

    dweight, dbias and dprefix are float32 or wider, since they are added across ranks. `into`
    [B,W-1+n,C], float32 or wider, is added to: the gradients of prefix and run side by side, of
    which dprefix and dx, not narrowed, are then parts.
    """
    prefix = _zero_prefix(x, weight) if prefix is None else prefix
    wide = _wide(x)
    batch, n, channels = x.shape
    last = weight.shape[1] - 1
    dweight = torch.zeros(weight.shape, dtype=wide, device=x.device)
    dbias = None if bias is None else torch.zeros(channels, dtype=wide, device=x.device)
    # Gradient of prefix and run together; a tile adds to the W-1 tokens before its own.
    daround = into
    if daround is None:
        daround = torch.zeros(batch, last + n, channels, dtype=wide, device=x.device)
    for start in range(0, n, TILE_TOKENS):
        stop = min(start + TILE_TOKENS, n)
        inside = None if into_document is None else into_document[start:stop]
        around = _padded(x, prefix, start, stop).to(wide)
        dsum = dout[:, start:stop].to(wide)
        if activation:
            total = _sums(around, weight, bias, inside)
            gate = total.sigmoid()
            dsum = dsum * gate * (1 + total * (1 - gate))
        if dbias is not None:
            dbias += dsum.sum((0, 1))
        for shift in range(last + 1):
            at = slice(start + last - shift, stop + last - shift)
            seen = around[:, last - shift : last - shift + stop - start]
            reach = dsum if inside is None else dsum * (inside >= shift)[:, None]
            dweight[:, last - shift] += (reach * seen).sum((0, 1))
            daround[:, at].addcmul_(reach, weight[:, last - shift].to(wide))
    dx = daround[:, last:] if into is not None else daround[:, last:].to(x.dtype)
    return dx, dweight, dbias, daround[:, :last]
