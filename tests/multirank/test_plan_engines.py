"""What the plan says of each engine, against real runs: bytes of the ledger, and peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xdist.config import Config, parse, to_toml
from xdist.data.prepare import prepare_text
from xdist.plan import peak_memory, step_bytes
from xdist.train import run

TEXT = """
[run]
directory = "{directory}"
name = "{name}"
[model]
dim = {dim}
head_dim = 8
pattern = "linear*1,attention*1"
window = 7
{model}
[parallel]
data = {data}
ring = {ring}
[data]
store = "{directory}/store.zarr"
[train]
curriculum = [{{length = 53, batch = {data}, steps = 2}}]
accumulation = {accumulation}
[engine]
{engine}
[optimizer]
name = "{optimizer}"
warmup_steps = 1
[evaluate]
tokens = 128
length = 64
[launch]
ranks = 2
"""
CASES = {
    "plain-sgd": ('name = "plain"', "sgd", 1, 2, 1),
    "plain-adamw": ('name = "plain"', "adamw", 2, 1, 2),
    "fsdp": ('name = "fsdp"', "adamw", 1, 2, 2),
    "fsdp-kept": ('name = "fsdp"\nreshard = false', "sgd", 2, 1, 1),
    "zero-0": ('name = "deepspeed"\nzero_stage = 0', "adamw", 1, 2, 1),
    "zero-2": ('name = "deepspeed"\nzero_stage = 2', "adamw", 1, 2, 2),
    "zero-3": ('name = "deepspeed"\nzero_stage = 3', "adamw", 2, 1, 1),
}
PAID = [name for name in CASES if not name.startswith("zero")]


def _config(folder: Path, name: str, *, dim: int = 16, model: str = "") -> Config:
    engine, optimizer, data, ring, accumulation = CASES[name]
    return parse(
        TEXT.format(
            directory=folder, name=f"{name}-{dim}", engine=engine, optimizer=optimizer, data=data,
            ring=ring, accumulation=accumulation, dim=dim, model=model,
        )
    )  # fmt: skip


def train_all(folder: Path, names: list[str]) -> None:
    """Trains each case in turn on this world."""
    for name in names:
        assert run(_config(folder, name)) == 0


def _steps(config: Config) -> list[dict]:
    text = (config.run_directory / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if "eval" not in line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small store."""
    folder = tmp_path_factory.mktemp("plan")
    generator = np.random.default_rng(0)
    for index in range(20):
        letters = generator.integers(97, 110, size=int(generator.integers(50, 300)))
        (folder / f"{index}.txt").write_bytes(bytes(letters.astype(np.uint8)))
    prepare_text([folder], folder / "store.zarr", held_out_fraction=0.1, pattern="*.txt")
    return folder


@pytest.mark.parametrize("names", [PAID, [n for n in CASES if n not in PAID]], ids=["own", "zero"])
def test_planned_bytes_of_every_engine_are_those_of_the_ledger(folder, pool2, names) -> None:
    pool2.run(train_all, folder, names)
    for name in names:
        config = _config(folder, name)
        planned = step_bytes(config, config.train.curriculum[0])
        assert all(planned), name
        for line in _steps(config):
            assert line["sent_bytes"] == planned == line["planned_bytes"], name


@pytest.mark.slow
def test_planned_memory_of_the_plain_engine_is_near_what_two_ranks_hold(folder) -> None:
    # Wide tables: parameters, gradients, state and the sum weigh as much as the process.
    wide = "ngram_orders = [2]\nngram_buckets = 150000"
    peaks = {}
    for name in ("plain-sgd", "plain-adamw"):
        config = _config(folder, name, dim=96, model=wide)
        path = folder / f"{name}.toml"
        path.write_text(to_toml(config), encoding="utf-8")
        command = [sys.executable, "-m", "xdist_launchers.cli", "launch", "local", str(path)]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=280,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        # The state is there from the second step on.
        measured = max(_steps(config)[-1]["peak_memory_bytes"])
        planned = max(peak_memory(config, config.train.curriculum[0]))
        assert 0.85 < planned / measured < 1.2, (name, planned / 2**20, measured / 2**20)
        peaks[name] = measured
    state = 2 * 96 * 150000 * 4
    assert 0.8 * state < peaks["plain-adamw"] - peaks["plain-sgd"] < 1.5 * state
