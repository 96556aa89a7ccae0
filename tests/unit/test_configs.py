"""The example configs: every one is valid, fits the cards it names, and passes a dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from xdist.config import load
from xdist.dry_run import dry_run
from xdist.plan import peak_memory
from xdist.plan.step import parameter_count

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
CARDS = {"gpu8": 8, "gpu64": 64}
CARD_BYTES = 80 * 10**9


def test_there_are_examples_for_8_and_64_cards() -> None:
    assert set(CARDS) <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_xdist_show_accepts_every_example(path: Path) -> None:
    config = load(path)
    assert config.run.name == path.stem
    # Both files say it: a config is copied, and its first lines with it.
    assert f"configs/{path.name}" in path.read_text("utf-8") or path.stem in ("quickstart", "tiny")


@pytest.mark.parametrize("name", CARDS)
def test_the_plan_fits_the_cards(name: str) -> None:
    config = load(ROOT / "configs" / f"{name}.toml")
    assert config.ranks == CARDS[name]
    assert config.slurm.nodes * 8 == CARDS[name]
    # Large enough to be worth the cards, and with room for fragments and NCCL's buffers.
    assert parameter_count(config) > 10**9
    peak = max(peak_memory(config, config.train.curriculum[-1]))
    assert 0.3 * CARD_BYTES < peak < 0.8 * CARD_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("name", CARDS)
def test_a_dry_run_of_the_large_examples_passes(name: str) -> None:
    config = load(ROOT / "configs" / f"{name}.toml")
    result = dry_run(config)
    assert {one.rank for one in result.rehearsals} == {0, CARDS[name] // 2, CARDS[name] - 1}
    assert all(one.agrees and one.exchanges for one in result.rehearsals)


def test_a_dry_run_of_the_small_example_passes() -> None:
    # That of quickstart stands in test_dry_run.py.
    assert all(one.agrees for one in dry_run(load(ROOT / "configs" / "tiny.toml")).rehearsals)
