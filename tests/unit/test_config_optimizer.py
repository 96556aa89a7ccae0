"""Settings of [optimizer] and [engine] that would have no effect, or cannot be honoured."""

from __future__ import annotations

import pytest

from xdist.config import Config, override
from xdist.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (["optimizer.momentum=0.9"], "optimizer.momentum"),
        (["optimizer.name=muon", "optimizer.momentum=0.9"], "optimizer.momentum"),
        (["optimizer.muon_learning_rate=0.1"], "optimizer.muon_learning_rate"),
        (["optimizer.name=sgd", "optimizer.eps=1e-6"], "optimizer.eps"),
        (["optimizer.name=sgd", "optimizer.betas=[0.8,0.9]"], "optimizer.betas"),
        (["engine.reshard=false"], "engine.reshard"),
    ],
)
def test_a_setting_without_effect_is_an_error(settings: list[str], key: str) -> None:
    with pytest.raises(ConfigError, match="has no effect") as caught:
        override(Config(), settings)
    assert key in caught.value.what
    assert key in caught.value.do


@pytest.mark.parametrize(
    "settings",
    [
        ["optimizer.name=sgd", "optimizer.momentum=0.9"],
        ["optimizer.name=muon", "optimizer.muon_learning_rate=0.1", "optimizer.eps=1e-6"],
        ["engine.name=fsdp", "engine.reshard=false", "optimizer.name=sgd"],
    ],
)
def test_the_settings_of_each_rule_are_taken(settings: list[str]) -> None:
    override(Config(), settings)


def test_muon_with_fsdp_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="muon") as caught:
        override(Config(), ["optimizer.name=muon", "engine.name=fsdp"])
    assert "whole matrix" in caught.value.why
    assert "engine.name=plain" in caught.value.do
