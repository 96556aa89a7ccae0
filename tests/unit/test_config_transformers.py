"""Settings of a model of transformers: what is refused, and with which words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xdist.config import Config, load, parse, to_toml
from xdist.errors import ConfigError
from xdist.models import build

ROOT = Path(__file__).resolve().parents[2]
SIZES = (
    "hidden_size = 16, intermediate_size = 24, num_hidden_layers = 2, num_attention_heads = 4, "
    "num_key_value_heads = 2"
)
LLAMA = '[model]\nkind = "transformers"\nconfig_class = "LlamaConfig"\nvocab_size = 11\n'


def text(options: str = SIZES, more: str = "") -> str:
    """A config with these options of LlamaConfig."""
    return f"{LLAMA}options = {{ {options} }}\n{more}"


def error_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        build(parse(text).model)
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (text(more="dim = 64"), "model.dim has no effect with transformers"),
        (text(more='pattern = "linear"'), "model.pattern has no effect with transformers"),
        (text(more="window = 3"), "model.window has no effect with transformers"),
        (text(more='[parallel]\nrecurrent = "scan"'), "parallel.recurrent has no effect"),
        (text(more="[train]\ntile_tokens = 64"), "train.tile_tokens has no effect"),
        (text(more='[train]\nprecision = "bfloat16"'), "train.precision=float32"),
        (text(more='[engine]\nname = "deepspeed"'), "engine.name=fsdp"),
        (text("vocab_size = 3"), "set model.vocab_size"),
        (text('dtype = "float64"'), "set model.dtype"),
        (LLAMA.replace("LlamaConfig", "Llama"), "'Llama' names no configuration class"),
        ('[model]\nconfig_class = "LlamaConfig"', "model.config_class has no effect with hybrid"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_without_the_library(
    written: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(written)
    assert said in str(caught.value)


def test_options_come_back_from_toml() -> None:
    config = parse(text(SIZES + ', rope_parameters = { rope_type = "default", rope_theta = 5e3 }'))
    assert parse(to_toml(config)) == config
    assert parse(text()) != config


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (text("hidden_sizes = 16"), "did you mean 'hidden_size'?"),
        (text('hidden_size = "16"'), "LlamaConfig refuses model.options"),
        (text("hidden_size = 18, num_attention_heads = 4"), "not a multiple of the number of"),
        (text(f"{SIZES}, pad_token_id = 11"), 'pad_token_id = "none"'),
        (LLAMA.replace("Llama", "Lama"), "no configuration class 'LamaConfig'"),
        (LLAMA.replace("Llama", "Clip"), "no configuration class 'ClipConfig'"),
        (
            text(SIZES + ", head_dim = 4").replace("Llama", "Gemma2"),
            "final_logit_softcapping = 30.0",
        ),
        (text(SIZES).replace("Llama", "Cohere"), "logit_scale = 0.0625"),
    ],
)
def test_what_the_library_does_not_know_is_refused(written: str, said: str) -> None:
    assert said in error_of(written)


def test_none_is_a_word_and_lists_are_lists() -> None:
    options = (
        f'{SIZES}, head_dim = 4, final_logit_softcapping = "none", '
        'layer_types = ["full_attention", "sliding_attention"], sliding_window = 3'
    )
    model = build(parse(text(options).replace("Llama", "Gemma2")).model)
    assert model.decoder.config.final_logit_softcapping is None
    assert model.decoder.config.layer_types == ["full_attention", "sliding_attention"]


def test_dropout_is_refused_when_the_model_trains() -> None:
    model = build(parse(text(f"{SIZES}, attention_dropout = 0.1")).model)
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"drops 0\.1 of its attention probabilities"):
        model.loss(tokens, tokens)
    assert model.eval().loss(tokens, tokens) > 0


def test_the_loss_is_the_library_s_own_and_logits_are_the_head_s() -> None:
    model = build(parse(text(SIZES)).model, seed=3)
    whole = build(parse(text(SIZES)).model, seed=3)
    whole.handle.detach()
    tokens = torch.arange(24).reshape(2, 12) % 11
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], 1)
    found = model.loss(tokens, labels)
    wanted = whole.decoder(input_ids=tokens, labels=tokens)
    found.backward()
    wanted.loss.backward()
    torch.testing.assert_close(found, wanted.loss)
    torch.testing.assert_close(model(tokens), wanted.logits)
    for (name, mine), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)


def test_roles_name_matrices_tables_and_a_tied_head() -> None:
    roles = build(parse(text(SIZES)).model).parameter_roles()
    assert roles["decoder.model.embed_tokens.weight"] == "table"
    assert roles["decoder.lm_head.weight"] == "other"
    assert roles["decoder.model.layers.1.mlp.up_proj.weight"] == "hidden"
    assert roles["decoder.model.norm.weight"] == "other"
    tied = build(parse(text(f"{SIZES}, tie_word_embeddings = true")).model).parameter_roles()
    assert tied["decoder.model.embed_tokens.weight"] == "other"


def test_the_example_config_is_valid_and_its_name_is_its_file() -> None:
    config: Config = load(ROOT / "configs" / "transformers" / "llama.toml")
    assert config.run.name == "llama"
    assert config.model.kind == "transformers"


def test_showing_loads_neither_torch_nor_the_library() -> None:
    path = ROOT / "configs" / "transformers" / "llama.toml"
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'kernels')!r}]\n"
        "from xdist.config import load, to_toml\n"
        f"to_toml(load({str(path)!r}))\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
