"""The hybrid configs train: losses fall, are those of one rank, and move the planned bytes."""

from __future__ import annotations

import pathlib

import pytest

from tests.end_to_end.training import lines_of, losses
from xdist.config import Config, load, override
from xdist.data import prepare_task
from xdist.testing import RankPool
from xdist.train import run

ROOT = pathlib.Path(__file__).resolve().parents[2]
HYBRIDS = sorted((ROOT / "configs" / "hybrid").glob("*.toml"))
SHORT = (
    "train.curriculum=[{length=64,batch=4,steps=12}]", "optimizer.warmup_steps=2",
    "evaluate.tokens=256", "evaluate.every_steps=0", "log.every_steps=1000",
)  # fmt: skip
ENGINES = {
    "fsdp": ("engine.name=fsdp",),
    "whole": ("model.recompute=false",),
    "zigzag": ("parallel.layout=zigzag", "train.tile_tokens=24", "parallel.recurrent=scan"),
    "muon": ("optimizer.name=muon",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("mixers")
    prepare_task("mqar", made / "mqar", length=64, samples=200, held_out=8, vocab=64)
    return made


def config_of(folder: str, path: str, name: str, *settings: str) -> Config:
    chosen = [f"run.directory={folder}/runs", f"data.store={folder}/mqar", f"run.name={name}"]
    return override(load(path), [*chosen, *SHORT, *settings])


def train_all(folder: str, cases: list[tuple[str, str, tuple[str, ...]]]) -> list[int]:
    return [run(config_of(folder, path, name, *settings)) for path, name, settings in cases]


def check_training(folder: pathlib.Path, path: pathlib.Path, pool: RankPool) -> None:
    case = (str(path), f"{path.stem}-2", ())
    assert pool.run(train_all, str(folder), [case]) == [[0]] * 2
    alone = config_of(str(folder), str(path), f"{path.stem}-1", "parallel.ring=1")
    assert run(alone) == 0
    one, two = losses(alone), losses(config_of(str(folder), *case[:2]))
    assert two == pytest.approx(one, rel=1e-4)
    assert sum(two[-3:]) < sum(two[:3]) - 0.3
    for line in lines_of(config_of(str(folder), *case[:2])):
        if "eval" in line:
            assert 0 <= line["eval"]["accuracy"] <= 1
        else:
            assert line["sent_bytes"] == line["planned_bytes"]
            assert min(line["sent_bytes"]) > 0


def test_the_first_hybrid_config_trains_on_2_ranks_as_on_1(
    folder: pathlib.Path, pool2: RankPool
) -> None:
    check_training(folder, ROOT / "configs" / "hybrid" / "deltanet_window.toml", pool2)


@pytest.mark.slow
@pytest.mark.parametrize("path", HYBRIDS, ids=lambda path: path.stem)
def test_every_hybrid_config_trains_on_2_ranks_as_on_1(
    path: pathlib.Path, folder: pathlib.Path, pool2: RankPool
) -> None:
    check_training(folder, path, pool2)


def test_engines_recompute_and_layouts_give_the_same_losses(
    folder: pathlib.Path, pool2: RankPool
) -> None:
    path = str(ROOT / "configs" / "hybrid" / "gated_deltanet_3to1.toml")
    exact = ("model.dtype=float64", "train.precision=float64")
    cases = [(path, name, (*exact, *settings)) for name, settings in ENGINES.items()]
    assert pool2.run(train_all, str(folder), cases) == [[0] * len(cases)] * 2
    alone = config_of(str(folder), path, "exact-1", "parallel.ring=1", *exact)
    assert run(alone) == 0
    muon = config_of(str(folder), path, "muon-1", "parallel.ring=1", *exact, *ENGINES["muon"])
    assert run(muon) == 0
    for _, name, settings in cases:
        config = config_of(str(folder), path, name, *settings)
        wanted = losses(muon if name == "muon" else alone)
        assert losses(config) == pytest.approx(wanted, rel=1e-9), name
        steps = [line for line in lines_of(config) if "eval" not in line]
        assert all(line["sent_bytes"] == line["planned_bytes"] for line in steps), name
