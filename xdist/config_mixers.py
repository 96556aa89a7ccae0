"""Checks of `model.options` and of what only one kind of model can honour."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdist.config_checks import Problem
from xdist.config_pattern import parse_pattern
from xdist.errors import ConfigError

if TYPE_CHECKING:
    from xdist.config import Config


def mixer_problems(config: Config) -> list[Problem]:
    """Settings of the other kind of model, and options of mixers that are not in the pattern."""
    kinds = {"mixer_lm": _of_mixers, "hybrid_lm": _of_hybrid}
    of_kind = kinds.get(config.model.kind)
    return [] if of_kind is None else of_kind(config)


def _of_hybrid(config: Config) -> list[Problem]:
    model, found = config.model, []
    if model.options:
        found.append(_without_effect("options", str(dict(model.options)), "its mixers have none"))
    if not model.recompute:
        why = "it always computes a tile again in backward"
        found.append(_without_effect("recompute", "false", why))
    return found


def _of_mixers(config: Config) -> list[Problem]:
    model, found = config.model, []
    if model.ngram_orders:
        why = "its embedding is one table of tokens"
        found.append(_without_effect("ngram_orders", str(list(model.ngram_orders)), why))
    if config.train.precision == "bfloat16":
        found.append(
            Problem(
                (("train", "precision"), ("model", "kind")),
                'train.precision = "bfloat16" cannot be honoured by mixer_lm',
                "its mixers compute in the dtype of their parameters",
                "nearest valid settings: train.precision=float32",
            )
        )
    if config.engine.name == "deepspeed" and config.engine.zero_stage == 3 and model.recompute:
        found.append(
            Problem(
                (("model", "recompute"), ("engine", "zero_stage")),
                "mixer_lm cannot compute layers again under DeepSpeed's stage 3",
                "a layer's parameters are let go of before the recomputation's gradients are made",
                "nearest valid settings: model.recompute=false, or engine.zero_stage=2",
            )
        )
    try:
        layers = set(parse_pattern(model.pattern, model.kind))
    except ConfigError:
        return found
    for name, options in model.options.items():
        if name not in layers or name == "mlp" or not isinstance(options, dict):
            found.append(
                Problem(
                    (("model", "options"), ("model", "pattern")),
                    f"model.options.{name} is no table of options of a mixer in the pattern",
                    f"the mixers of {model.pattern!r} are "
                    f"{', '.join(sorted(layers - {'mlp'})) or 'none'}",
                    "leave it out, or write e.g. options = { gla = { expand_k = 1.0 } }",
                )
            )
    return found


def _without_effect(key: str, value: str, why: str) -> Problem:
    other = "mixer_lm" if key in ("options", "recompute") else "hybrid_lm"
    own = "hybrid_lm" if other == "mixer_lm" else "mixer_lm"
    return Problem(
        (("model", key), ("model", "kind")),
        f"model.{key} = {value} has no effect with {own}",
        why,
        f"leave it out, or set model.kind={other}",
    )
