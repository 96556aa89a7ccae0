"""Checks of a model of HuggingFace Transformers that need no library: settings without effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdist.config_checks import Problem

if TYPE_CHECKING:
    from xdist.config import Config
    from xdist.config_text import Path

# Sizes of xdist's own models; those of the library stand in model.options, by its own names.
OWN_SIZES = (
    "dim", "pattern", "head_dim", "mlp_ratio", "conv_width", "window", "ngram_orders",
    "ngram_buckets",
)  # fmt: skip
# Arguments of a configuration class that other settings, or the shard, decide.
DECIDED = {
    "vocab_size": "set model.vocab_size",
    "dtype": "set model.dtype",
    "torch_dtype": "set model.dtype",
    "use_cache": "leave it out: training keeps no cache of keys",
    "architectures": "leave it out: the model is the class's causal language model",
}


def transformers_problems(config: Config) -> list[Problem]:
    """What a model of that library cannot honour, and its settings where the model is another."""
    model = config.model
    if model.kind != "transformers":
        if not model.config_class:
            return []
        return [
            _no_effect("model", "config_class", model.kind, "leave it out, or kind=transformers")
        ]
    found = _without_effect(config) + _refused(config)
    if not (model.config_class.isidentifier() and model.config_class.endswith("Config")):
        found.append(
            Problem(
                (("model", "config_class"), ("model", "kind")),
                f"model.config_class = {model.config_class!r} names no configuration class",
                'with kind = "transformers" it says which model is built',
                'write e.g. config_class = "LlamaConfig"',
            )
        )
    for name in sorted(DECIDED.keys() & model.options.keys()):
        found.append(
            Problem(
                (("model", "options"),),
                f"model.options.{name} is decided by xdist",
                f"it is {model.options[name]!r} here",
                DECIDED[name],
            )
        )
    return found


def _without_effect(config: Config) -> list[Problem]:
    model, kind = config.model, config.model.kind
    default = type(model)()
    found = [
        _no_effect("model", key, kind, "leave it out; sizes stand in model.options")
        for key in OWN_SIZES
        if getattr(model, key) != getattr(default, key)
    ]
    if config.parallel.recurrent != "auto":
        found.append(_no_effect("parallel", "recurrent", kind, "leave it out"))
    if config.train.tile_tokens != type(config.train)().tile_tokens:
        found.append(_no_effect("train", "tile_tokens", kind, "leave it out"))
    return found


def _refused(config: Config) -> list[Problem]:
    found = []
    if config.train.precision == "bfloat16":
        found.append(
            Problem(
                (("train", "precision"), ("model", "kind")),
                'train.precision = "bfloat16" cannot be honoured by a model of transformers',
                "it computes in the dtype of its parameters",
                "nearest valid settings: train.precision=float32",
            )
        )
    if config.engine.name == "deepspeed":
        found.append(
            Problem(
                (("engine", "name"), ("model", "kind")),
                'engine.name = "deepspeed" cannot hold a model of transformers',
                "it was not shown to train one as one rank does",
                "nearest valid settings: engine.name=fsdp, or engine.name=plain",
            )
        )
    return found


def _no_effect(section: str, key: str, kind: str, do: str) -> Problem:
    keys: tuple[Path, ...] = ((section, key), ("model", "kind"))
    return Problem(
        keys, f"{section}.{key} has no effect with {kind}", "that model reads no such setting", do
    )
