"""One optimizer step of the main job's model on one device: seconds and peak memory."""

from __future__ import annotations

import time
from typing import Any

import torch

import xdist
from xdist.models import build
from xdist.models.hybrid_lm import HybridConfig

# The model of configs/quickstart.toml; reading the file would need pydantic.
MODEL = HybridConfig(dim=96, pattern="linear*2,attention*1,linear*1", ngram_orders=(2, 3, 4))


def run(device: str, tokens: int, precision: str, steps: int = 3) -> dict[str, Any]:
    """Times the last of `steps` steps on one sequence of `tokens` tokens; one rank."""
    mesh = xdist.Mesh.one_rank(device)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(tokens, 1))
    model = build(MODEL, precision=precision, tile_tokens=1 << 14, seed=0).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    data = torch.randint(0, MODEL.vocab_size, (1, tokens + 1), generator=generator).to(device)
    cuda = torch.device(device).type == "cuda"
    seconds = 0.0
    for _ in range(steps):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        loss = model.loss(data[:, :-1], data[:, 1:], shard)
        loss.backward()
        xdist.reduce_gradients(model, mesh)
        xdist.clip_grad_norm(model, 1.0, mesh)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    assert bool(torch.isfinite(loss)), "the loss is not finite"
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    return {
        "case": f"{tokens} tokens, {precision}",
        "tokens": tokens,
        "step (s)": seconds,
        "tokens/s": tokens / seconds,
        "peak memory (GiB)": peak,
        "loss": float(loss.detach()),
    }
