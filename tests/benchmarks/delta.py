"""The delta rule beside the torch path of HuggingFace Transformers for Gated DeltaNet.

Forward and backward of the operation alone, interleaved in changing order; as many pairs as fit
into PAIR_S seconds. DeltaNet and KDA, which that path does not have, are timed beside it.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import xdist

SIZES = ((4, 64), (8, 64), (4, 128))  # heads, K = V
TOKENS = (4096, 16384, 65536)
PAIR_S, PAIRS = 25.0, 9
THREADS = 2


def draw(tokens: int, heads: int, dim: int) -> dict[str, Tensor]:
    """Unit keys, beta in (0, 1), decays near 1."""
    torch.manual_seed(0)
    q, k = (normalize(torch.randn(1, tokens, heads, dim), dim=-1) for _ in range(2))
    return {
        "q": q,
        "k": k,
        "v": torch.randn(1, tokens, heads, dim),
        "beta": torch.rand(1, tokens, heads),
        "log_decay": -0.1 * torch.rand(1, tokens, heads),
    }


def theirs(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    return module.torch_chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta)[0]


def seconds(call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> float:
    """Wall time of forward and backward."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    gc.collect()
    start = time.perf_counter()
    call(**leaves).sum().backward()
    return time.perf_counter() - start


def compared(heads: int, dim: int, tokens: int, budget_s: float) -> dict[str, Any]:
    """One row: interleaved passes at one length."""
    inputs = draw(tokens, heads, dim)
    few = {name: x[:, :300] for name, x in inputs.items()}
    assert torch.allclose(xdist.delta_rule(**few), theirs(**few), rtol=1e-3, atol=1e-4)
    plain = {name: x for name, x in inputs.items() if name != "log_decay"}
    gates = inputs["log_decay"][..., None].expand(-1, -1, -1, dim).contiguous()
    arms = {
        "Gated DeltaNet": (xdist.delta_rule, inputs),
        "Transformers": (theirs, inputs),
        "DeltaNet": (xdist.delta_rule, plain),
        "KDA": (xdist.delta_rule, plain | {"log_decay": gates}),
    }
    seconds(*arms["Gated DeltaNet"])
    times: dict[str, list[float]] = {name: [] for name in arms}
    began = time.perf_counter()
    for number in range(PAIRS):
        for name in list(arms)[:: 1 if number % 2 else -1]:
            times[name].append(seconds(*arms[name]))
        spent = time.perf_counter() - began
        if spent * (number + 2) / (number + 1) > budget_s:
            break
    pairs = zip(times["Gated DeltaNet"], times["Transformers"], strict=True)
    ratios = sorted(other / own for own, other in pairs)
    middle = {name: statistics.median(found) for name, found in times.items()}
    return {
        "heads": heads,
        "K = V": dim,
        "tokens": tokens,
        "Gated DeltaNet (s)": middle["Gated DeltaNet"],
        "Transformers (s)": middle["Transformers"],
        "ratio": middle["Transformers"] / middle["Gated DeltaNet"],
        "ratios of pairs": f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
        "pairs": len(ratios),
        "us a token and head": middle["Gated DeltaNet"] / tokens / heads * 1e6,
        "DeltaNet (s)": middle["DeltaNet"],
        "KDA (s)": middle["KDA"],
    }


def run(root: Path) -> list[dict[str, Any]]:
    """One row for each size and length."""
    torch.set_num_threads(THREADS)
    return [compared(*size, tokens, PAIR_S) for size in SIZES for tokens in TOKENS]
