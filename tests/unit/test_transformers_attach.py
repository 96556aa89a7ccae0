"""What a model of HuggingFace Transformers attached to xdist refuses, and leaves as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import xdist
from tests.multirank.transformers_cases import FAMILIES, MORE, make
from xdist.errors import ConfigError, MaskError, ShapeError
from xdist.integrations.transformers import NAME, TESTED, attach
from xdist.integrations.transformers_masks import recognised
from xdist.mask import Mask

transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(6).reshape(1, 6)


def shard(n: int = 6, documents: Any = None) -> xdist.SequenceShard:
    return xdist.SequenceShard(xdist.Mesh.one_rank(), xdist.Layout.contiguous(n, 1), documents)


def test_every_family_that_attach_takes_is_tested() -> None:
    families = FAMILIES | MORE
    assert set(families) == TESTED
    for family, (name, _) in families.items():
        assert getattr(transformers, name).model_type == family


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"labels": TOKENS}, ConfigError, "labels"),
        ({"use_cache": True}, ConfigError, "use_cache"),
        ({"output_attentions": True}, ConfigError, "output_attentions"),
        ({"logits_to_keep": 1}, ConfigError, "logits_to_keep"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, ConfigError, "cu_seq_lens_q"),
        ({"attention_mask": (TOKENS > 1).long()}, MaskError, "padding"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, MaskError, "makes its masks itself"),
        ({"position_ids": TOKENS + 1}, ShapeError, "contradict the shard"),
        ({"input_ids": TOKENS[:, :5]}, ShapeError, "5 tokens"),
        ({"position_bias": torch.ones(1)}, ConfigError, "position_bias"),
    ],
)
def test_arguments_that_cannot_be_honoured_raise(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = make("llama")
    attach(model, shard())
    with pytest.raises(error, match=words):
        model(**({"input_ids": TOKENS} | arguments))
    # The refusal leaves nothing behind.
    assert model(input_ids=TOKENS).logits.shape == (1, 6, 19)


def test_harmless_arguments_are_taken() -> None:
    model = make("llama")
    want = model(input_ids=TOKENS).logits
    attach(model, shard())
    given = {"attention_mask": torch.ones_like(TOKENS), "position_ids": TOKENS, "use_cache": False}
    torch.testing.assert_close(model(input_ids=TOKENS, **given).logits, want, rtol=1e-5, atol=1e-6)
    assert len(model(input_ids=TOKENS, output_hidden_states=True).hidden_states) == 3


def test_positional_arguments_and_generation_raise() -> None:
    model = make("llama")
    attach(model, shard())
    with pytest.raises(ConfigError, match="by name"):
        model(TOKENS, None)
    with pytest.raises(ConfigError, match="cache"):
        model.generate(TOKENS, max_new_tokens=2, use_cache=True)


def test_random_numbers_outside_attention_raise_in_training() -> None:
    model = make("llama")
    model.model.layers[0].mlp = torch.nn.Sequential(
        model.model.layers[0].mlp, torch.nn.Dropout(0.1)
    )
    attach(model, shard())
    with pytest.raises(ConfigError, match="random numbers outside attention"):
        model.train()(input_ids=TOKENS)
    model.eval()(input_ids=TOKENS)


def test_attention_dropout_needs_its_name_and_rate() -> None:
    model = make("llama", attention_dropout=0.2)
    handle = attach(model, shard())
    model.eval()(input_ids=TOKENS)
    model.train()
    with pytest.raises(ConfigError, match=r"drops 0\.2.*\n.*no dropout"):
        model(input_ids=TOKENS)
    handle.dropout = xdist.Dropout(0.1, seed=0)
    with pytest.raises(ConfigError, match=r"rate of 0\.1"):
        model(input_ids=TOKENS)
    handle.dropout = xdist.Dropout(0.2, seed=0)
    first = model(input_ids=TOKENS).logits
    assert torch.equal(first, model(input_ids=TOKENS).logits)
    handle.dropout = xdist.Dropout(0.2, seed=0, step=1)
    assert not torch.equal(first, model(input_ids=TOKENS).logits)


def _config(name: str, **options: Any) -> Any:
    small = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return getattr(transformers, name)(**(small | {"intermediate_size": 24} | options))


def test_models_that_cannot_be_attached_raise() -> None:
    with pytest.raises(ConfigError, match="takes a model"):
        attach(torch.nn.Linear(2, 2), None)
    encoder = transformers.BertModel(_config("BertConfig"))
    with pytest.raises(ConfigError, match="type bert"):
        attach(encoder, None)
    pair = transformers.T5Config(vocab_size=19, d_model=16, d_kv=4, d_ff=24, num_layers=1)
    with pytest.raises(ConfigError, match="decoder or a causal"):
        attach(transformers.T5ForConditionalGeneration(pair), None)
    judge = transformers.LlamaForSequenceClassification(_config("LlamaConfig", pad_token_id=0))
    with pytest.raises(ConfigError, match="decoder or a causal"):
        attach(judge, None)
    model = make("llama")
    attach(model, None)
    with pytest.raises(ConfigError, match="attached already"):
        attach(model, None)


def test_models_with_other_mixers_raise() -> None:
    small = {"num_key_value_heads": 2, "head_dim": 4}
    layers = ["linear_attention", "full_attention"]
    config = _config("Qwen3NextConfig", layer_types=layers, **small)
    with pytest.raises(ConfigError, match="does not use the library's attention interface"):
        attach(transformers.AutoModelForCausalLM.from_config(config), None, untested=True)
    config = _config("Lfm2Config", layer_types=["conv", "full_attention"], **small)
    model = transformers.AutoModelForCausalLM.from_config(config)
    attach(model, None, untested=True)
    with pytest.raises(ConfigError, match="1 calls from 2 layers"):
        model(input_ids=TOKENS)


def test_masks_of_a_model_s_own_raise() -> None:
    model = make("gemma3_text", use_bidirectional_attention=True)
    attach(model, None)
    with pytest.raises(MaskError, match="a mask of its own"):
        model(input_ids=TOKENS)


def test_nothing_is_replaced_and_detach_gives_all_back() -> None:
    """Two models of one configuration object: the other one never notices."""
    model, other = make("mistral"), make("mistral")
    other = type(model)(model.config)
    attentions = dict(transformers.AttentionInterface._global_mapping)
    config, before = model.config, model(input_ids=TOKENS).logits
    others = other(input_ids=TOKENS).logits
    handle = attach(model, shard())
    assert model.config is not config
    assert config._attn_implementation == "eager"
    assert "xdist" not in str(model.config.to_dict())
    assert torch.equal(other(input_ids=TOKENS).logits, others)
    now = dict(transformers.AttentionInterface._global_mapping)
    now.pop(NAME)
    attentions.pop(NAME, None)
    assert now == attentions
    handle.detach()
    assert model.config is config
    assert all(m.config is config for m in model.modules() if hasattr(m, "config"))
    assert torch.equal(model(input_ids=TOKENS).logits, before)


def test_what_is_saved_while_attached_is_the_model_s_own(tmp_path: Path) -> None:
    model = make("llama")
    model.save_pretrained(tmp_path / "before")
    handle = attach(model, shard())
    assert model(input_ids=TOKENS).past_key_values is None
    model.save_pretrained(tmp_path / "attached")
    handle.detach()
    before, attached = (tmp_path / name / "config.json" for name in ("before", "attached"))
    assert attached.read_text() == before.read_text()
    assert model(input_ids=TOKENS).past_key_values is not None


@pytest.mark.parametrize("options", [{}, {"sliding_window": 3}], ids=["whole", "window"])
def test_a_model_that_is_not_causal(options: dict[str, Any]) -> None:
    """By its configuration, or by the call: the library hands is_causal on to the layers."""
    family = "mistral" if options else "llama"
    model, plain = make(family, is_causal=False, **options), make(family, **options)
    plain.load_state_dict(model.state_dict())
    want, causal = model(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits
    assert not torch.allclose(want, causal, atol=1e-2)
    for one in (model, plain):
        attach(one, shard())
    for found in (model(input_ids=TOKENS), plain(input_ids=TOKENS, is_causal=False)):
        torch.testing.assert_close(found.logits, want, rtol=1e-5, atol=1e-6)
    for found in (model(input_ids=TOKENS, is_causal=True), plain(input_ids=TOKENS)):
        torch.testing.assert_close(found.logits, causal, rtol=1e-5, atol=1e-6)


def test_a_layer_that_contradicts_its_mask_raises() -> None:
    model = make("llama")
    attach(model, shard())
    inner = model.model.layers[1].self_attn
    inner.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"is_causal": False}), with_kwargs=True
    )
    with pytest.raises(MaskError, match="says is_causal=False, and its mask does not"):
        model(input_ids=TOKENS)


def test_autocast_gives_attention_one_dtype() -> None:
    """The library rotates q and k in float32 beside v in bfloat16."""
    model = make("qwen3", torch.float32)
    want = model(input_ids=TOKENS).logits
    attach(model, shard())
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=TOKENS).logits
    logits.sum().backward()
    torch.testing.assert_close(logits.float(), want, rtol=0.1, atol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_copies_share_the_handle() -> None:
    model = make("llama")
    handle = attach(model, shard())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    handle.shard = shard(5)
    with pytest.raises(ShapeError, match="6 tokens"):
        twin(input_ids=TOKENS)


def test_a_mesh_waits_for_its_shard() -> None:
    model, mesh = make("llama"), xdist.Mesh.one_rank()
    handle = attach(model, mesh)
    with pytest.raises(ConfigError, match="no shard for this batch"):
        model(input_ids=TOKENS)
    handle.shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(6, 1), [0, 2, 6])
    assert model(input_ids=TOKENS).logits.shape == (1, 6, 19)


@pytest.mark.parametrize("size", [1, 2, 5, 4096])
def test_the_library_s_masks_are_recognised(size: int) -> None:
    made = transformers.masking_utils
    padding = torch.zeros(1, dtype=torch.int64)
    cpu = torch.device("cpu")
    assert recognised(made.causal_mask_function, None, cpu) == Mask()
    assert recognised(made.bidirectional_mask_function, None, cpu) == Mask(causal=False)
    window = made.sliding_window_causal_mask_function(size)
    assert recognised(window, size, cpu) == Mask(window=size - 1)
    both = made.sliding_window_bidirectional_mask_function(size)
    assert recognised(both, size, cpu) == Mask(causal=False, window=size)
    chunk = recognised(made.chunked_causal_mask_function(size, padding), size, cpu)
    assert chunk in (Mask(chunk=size), Mask(window=0))
    blocks = made.and_masks(window, lambda b, h, q, k: (q + k) % 7 != 3)
    with pytest.raises(MaskError, match="does not know"):
        recognised(blocks, size, cpu)
