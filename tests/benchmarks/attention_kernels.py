"""Attention on one device beside torch's scaled_dot_product_attention.

Both in one process, interleaved, forward + backward; packed documents are given to torch one after
another, which is the best it can do without a dense mask.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

from xdist_kernels.attention.torch import (
    attention_backward,
    attention_delta,
    attention_forms,
    attention_forward,
)

# (dtype, tokens, query heads, key heads, tokens a document), head dim 64.
CELLS = [
    ("float32", 4096, 4, 4, 4096),
    ("float32", 4096, 8, 2, 4096),
    ("bfloat16", 4096, 4, 4, 4096),
    ("bfloat16", 4096, 8, 2, 4096),
    ("float32", 8192, 4, 4, 512),
    ("float32", 8192, 4, 4, 64),
    ("float32", 16384, 4, 4, 16384),
    ("float32", 32768, 4, 4, 32768),
]
DIM = 64


def run(root: Path) -> list[dict[str, Any]]:
    """One row a cell and number of threads. ATTENTION_CELLS (first:last) and ATTENTION_PAIRS
    choose fewer."""
    first, _, last = os.environ.get("ATTENTION_CELLS", ":").partition(":")
    pairs = int(os.environ.get("ATTENTION_PAIRS", "7"))
    before = torch.get_num_threads()
    rows = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            cells = CELLS[int(first or 0) : int(last or len(CELLS))]
            rows += [_row(*cell, threads, pairs) for cell in cells]
    finally:
        torch.set_num_threads(before)
    return rows


def _row(
    dtype: str, tokens: int, heads: int, groups: int, document: int, threads: int, pairs: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    made = getattr(torch, dtype)
    q, k, v, dout = (
        torch.randn(1, tokens, h, DIM).to(made) for h in (heads, groups, groups, heads)
    )
    own, zero = torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64)
    spans = (own // document * document, own + 1, zero, zero)
    call = {"spans": spans, "k_positions": own}

    def ours() -> None:
        out, lse = attention_forward(q, k, v, scale=DIM**-0.5, **call)
        delta = attention_delta(out.to(made), dout)
        found = attention_backward(q, k, v, lse, delta, dout, scale=DIM**-0.5, **call)
        _ = [x.to(made) for x in (out, *found)]

    def theirs() -> None:
        for start in range(0, tokens, document):
            at = slice(start, start + document)
            _torch(q[:, at], k[:, at], v[:, at], dout[:, at])

    times = [(_timed(ours), _timed(theirs)) for _ in range(pairs + 1)][1:]
    ratios = sorted(a / b for a, b in times)
    forms = sorted({part.form for part in attention_forms(q, k, v, **call)})
    return {
        "dtype": dtype, "tokens": tokens, "heads": f"{heads}/{groups}", "document": document,
        "threads": threads, "form": ", ".join(forms),
        "xdist s": statistics.median(a for a, _ in times),
        "torch s": statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios), "lowest": ratios[0], "highest": ratios[-1],
    }  # fmt: skip


def _torch(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> None:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in leaves), is_causal=True, enable_gqa=q.shape[2] != k.shape[2]
    )
    torch.autograd.grad(out.transpose(1, 2), leaves, dout)


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
