"""Checks over several settings: every impossible geometry is found, every remedy works."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings

from xdist.config import Config, Parallel, override, parse
from xdist.config_checks import world_problem
from xdist.errors import ConfigError, GeometryError, StrategyError

SMALL = st.integers(1, 6)


def _remedies(error: ConfigError) -> list[list[str]]:
    """The settings that a message offers, each as overrides."""
    options = error.do.removeprefix("nearest valid settings: ").split(", or ")
    return [re.findall(r"[a-z_]+(?:\.[a-z_0-9]+)+=\S+", option) for option in options]


@settings(max_examples=150, deadline=None)
@given(ranks=st.integers(1, 12), data=st.none() | SMALL, ring=SMALL, ulysses=SMALL)
def test_ranks_are_the_product_of_the_degrees_or_an_error_whose_remedies_hold(
    ranks: int, data: int | None, ring: int, ulysses: int
) -> None:
    given_settings = {
        "launch.ranks": ranks,
        "parallel.data": data or "auto",
        "parallel.ring": ring,
        "parallel.ulysses": ulysses,
        "train.curriculum.0.batch": 27720,  # a multiple of every degree drawn here
    }
    inner = ring * ulysses
    fits = ranks % inner == 0 if data is None else ranks == data * inner
    overrides = [f"{key}={value}" for key, value in given_settings.items()]
    if fits:
        config = override(Config(), overrides)
        assert config.ranks == ranks == config.data_degree * config.parallel.sequence_ranks
        return
    with pytest.raises(GeometryError) as caught:
        override(Config(), overrides)
    error = caught.value
    assert f"ring {ring} x ulysses {ulysses}" in error.why
    assert str(ranks) in error.what
    remedies = _remedies(error)
    assert 1 <= len(remedies) <= 3
    for remedy in remedies:
        changed = given_settings | dict(item.split("=") for item in remedy)
        override(Config(), [f"{key}={value}" for key, value in changed.items()])


@settings(max_examples=100, deadline=None)
@given(batch=st.integers(1, 40), data=st.integers(1, 9), accumulation=SMALL)
def test_a_batch_is_a_multiple_of_the_data_degree_or_an_error_whose_remedies_hold(
    batch: int, data: int, accumulation: int
) -> None:
    given_settings: dict[str, object] = {
        "parallel.data": data,
        "train.accumulation": accumulation,
        "train.curriculum.0.batch": batch,
    }
    overrides = [f"{key}={value}" for key, value in given_settings.items()]
    if batch % data == 0:
        override(Config(), overrides)
        return
    with pytest.raises(GeometryError) as caught:
        override(Config(), overrides)
    error = caught.value
    assert f"= {batch // data} remainder {batch % data}" in error.why
    assert f"global batch {batch * accumulation}" in error.why
    for remedy in _remedies(error):
        changed = given_settings | dict(item.split("=") for item in remedy)
        override(Config(), [f"{key}={value}" for key, value in changed.items()])


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["parallel.attention=halo", "model.window=none"], StrategyError),
        (["parallel.attention=ulysses"], StrategyError),
        (["parallel.recurrent=switch"], StrategyError),
        (["model.dim=100"], ConfigError),
        (["model.dim=16"], ConfigError),
        (["train.precision=float64"], ConfigError),
        (["model.dtype=float64"], ConfigError),
        (["data.max_bad=3"], ConfigError),
        (["evaluate.tokens=100"], ConfigError),
    ],
)
def test_contradictions_offer_settings_that_hold(
    overrides: list[str], kind: type[ConfigError]
) -> None:
    with pytest.raises(kind) as caught:
        override(Config(), overrides)
    remedies = _remedies(caught.value)
    assert 2 <= len(remedies) <= 3
    for remedy in remedies:
        changed = dict(item.split("=") for item in overrides + remedy)
        override(Config(), [f"{key}={value}" for key, value in changed.items()])


def test_several_stages_are_each_named() -> None:
    text = "parallel.data = 2\n[train]\ncurriculum = [\n{batch = 4},\n{batch = 3},\n{batch = 1}\n]"
    with pytest.raises(GeometryError) as caught:
        parse(text, "train.toml")
    assert "train.toml:5: stage 1" in caught.value.why
    assert "train.toml:6: stage 2" in caught.value.why


def test_a_config_built_in_code_is_checked_too() -> None:
    with pytest.raises(ValueError, match="3 data ranks"):
        Config(parallel=Parallel(data=3))


@given(
    world=st.integers(1, 8),
    data=st.none() | st.integers(1, 4),
    ulysses=st.integers(1, 4),
    ranks=st.none() | st.integers(1, 8),
)
@settings(max_examples=100, deadline=None)
def test_a_world_fits_when_the_degrees_multiply_to_it(
    world: int, data: int | None, ulysses: int, ranks: int | None
) -> None:
    overrides = [f"parallel.ulysses={ulysses}", "train.curriculum.0.batch=24"]
    overrides += [f"parallel.data={data}"] if data else []
    overrides += [f"launch.ranks={ranks}"] if ranks else []
    try:
        config = override(Config(), overrides)
    except GeometryError:
        assume(False)
    problem = world_problem(config, world)
    fits = world % ulysses == 0 and data in (None, world // ulysses) and ranks in (None, world)
    assert (problem is None) == fits
    if problem:
        assert f"needs {config.ranks} ranks" in problem.what
        assert f"--ranks {config.ranks}" in problem.do
