"""The streamed hybrid model equals a plain-torch model written out with dense ops."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xdist.documents import Documents
from xdist.layout import Layout
from xdist.memory.tiles import Cuts
from xdist.models.hybrid_lm import HybridConfig, HybridLM, build
from xdist.nn.embedding import NGRAM_GAIN, ngram_rows

TINY = {
    "vocab_size": 31, "dim": 16, "pattern": "linear,attention,linear", "head_dim": 8,
    "window": 9, "ngram_orders": (2, 3), "ngram_buckets": 64,
}  # fmt: skip


def tiny(dtype: str = "float64", tile_tokens: int = 24, **changes: object) -> HybridLM:
    """A small model whose tables and head are not zero, so that every gradient is alive."""
    model = build(HybridConfig(dtype=dtype, **{**TINY, **changes}), tile_tokens=tile_tokens, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.3 * noise).to(parameter.dtype))
    return model


def one_rank(n: int, cu_seqlens: list[int]) -> SimpleNamespace:
    """What a model reads of a shard, for one rank."""
    return SimpleNamespace(
        layout=Layout.contiguous(n, 1), documents=Documents.of(cu_seqlens, n), rank=0,
        group=None, local_length=n,
        mesh=SimpleNamespace(parameter_group=None),
    )  # fmt: skip


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def _linear(p: torch.nn.Module, x: Tensor) -> Tensor:
    """One document [B, n, C], token by token."""
    n, heads = x.shape[1], p.heads
    u = F.pad(x @ p.qkv.t(), (0, 0, p.conv.shape[1] - 1, 0))
    z = F.silu(sum(u[:, w : w + n] * p.conv[:, w] for w in range(p.conv.shape[1])))
    q, k, v = z.unflatten(-1, (3, heads, -1)).unbind(2)
    decay = torch.sigmoid(x @ p.decay.t() + p.decay_bias)
    state = q.new_zeros(q.shape[0], heads, q.shape[-1], q.shape[-1])
    out = []
    for t in range(n):
        state = state * decay[:, t, :, None, None] + k[:, t, :, :, None] * v[:, t, :, None, :]
        out.append((q[:, t, :, None] @ state).squeeze(2) * q.shape[-1] ** -0.5)
    y = torch.stack(out, 1).flatten(2)
    return (_norm(y, p.out_norm.weight) * F.silu(x @ p.gate.t())) @ p.out.t()


def _attention(p: torch.nn.Module, x: Tensor) -> Tensor:
    q = (x @ p.q.t()).unflatten(-1, (p.heads, -1)).transpose(1, 2)
    k, v = (x @ p.kv.t()).unflatten(-1, (2, p.heads, -1)).permute(2, 0, 3, 1, 4)
    i = torch.arange(x.shape[1])
    seen = (i[:, None] >= i) & (i[:, None] - i <= p.window)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return y.transpose(1, 2).flatten(2) @ p.out.t()


def reference_logits(model: HybridLM, tokens: Tensor, cu_seqlens: list[int]) -> Tensor:
    """Logits [B, N, V], each document on its own."""
    parts = []
    emb = model.embedding
    for start, stop in itertools.pairwise(cu_seqlens):
        own = tokens[:, start:stop]
        x = emb.tokens[own]
        symbols = F.pad(own + 1, (emb.context, 0))
        for index, order in enumerate(emb.orders):
            rows = ngram_rows(symbols, Cuts(None, None), order, emb.context, emb.buckets)
            x = x + NGRAM_GAIN * emb.ngrams[rows + index * emb.buckets]
        for block in model.blocks:
            mixer = _linear if block.recurrent else _attention
            h = x + mixer(block.mixer, _norm(x, block.norm.weight))
            hidden = torch.relu(_norm(h, block.mlp_norm.weight) @ block.mlp.up.t()).square()
            x = h + hidden @ block.mlp.down.t()
        parts.append(_norm(x, model.norm.weight) @ model.head.t())
    return torch.cat(parts, 1)


@pytest.mark.parametrize("tile_tokens", [16, 24, 1024])
@pytest.mark.parametrize("cuts", [[], [1, 2, 40, 41, 70]])
def test_streamed_model_equals_the_dense_one(tile_tokens: int, cuts: list[int]) -> None:
    n = 83
    model = tiny(tile_tokens=2 * tile_tokens)
    tokens = torch.randint(0, 31, (2, n + 1), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[0, 5:9] = -100
    inputs = tokens[:, :-1]
    cu_seqlens = [0, *cuts, n]
    logits = reference_logits(model, inputs, cu_seqlens)
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    wanted_gradients = torch.autograd.grad(wanted, list(model.parameters()))
    shard = one_rank(n, cu_seqlens)
    assert torch.allclose(model(inputs, shard), logits, rtol=0, atol=1e-12)
    loss = model.loss(inputs, labels, shard)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert abs(loss - wanted) < 1e-12
    for (name, _), own, want in zip(
        model.named_parameters(), gradients, wanted_gradients, strict=True
    ):
        assert (own - want).abs().max() <= 1e-10 * want.abs().max(), name
