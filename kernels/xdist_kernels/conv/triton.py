"""The causal convolution of a run on a GPU: the functions of torch.py by Triton.

Forward reads x once and writes y; backward reads x and dout once and writes dx, with the sums
before SiLU made again in registers. dweight and dbias are summed span by span and the spans' parts
added afterwards, always in the same order. docs/kernels/conv.md counts the bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xdist_kernels.conv.triton_kernels import conv_backward, conv_forward
from xdist_kernels.launch import Config, launch

# Tokens a warp holds in registers at once, and neighbouring channels of a thread.
HELD_TOKENS, CHANNELS_A_THREAD = 16, 2
WARP_CHANNELS = 32 * CHANNELS_A_THREAD
# A warp's span: at its ends it reads W - 1 tokens that others read too; backward leaves W + 1 sums.
MOST_SPAN_TOKENS, LEAST_SPAN_TOKENS = 256, 32
# Programs that fill an H200 (132 x 12 warps) twice over.
PROGRAMS = 3168
# Code grows with the square of the taps, and with it the time to compile it.
LARGEST_WIDTH = 8
ONE_WARP = Config(1, 2)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> str | None:
    """Why these kernels cannot serve x [B,n,C], weight [C,W], bias [C]; None: they can."""
    for name, given in (("x", x), ("weight", weight), ("bias", bias)):
        if given is not None and given.dtype not in _DTYPES:
            return f"{name} is {given.dtype}, the kernels add up in float32: use backend='torch'"
    if weight.shape[1] > LARGEST_WIDTH:
        return (
            f"a thread holds the taps in registers, {LARGEST_WIDTH} at most, the convolution has "
            f"{weight.shape[1]}: use backend='torch'"
        )
    if activation not in (None, "silu"):
        return f"the kernels have no activation {activation!r}: use None or 'silu'"
    return None


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
    """y [B,n,C] in the dtype of x, written to `out` where one is given; arguments in torch.py.
    Products run in float32."""
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    x, prefix = _rows(x), _history(prefix, width)
    made = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    direct = made if made is _rows(made) else torch.empty_like(made).contiguous()
    spans, span = _spans(batch, tokens, channels)
    launch(
        conv_forward, batch * spans * _cdiv(channels, WARP_CHANNELS), ONE_WARP, device=x.device,
        p_x=x, p_weight=weight.contiguous(), p_bias=_contiguous(bias), p_prefix=prefix,
        p_into=_contiguous(into_document), p_out=direct, x_b=x.stride(0), x_t=x.stride(1),
        **_strides("prefix", prefix), **_strides("out", direct), T=tokens, channels=channels,
        spans=spans, span=span, **_blocks(width), SILU=activation == "silu",
    )  # fmt: skip
    return made if direct is made else made.copy_(direct)


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
    """dx [B,n,C], dweight [C,W], dbias (None without bias), dprefix [B,W-1,C]; see torch.py.

    dweight, dbias and dprefix are float32. `into` [B,W-1+n,C] float32 is added to; dprefix and dx,
    not narrowed, are then parts of it.
    """
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    x, dout, prefix = _rows(x), _rows(dout), _history(prefix, width)
    wide = {"dtype": torch.float32, "device": x.device}
    around = into if into is None or _rows(into) is into else into.contiguous()
    if around is not None:
        dprefix, dx = around[:, : width - 1], around[:, width - 1 :]
    else:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dprefix = torch.empty((batch, width - 1, channels), **wide)  # type: ignore[call-overload]
    if tokens == 0 and around is None:
        dprefix.zero_()
    spans, span = _spans(batch, tokens, channels)
    sums = torch.empty((batch, spans, width + 1, channels), **wide)  # type: ignore[call-overload]
    launch(
        conv_backward, batch * spans * _cdiv(channels, WARP_CHANNELS), ONE_WARP,
        device=x.device, p_x=x, p_weight=weight.contiguous(), p_bias=_contiguous(bias),
        p_prefix=prefix,
        p_into=_contiguous(into_document), p_dout=dout, p_dx=dx, p_dprefix=dprefix, p_sums=sums,
        x_b=x.stride(0), x_t=x.stride(1), **_strides("prefix", prefix), **_strides("dout", dout),
        **_strides("dx", dx), **_strides("dprefix", dprefix), T=tokens, channels=channels,
        spans=spans, span=span, **_blocks(width), SILU=activation == "silu",
        ADD=into is not None,
    )  # fmt: skip
    if around is not None and around is not into:
        assert into is not None
        into.copy_(around)
        dprefix, dx = into[:, : width - 1], into[:, width - 1 :]
    total = sums.sum((0, 1))
    return dx, total[:width].t(), None if bias is None else total[width], dprefix


def _spans(batch: int, tokens: int, channels: int) -> tuple[int, int]:
    """How many spans the tokens are cut into, and the tokens of one, whole tiles."""
    wanted = _cdiv(PROGRAMS, max(1, batch * _cdiv(channels, WARP_CHANNELS)))
    span = min(MOST_SPAN_TOKENS, max(LEAST_SPAN_TOKENS, _cdiv(tokens, wanted)))
    span = _cdiv(span, HELD_TOKENS) * HELD_TOKENS
    return _cdiv(tokens, span), span


def _blocks(width: int) -> dict[str, int]:
    """Sizes that both kernels are made for."""
    return {
        "W": width, "P": _power(width - 1), "BW": _power(width + 1), "BT": HELD_TOKENS,
        "BC": WARP_CHANNELS, "PER": CHANNELS_A_THREAD,
    }  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """x, copied unless its channels lie side by side; the kernels take any other strides."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _history(prefix: Tensor | None, width: int) -> Tensor | None:
    return None if prefix is None or width == 1 else _rows(prefix)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _strides(name: str, x: Tensor | None) -> dict[str, int]:
    """Of batch and token, as the kernels name them."""
    return {
        f"{name}_b": 0 if x is None else x.stride(0),
        f"{name}_t": 0 if x is None else x.stride(1),
    }


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _power(size: int) -> int:
    """The least power of two that is not smaller, at least 1."""
    return 1 << max(0, size - 1).bit_length()
