"""Tiny random decoders of Transformers: the library's own run, and xdist's on ranks.

The reference is the unmodified model with the library's eager attention, one document at a time.
That library computes norms, softmax and rotary positions in float32 whatever the model's dtype.
`in_float64` answers those requests in float64, on both sides: what is left is what sharding does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import xdist
from xdist.integrations.transformers import attach
from xdist.testing import count_c10d_bytes, layouts, relative_error

SMALL = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
SLIDING = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA = {"query_pre_attn_scalar": 6, "pad_token_id": None}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 1e4,
    }
}
# Family: configuration class and what differs from SMALL. Shared key heads everywhere.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "mistral": ("MistralConfig", {"sliding_window": 6, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", SLIDING | {"use_sliding_window": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": True}),
    "gemma": ("GemmaConfig", {"pad_token_id": None}),
    "gemma2": ("Gemma2Config", SLIDING | GEMMA | {"attn_logit_softcapping": 1.5}),
    "gemma3_text": ("Gemma3TextConfig", SLIDING | GEMMA),
    "gpt_oss": (
        "GptOssConfig",
        SLIDING | YARN | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}
EXPERTS = {
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
# Families that share most of their code with those above, or bring experts, latent keys (values
# of another head dim) or chunks.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3Config", {"pad_token_id": None, "sliding_window": 5}),
    "mixtral": ("MixtralConfig", EXPERTS | {"num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | {"num_experts": 4}),
    "olmo2": ("Olmo2Config", {"pad_token_id": None}),
    "smollm3": ("SmolLM3Config", {"pad_token_id": None}),
    "granite": ("GraniteConfig", {}),
    "ministral3": ("Ministral3Config", {}),
    "cohere2": ("Cohere2Config", SLIDING | {"pad_token_id": None}),
    "deepseek_v3": ("DeepseekV3Config", EXPERTS | LATENT),
    "llama4_text": (
        "Llama4TextConfig",
        {
            "attention_chunk_size": 5,
            "layer_types": ["chunked_attention", "full_attention"],
            "intermediate_size_mlp": 24,
            "num_local_experts": 4,
            "floor_scale": 4,
            "pad_token_id": None,
        },
    ),
}
# Rotary frequencies of these depend on the length of the whole sequence.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": (
        "LlamaConfig",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            "max_position_embeddings": 16,
        },
    ),
    "longrope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.0, 1.0],
                "long_factor": [2.0, 3.0],
                "original_max_position_embeddings": 16,
                "rope_theta": 1e4,
            },
        },
    ),
}
PACKED = (0, 0, 2, 9, 9, 17, 23)
TOKENS = 23


@dataclass(frozen=True)
class Case:
    """One model under one shard."""

    family: str
    layout: str = "contiguous"
    documents: tuple[int, ...] | None = None
    strategy: str = "auto"
    dropout: float = 0.0
    dtype: torch.dtype = torch.float64
    n: int = TOKENS
    recompute: bool = False
    embeds: bool = False
    seed: int = 1


def make(family: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A causal language model with the same random weights in every process."""
    import transformers

    name, own = (FAMILIES | MORE | VARIANTS)[family]
    config = getattr(transformers, name)(**(SMALL | own | options))
    torch.manual_seed(0)
    # The default product of grouped experts takes no float64.
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    # Norm weights and biases start as ones and zeros, which would hide a gradient's mistakes.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model.to(dtype).eval()


def draw(n: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens `[2, n]`, and the logits' gradient `[2, n, vocab]` of the loss sum(w * logits)."""
    made = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, SMALL["vocab_size"], (2, n), generator=made)
    weights = torch.randn(2, n, SMALL["vocab_size"], generator=made, dtype=torch.float64)
    return tokens, weights.to(dtype)


class _Wide(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "float":
            return args[0].double()
        swap = {id(torch.float32): torch.float64}
        args = tuple(swap.get(id(x), x) for x in args)
        kwargs = {key: swap.get(id(x), x) for key, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextlib.contextmanager
def in_float64(dtype: torch.dtype) -> Iterator[None]:
    """Requests for float32 get float64; only for a float64 model."""
    with _Wide() if dtype == torch.float64 else contextlib.nullcontext():
        yield


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}


def reference(case: Case) -> dict[str, Tensor]:
    """Logits and every gradient of the unmodified model, in case.dtype."""
    model = make(case.family, case.dtype)
    tokens, weights = draw(case.n, case.dtype, case.seed)
    cuts = case.documents or (0, case.n)
    with in_float64(case.dtype):
        logits = [
            model(input_ids=tokens[:, a:b], use_cache=False).logits
            for a, b in pairwise(cuts)
            if b > a
        ]
        whole = torch.cat(logits, 1)
        (whole * weights).sum().backward()
    return {"logits": whole.detach(), **gradients(model)}


def on_rank(cases: list[Case], degrees: tuple[int, int]) -> list[dict[str, Tensor]]:
    """On one rank: this rank's logits and the summed gradients of each case."""
    ring, ulysses = degrees
    mesh = xdist.init_mesh(ring=ring, ulysses=ulysses)
    return [_run(case, mesh) for case in cases]


def layout_of(case: Case, parts: int) -> xdist.Layout:
    """The case's layout; drawn segments until every rank holds a token."""
    drawn = (layouts(case.n, parts, seed=seed)[case.layout] for seed in range(case.n, 99))
    return next(layout for layout in drawn if 0 not in layout.local_lengths)


def _run(case: Case, mesh: xdist.Mesh) -> dict[str, Tensor]:
    model = make(case.family, case.dtype, attention_dropout=case.dropout)
    if case.recompute:
        model.activation_checkpointing_enable()
    model.train(case.recompute or case.dropout > 0)
    shard = xdist.SequenceShard(mesh, layout_of(case, mesh.sequence_size), case.documents)
    dropout = xdist.Dropout(case.dropout, seed=3, step=2) if case.dropout else None
    handle = attach(model, shard, strategy=case.strategy, dropout=dropout)
    tokens, weights = (shard.scatter(x) for x in draw(case.n, case.dtype, case.seed))
    with in_float64(case.dtype):
        if case.embeds:
            embedded = model.get_input_embeddings()(tokens)
            logits = model(inputs_embeds=embedded).logits
        else:
            logits = model(input_ids=tokens).logits
        # Another batch may be set before backward recomputes: the layers keep their own.
        handle.shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(4, mesh.sequence_size))
        (logits * weights).sum().backward()
    xdist.reduce_gradients(model, mesh)
    handle.detach()
    return {"logits": logits.detach(), **gradients(model)}


def errors(case: Case, ranks: list[dict[str, Tensor]], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of the logits and of every parameter's gradient, by name."""
    layout = layout_of(case, len(ranks))
    whole = torch.full_like(want["logits"], torch.nan)
    for rank, found in enumerate(ranks):
        whole[:, torch.from_numpy(layout.positions(rank))] = found["logits"].to(whole.dtype)
    got = {**ranks[0], "logits": whole}
    assert got.keys() == want.keys()
    return {name: relative_error(got[name], want[name]) for name in want}


def leaks(families: list[str], documents: tuple[int, ...]) -> list[Tensor]:
    """For each family: which of this rank's logits `[n]` change with a token of document 1."""
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, layouts(TOKENS, 2)["zigzag"], documents)
    tokens, _ = draw(TOKENS)
    other = tokens.clone()
    other[:, documents[2] - 1] += 1
    found = []
    for family in families:
        model = make(family).eval()
        attach(model, shard)
        with torch.no_grad():
            a, b = (model(input_ids=shard.scatter(x)).logits for x in (tokens, other % 19))
        found.append(((a - b).abs() > 1e-9).any(2).any(0))
    return found


def sent_bytes(case: Case) -> tuple[int, int]:
    """Bytes sent by an attached model's forward and backward, and by its attention calls alone."""
    mesh = xdist.init_mesh(ring=2)
    model = make(case.family)
    shard = xdist.SequenceShard(mesh, layout_of(case, 2), case.documents)
    attach(model, shard, strategy=case.strategy)
    tokens, _ = (shard.scatter(x) for x in draw(case.n))
    with count_c10d_bytes() as whole:
        model(input_ids=tokens).logits.sum().backward()
    heads = (SMALL["num_attention_heads"], SMALL["num_key_value_heads"])
    q, k = (torch.randn(2, shard.local_length, h, 4).double().requires_grad_() for h in heads)
    with count_c10d_bytes() as alone:
        for _ in range(SMALL["num_hidden_layers"]):
            y = xdist.attention(q, k, k, shard, mask=xdist.Mask(), strategy=case.strategy)
            y.sum().backward()
    return whole.sent_bytes, alone.sent_bytes


def bad_call(name: str, degrees: tuple[int, int]) -> str:
    """What a call says that is wrong on sequence rank 1 alone, or whose rank 1 holds nothing."""
    mesh = xdist.init_mesh(ring=degrees[0], ulysses=degrees[1])
    layout = layouts(TOKENS, mesh.sequence_size)["empty" if name == "empty" else "zigzag"]
    shard = xdist.SequenceShard(mesh, layout)
    model = make("llama")
    attach(model, shard)
    tokens = shard.scatter(draw(TOKENS)[0])
    wrong = shard.rank == 1
    given = {
        "position_ids": shard.document_positions[None] + int(wrong),
        "attention_mask": torch.ones_like(tokens) - int(wrong),
    }
    try:
        model(input_ids=tokens, **({} if name == "empty" else {name: given[name]}))
    except xdist.errors.XdistError as error:
        return f"{type(error).__name__}: {error}"
    return ""
