"""`make gpu-memory`: a million tokens through each operation, and kernels bound by memory.

A million tokens: one sequence of 1 Mi tokens in bfloat16, forward and backward, 16 heads of 128 (or
as the row says); `peak` is what a call holds at most beside its inputs, `kept` what the inputs, the
output and their gradients take by themselves. Layers: `xdist.nn.build_mixer` at width 1,024 with
heads of 128, weights included. Bandwidth: the fewest bytes over the time, beside this card's copy.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_clock
import gpu_rows
import gpu_supervisor

KI, MI = 1 << 10, 1 << 20
ABOUT = " ".join(__doc__.split("\n\n")[1].split())
HEADINGS = {
    "ceilings": "What this card reaches",
    "million": "1 Mi tokens through one operation",
    "layer": "1 Mi tokens through one layer",
    "bandwidth": "Kernels bound by memory",
}

MIXERS = (
    "linear", "gated_linear", "retention", "gla", "hgrn2", "deltanet", "gated_deltanet", "kda",
    "mamba2", "mamba", "prefix",
)  # fmt: skip
HEADLESS = ("mamba",)


def _dtype(given: Any) -> Any:
    import torch

    # Triton's interpreter multiplies bfloat16 wrongly.
    return torch.float32 if given.small else torch.bfloat16


def _size(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def _seconds(call: Callable[[], Any], device: str) -> float:
    """Seconds of the second of two calls (on a CPU: of one)."""
    import torch

    seconds = 0.0
    for _ in range(2 if device == "cuda" else 1):
        began = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return seconds


def _row(call: Callable[[], Any], tokens: int, kept: int, given: Any) -> dict[str, Any]:
    seconds = _seconds(call, given.device)
    return {
        "tokens": tokens,
        "forward + backward (s)": seconds,
        "tokens/s": int(tokens / seconds),
        "peak (GiB)": gpu_clock.peak_gib(call, given.device),
        "kept (GiB)": kept / 2**30,
    }


def million(op: Any, sizes: Any, given: Any) -> dict[str, Any]:
    """Forward and backward of one operation."""
    import gpu_ops
    import torch

    shard = gpu_ops.shard_of(sizes.tokens, given.device)
    leaves = gpu_ops.required(gpu_ops.leaves(op, sizes, _dtype(given), given.device))

    def call() -> None:
        out = op.call(leaves, shard=shard, backend="triton")
        # The gradient of a sum would be a view of one number; a real one is as large as out.
        torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

    like = leaves.get("v", leaves.get("x", leaves.get("u")))
    kept = 2 * _size(leaves.values()) + 2 * _size([like])
    return _row(call, sizes.tokens, kept, given)


def attention(heads: int, key_heads: int, tokens: int, given: Any, **mask: Any) -> dict[str, Any]:
    """Softmax attention; `documents` in the mask packs that many of equal length."""
    import gpu_ops
    import torch

    import xdist

    count = mask.pop("documents", 1)
    cuts = [round(i * tokens / count) for i in range(count + 1)] if count > 1 else None
    shard = gpu_ops.shard_of(tokens, given.device, cuts)
    dim = 16 if given.small else 128
    generator = torch.Generator(device=given.device).manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, h, dim, generator=generator, device=given.device)
        .to(_dtype(given))
        .requires_grad_()
        for h in (heads, key_heads, key_heads)
    )

    def call() -> None:
        out = xdist.attention(q, k, v, shard, mask=xdist.Mask(**mask), backend="triton")
        torch.autograd.grad(out, [q, k, v], torch.ones_like(out))

    return _row(call, tokens, 2 * _size([q, k, v]) + 2 * _size([q]), given)


def cross_entropy(tokens: int, given: Any) -> dict[str, Any]:
    """Head and loss over all tokens, forward and backward."""
    import gpu_ops
    import torch

    import xdist

    width, vocab = (16, 100) if given.small else (2048, 32 * KI)
    shard = gpu_ops.shard_of(tokens, given.device)
    generator = torch.Generator(device=given.device).manual_seed(0)
    hidden, head = (
        torch.randn(shape, generator=generator, device=given.device)
        .to(_dtype(given))
        .requires_grad_()
        for shape in ((1, tokens, width), (vocab, width))
    )
    labels = torch.randint(vocab, (1, tokens), generator=generator, device=given.device)

    def call() -> None:
        loss = xdist.cross_entropy(hidden, head, labels, shard, backend="triton")
        torch.autograd.grad(loss, [hidden, head])

    return _row(call, tokens, 2 * _size([hidden, head]), given)


def layer(name: str, dim: int, head_dim: int, tokens: int, given: Any) -> dict[str, Any]:
    """Forward and backward of one layer, its weights' gradients included."""
    import gpu_ops
    import torch

    from xdist.nn import build_mixer

    torch.manual_seed(0)
    options = {} if name in HEADLESS else {"head_dim": head_dim}
    mixer = build_mixer(name, dim, **options).to(given.device, _dtype(given))
    shard = gpu_ops.shard_of(tokens, given.device)
    generator = torch.Generator(device=given.device).manual_seed(0)
    x = torch.randn(1, tokens, dim, generator=generator, device=given.device).to(_dtype(given))
    x.requires_grad_()
    wanted = [x, *mixer.parameters()]

    def call() -> None:
        y = mixer(x, shard)
        torch.autograd.grad(y, wanted, torch.ones_like(y), allow_unused=True)

    return _row(call, tokens, 2 * _size(wanted) + 2 * _size([x]), given)


def _bandwidth(
    call: Callable[[], Any], moved: int, ceiling_gb_s: float, given: Any
) -> dict[str, Any]:
    found = gpu_clock.measure(call, given.device)
    reached = moved / found.ms / 1e6
    return {
        "ms": found.ms,
        "moved (MB)": moved / 1e6,
        "GB/s": reached,
        "of copy": reached / ceiling_gb_s,
    }


def convolution(backward: bool, ceiling_gb_s: float, given: Any) -> dict[str, Any]:
    """The convolution's forward alone, or forward and backward."""
    import gpu_ops
    import torch

    tokens, channels = (64, 8) if given.small else (256 * KI, 4096)
    op, sizes = gpu_ops.CONV, gpu_ops.Sizes(tokens, channels=channels)
    leaves = gpu_ops.required(gpu_ops.leaves(op, sizes, _dtype(given), given.device))
    shard = gpu_ops.shard_of(tokens, given.device)

    def forward() -> Any:
        return op.call(leaves, shard=shard, backend="triton")

    with torch.no_grad():
        out = forward()
    moved = gpu_ops.moved_bytes(leaves, out, backward=backward)
    if backward:
        dout = torch.randn_like(out)
        both = gpu_clock.forward_backward(forward, list(leaves.values()), dout)
        return _bandwidth(both, moved, ceiling_gb_s, given)
    with torch.no_grad():
        return _bandwidth(forward, moved, ceiling_gb_s, given)


def merging(ceiling_gb_s: float, given: Any) -> dict[str, Any]:
    """Two partial softmax results of float32 added up in place."""
    import torch

    from xdist_kernels.merge.triton import merge_

    tokens, heads, dim = (64, 2, 16) if given.small else (128 * KI, 32, 128)
    out, other = (torch.randn(1, tokens, heads, dim, device=given.device) for _ in range(2))
    lse, other_lse = (torch.randn(1, tokens, heads, device=given.device) for _ in range(2))
    moved = _size([out, out, other, lse, lse, other_lse])
    return _bandwidth(lambda: merge_(out, lse, other, other_lse), moved, ceiling_gb_s, given)


def tile_loss(ceiling_gb_s: float, given: Any, vocab: int) -> dict[str, Any]:
    """Loss and gradient of one tile of logits, in place."""
    import torch

    from xdist_kernels.cross_entropy import triton as kernels

    tokens = 4 if given.small else kernels.TILE_TOKENS
    logits = kernels.empty_tile(tokens, vocab, _dtype(given), torch.device(given.device))
    logits.normal_()
    labels = torch.randint(vocab, (tokens,), device=given.device)

    # Each call takes the gradient the last one left for logits: numbers as good as any.
    def call() -> None:
        kernels.tile_loss(logits, labels, -100, 1.0)

    # Read once and written once is the least; rows longer than the registers are read twice.
    return _bandwidth(call, 2 * _size([logits]), ceiling_gb_s, given)


def _attentions(small: bool, tokens: int) -> dict[str, tuple[int, int, dict[str, Any]]]:
    """Label -> query heads, key heads, mask."""
    if small:
        return {"attention, window 16": (2, 1, {"window": 16})}
    return {
        "attention, window 4,096": (16, 4, {"window": 4096}),
        f"attention, {tokens // 8192} documents of 8 Ki": (16, 4, {"documents": tokens // 8192}),
        "attention, 8 Ki documents of 128": (16, 4, {"documents": 8192}),
        "attention, causal, 2 heads": (2, 1, {}),
    }


def rows(given: gpu_rows.Options) -> int:
    """Measures them; 1 where one failed, else 0."""
    import gpu_ops

    small = given.small
    table = gpu_rows.Table(
        "gpu-memory", "A million tokens on a card", "make gpu-memory", given, HEADINGS,
        notes=[ABOUT],
    )  # fmt: skip
    ceilings = table.measure(
        "ceilings", "this card", lambda: gpu_clock.ceilings(given.device, small=small)
    )
    copy_gb_s = (ceilings or {}).get("copy (GB/s)", float("nan"))
    bandwidths = {
        "causal_conv1d, forward": functools.partial(convolution, False),
        "causal_conv1d, forward + backward": functools.partial(convolution, True),
        "merge_": merging,
        "tile_loss, vocabulary 8,192": functools.partial(tile_loss, vocab=8192 >> 7 * small),
        "tile_loss, vocabulary 131,072": functools.partial(tile_loss, vocab=131072 >> 2 * small),
    }
    for name, measured in bandwidths.items():
        table.measure("bandwidth", name, functools.partial(measured, copy_gb_s, given))
    tokens = 40 if small else MI
    sizes = (
        gpu_ops.Sizes(tokens, heads=1, key=16, value=16, state=4, channels=8)
        if small
        else gpu_ops.Sizes(tokens)
    )
    # In the interpreter one of each kind: gpu-linear goes through the others.
    chosen = (gpu_ops.LINEAR[3], gpu_ops.DELTA[1], gpu_ops.STATE_SPACE[1])
    for op in chosen if small else gpu_ops.OPS:
        table.measure("million", op.name, functools.partial(million, op, sizes, given))
    for name, (heads, key_heads, mask) in _attentions(small, tokens).items():
        run = functools.partial(attention, heads, key_heads, tokens, given, **mask)
        table.measure("million", name, run)
    table.measure("million", "cross_entropy", functools.partial(cross_entropy, tokens, given))
    mixers = ("gla",) if small else MIXERS
    dim, head_dim = (32, 16) if small else (1024, 128)
    for name in mixers:
        run = functools.partial(layer, name, dim, head_dim, tokens, given)
        table.measure("layer", name, run)
    return table.finish()


def main(argv: Sequence[str] | None = None) -> int:
    """0: no row failed, or no card; 1: one did; 2: the command broke off."""
    return gpu_supervisor.command("gpu-memory", __file__, __doc__, argv, rows)


if __name__ == "__main__":
    sys.exit(main())
