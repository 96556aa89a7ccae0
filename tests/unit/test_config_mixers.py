"""Settings of mixer_lm: patterns with groups, options, and what is refused with which words."""

from __future__ import annotations

import pytest

from xdist.config import Config, parse, to_toml
from xdist.config_pattern import MIXERS, parse_pattern
from xdist.errors import ConfigError
from xdist.models import build

MIXER = '[model]\nkind = "mixer_lm"\ndim = 8\nhead_dim = 4\n'


def test_the_known_layers_are_the_registry() -> None:
    from xdist import nn

    assert sorted(MIXERS) == sorted(nn.MIXERS)


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("(gla,mlp)*2,attention", ("gla", "mlp", "gla", "mlp", "attention")),
        (" ( gla ) , mlp * 2", ("gla", "mlp", "mlp")),
        ("((gla*2,mlp)*2,kda)*1", ("gla", "gla", "mlp", "gla", "gla", "mlp", "kda")),
    ],
)
def test_groups_are_repeated(pattern: str, layers: tuple[str, ...]) -> None:
    assert parse_pattern(pattern, "mixer_lm") == layers


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(gla", "brackets"),
        ("gla)", "brackets"),
        ("gla(mlp)", "brackets"),
        ("(gla)3", "brackets"),
        ("(gla)(mlp)", "brackets"),
        ("(gla)*0", "no count"),
        ("()", "unknown layer ''"),
        ("mamba2x", "did you mean 'mamba2'?"),
        ("((mlp*1000)*1000)*1000", "too many layers"),
    ],
)
def test_bad_groups_are_refused(pattern: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(f'{MIXER}pattern = "{pattern}"\n')
    assert said in str(caught.value)


def test_options_reach_the_mixers_and_come_back_from_toml() -> None:
    text = MIXER + 'pattern = "sse,mlp,mamba2"\noptions = { sse = { partitions = 7 } }\n'
    config = parse(text)
    assert parse(to_toml(config)) == config
    model = build(config.model)
    assert model.layers[0].body.inner.partitions == 7
    other = parse(text.replace("7", "6"))
    assert other != config
    assert build(other.model).parameter_count() != model.parameter_count()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MIXER + 'pattern = "mlp"\noptions = { gla = { head_dim = 4 } }', "model.options.gla"),
        (MIXER + 'pattern = "gla"\noptions = { gla = 3 }', "model.options.gla is no table"),
        (MIXER + 'pattern = "gla"\nngram_orders = [2]', "ngram_orders = [2] has no effect"),
        (MIXER + 'pattern = "gla"\n[train]\nprecision = "bfloat16"', "bfloat16"),
        ("[model]\nrecompute = false", "recompute = false has no effect with hybrid_lm"),
        ("[model]\noptions = { gla = { head_dim = 4 } }", "has no effect with hybrid_lm"),
        (
            MIXER + 'pattern = "gla"\n[engine]\nname = "deepspeed"\nzero_stage = 3',
            "model.recompute=false, or engine.zero_stage=2",
        ),
    ],
)
def test_settings_without_effect_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('pattern = "gla"\noptions = { gla = { partitions = 3 } }', "has no option partitions"),
        ('pattern = "attention"\noptions = { attention = { head_dim = 5 } }', "do not fill"),
        ('pattern = "prefix"\n[parallel]\nrecurrent = "switch"', "one strategy"),
    ],
)
def test_what_a_mixer_cannot_be_is_refused_when_it_is_built(lines: str, said: str) -> None:
    config: Config = parse(MIXER + lines)
    with pytest.raises(ConfigError) as caught:
        build(config.model, parallel=config.parallel)
    assert said in str(caught.value)
    with pytest.raises(ConfigError, match="does not fit a mixer_lm"):
        build(parse(MIXER + 'pattern = "mlp"').model, precision="bfloat16")
