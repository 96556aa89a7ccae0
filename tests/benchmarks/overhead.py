"""What xdist adds on one rank: public functions beside the same kernels in an autograd Function.

Forward and backward, CPU time, interleaved pairs in changing order, one thread. A third arm, the
kernels once more, shows what the machine's noise makes of no difference at all. The kernels' call
is given its spans; xdist makes them anew in each direction, which counts against it.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import xdist
from xdist.documents import Documents
from xdist_kernels import linear
from xdist_kernels.attention.torch import (
    attention_backward,
    attention_delta,
    attention_forward,
)
from xdist_kernels.conv.torch import causal_conv_backward, causal_conv_forward

PAIRS = 20
SAMPLE_S = 0.3  # CPU time of one sample at least: a sample is as many calls as that takes
TOKENS = 16384
WINDOW = 256
LINEAR_TILE = 4096  # tokens, as xdist's


class PlainAttention(torch.autograd.Function):
    """The attention kernel with spans made beforehand."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Any, positions: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        out, lse = attention_forward(q, k, v, scale=scale, spans=spans, k_positions=positions)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (scale, spans, positions)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        q, k, v, out, lse = ctx.saved_tensors
        scale, spans, positions = ctx.rest
        delta = attention_delta(out, dout)
        found = attention_backward(
            q, k, v, lse, delta, dout, scale=scale, spans=spans, k_positions=positions
        )
        return (*found, None, None)


class PlainLinear(torch.autograd.Function):
    """The linear-attention kernels, tile by tile."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, log_decay)
        out, ctx.states = torch.empty_like(v), []
        state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
        for at in _linear_tiles(q):
            ctx.states.append(state)
            out[:, at], state = linear.run(_prepared(at, q, k, v, log_decay), state)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        grads = [torch.empty_like(x) for x in ctx.saved_tensors]
        dstate = torch.zeros_like(ctx.states[0])
        spans = _linear_tiles(dout)
        for at, state in zip(reversed(spans), reversed(ctx.states), strict=True):
            tile = _prepared(at, *ctx.saved_tensors)
            found, dstate = linear.backward(tile, state, dout[:, at], dstate)
            *own, dlog = found
            assert dlog is not None
            for grad, part in zip(grads, (*own, dlog[..., 0]), strict=True):
                grad[:, at] = part
        return tuple(grads)


def _linear_tiles(x: Tensor) -> list[slice]:
    return [slice(start, start + LINEAR_TILE) for start in range(0, x.shape[1], LINEAR_TILE)]


def _prepared(at: slice, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> linear.Prepared:
    inputs = (q[:, at], k[:, at], v[:, at], log_decay[:, at, :, None])
    return linear.prepare(*inputs, scale=q.shape[-1] ** -0.5)


class PlainConvolution(torch.autograd.Function):
    """The convolution kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return causal_conv_forward(x, weight, activation="silu")

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        return causal_conv_backward(x, weight, None, dout, activation="silu")[:2]


def cases() -> dict[str, tuple[list[Tensor], Callable[..., Tensor], Callable[..., Tensor]]]:
    """name: (inputs, xdist's call, the kernels' call)."""
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    heads = [leaf(1, TOKENS, 3, 32) for _ in range(3)]
    mask = xdist.Mask(causal=True, window=WINDOW)
    positions = torch.arange(TOKENS)
    found = mask.spans(positions.numpy(), Documents.of(None, TOKENS))
    spans = tuple(
        torch.from_numpy(x) for x in (found.lo, found.hi, found.prefix_lo, found.prefix_hi)
    )
    decay = (-torch.rand(1, TOKENS, 3)).requires_grad_()
    return {
        f"attention, window {WINDOW}": (
            heads,
            lambda q, k, v: xdist.attention(q, k, v, mask=mask),
            lambda q, k, v: PlainAttention.apply(q, k, v, spans, positions),
        ),
        "linear_attention, scalar decay": (
            [*heads, decay],
            lambda q, k, v, g: xdist.linear_attention(q, k, v, log_decay=g),
            PlainLinear.apply,
        ),
        "causal_conv1d, silu": (
            [leaf(1, TOKENS, 288), leaf(288, 4)],
            lambda x, w: xdist.causal_conv1d(x, w, activation="silu"),
            PlainConvolution.apply,
        ),
    }


def _seconds(call: Callable[..., Tensor], inputs: list[Tensor], dout: Tensor, calls: int) -> float:
    """CPU seconds of one forward and backward, over `calls` of them."""
    start = time.process_time()
    for _ in range(calls):
        torch.autograd.grad(call(*inputs), inputs, dout)
    return (time.process_time() - start) / calls


def _over(times: list[float], base: list[float]) -> list[float]:
    """Quartiles of `times / base - 1` over the pairs, in percent."""
    return statistics.quantiles([100 * (a / b - 1) for a, b in zip(times, base, strict=True)])


def run(root: Path, pairs: int = PAIRS) -> list[dict[str, Any]]:
    """One row a function: median CPU times, and the quartiles of xdist / kernels over the pairs."""
    torch.set_num_threads(1)
    rows = []
    for name, (inputs, ours, plain) in cases().items():
        out = ours(*inputs)
        dout = torch.ones_like(out)
        assert torch.equal(out, plain(*inputs).to(out.dtype)), f"{name}: not the same kernels"
        del out
        arms = {"xdist": ours, "kernels": plain, "again": plain}
        times: dict[str, list[float]] = {arm: [] for arm in arms}
        orders = list(itertools.permutations(arms))
        calls = 1
        gc.disable()
        for pair in range(-2, pairs):  # two to warm up
            for arm in orders[pair % len(orders)]:
                seconds = _seconds(arms[arm], inputs, dout, calls)
                if pair >= 0:
                    times[arm].append(seconds)
            if pair < 0:
                calls = math.ceil(SAMPLE_S / seconds)
        gc.enable()
        low, middle, high = _over(times["xdist"], times["kernels"])
        rows.append(
            {
                "function": name,
                "tokens": TOKENS,
                "xdist (ms)": 1e3 * statistics.median(times["xdist"]),
                "kernels (ms)": 1e3 * statistics.median(times["kernels"]),
                "overhead (%)": middle,
                "quartiles (%)": f"{low:.1f} to {high:.1f}",
                "kernels again (%)": _over(times["again"], times["kernels"])[1],
            }
        )
    return rows
