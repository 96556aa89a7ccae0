"""The plan of mixer_lm: bytes against a dry run, FLOPs and memory against what they stand for."""

from __future__ import annotations

import pytest

from xdist.config import Config, override, parse
from xdist.dry_run import dry_run
from xdist.models import MixerConfig, build
from xdist.plan import plan
from xdist.plan.mixers import flops_per_token, layers_of

TEXT = """
[model]
kind = "mixer_lm"
vocab_size = 32
dim = 32
head_dim = 8
pattern = "gla,mlp,attention,gated_deltanet"
[parallel]
ring = 2
layout = "zigzag"
[train]
curriculum = [{ length = 200, batch = 2, steps = 1 }]
"""


def config_of(*settings: str) -> Config:
    return override(parse(TEXT), list(settings))


def test_a_dry_run_moves_what_the_plan_says() -> None:
    """On tensors without values: forward, recomputation and backward of every mixer used."""
    for settings in ((), ("parallel.recurrent=switch", "parallel.attention=ulysses")):
        result = dry_run(config_of(*settings))
        assert all(one.agrees and one.exchanges for one in result.rehearsals)
        names = set().union(*(one.counted for one in result.rehearsals))
        assert names >= {"halo", "reduce"} | ({"switch"} if settings else {"scan"})


@pytest.mark.slow
def test_planned_tensors_are_near_those_of_a_step() -> None:
    """An estimate, documented as one: within a factor of two and a half where tensors are large."""
    for settings in ((), ("model.recompute=false",)):
        large = ("model.dim=128", "model.head_dim=32", "train.curriculum.0.length=4000")
        result = dry_run(config_of(*large, *settings, "train.tile_tokens=100000"))
        for one in result.rehearsals:
            assert 0.4 < one.planned_tensor_bytes / one.tensor_bytes < 2.5


def test_recomputing_is_planned_to_need_less_memory_and_more_operations() -> None:
    again, kept = (
        plan(config_of(f"model.recompute={word}")).stages[0] for word in ("true", "false")
    )
    assert again.memory[0].kept < kept.memory[0].kept
    assert again.flops[0] * 3 == kept.flops[0] * 4
    assert again.sent_bytes == kept.sent_bytes


def test_flops_count_matrices_and_what_attention_sees() -> None:
    def flops(length: int = 1000, **changes: object) -> int:
        sizes = {"vocab_size": 32, "dim": 32, "head_dim": 8, "pattern": "attention", **changes}
        return flops_per_token(MixerConfig(**sizes), length)  # type: ignore[arg-type]

    matrices = 2 * (4 * 32 * 32 + 32 * 32)
    # Scores and values of 4 heads of 8 channels over half of 1,000 keys.
    assert flops() == matrices + 2 * 4 * 16 * 500
    assert flops(window=9) == matrices + 2 * 4 * 16 * 10
    assert flops(2000) - flops() == 2 * 4 * 16 * 500
    assert flops(pattern="gla") == flops(2000, pattern="gla")


def test_layers_are_known_by_the_calls_they_make() -> None:
    layers = layers_of(MixerConfig(dim=32, head_dim=8, pattern="gated_deltanet*2,mlp"))
    assert layers.kinds == ("gated_deltanet", "gated_deltanet", "mlp")
    conv, delta = (call.problems[0] for call in layers.calls["gated_deltanet"])
    assert (conv.channels, conv.width) == (96, 4)  # type: ignore[union-attr]
    assert (delta.heads, delta.key_dim, delta.transition) == (4, 8, "matrix")  # type: ignore[union-attr]
    assert layers.calls["mlp"] == ()


def test_the_plan_counts_the_parameters_of_the_model() -> None:
    config = config_of()
    assert plan(config).parameters == build(config.model).parameter_count()
