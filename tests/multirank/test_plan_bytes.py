"""The plan's bytes are the ledger's, in training as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from xdist.config import Config, parse
from xdist.data.prepare import prepare_text
from xdist.plan import step_bytes
from xdist.train import run

TEXT = """
[run]
directory = "{directory}"
name = "{name}"
[model]
dim = 16
head_dim = 8
pattern = "linear*1,attention*1,linear*1"
window = 7
conv_width = 4
ngram_orders = [2, 4]
ngram_buckets = 31
[parallel]
data = {data}
ring = {ring}
ulysses = {ulysses}
layout = "{layout}"
[data]
store = "{directory}/store.zarr"
documents = "{documents}"
[train]
curriculum = [
  {{length = 53, batch = {batch}, steps = 2}},
  {{length = 200, batch = {batch}, steps = 1}},
]
accumulation = {accumulation}
[optimizer]
warmup_steps = 1
[evaluate]
tokens = 128
length = 64
"""
CASES = [
    # data, ring, ulysses, layout, documents, accumulation
    (1, 1, 1, "contiguous", "join", 1),
    (1, 2, 1, "contiguous", "join", 2),
    (1, 1, 2, "zigzag", "separate", 1),
    (2, 1, 1, "contiguous", "join", 1),
    (1, 3, 1, "zigzag", "join", 1),
    (1, 2, 2, "contiguous", "separate", 1),
    (2, 2, 1, "zigzag", "join", 2),
]


def _config(folder: Path, case: tuple) -> Config:
    data, ring, ulysses, layout, documents, accumulation = case
    name = "-".join(str(part) for part in case)
    return parse(
        TEXT.format(
            directory=folder,
            name=name,
            data=data,
            ring=ring,
            ulysses=ulysses,
            layout=layout,
            documents=documents,
            accumulation=accumulation,
            # Separate documents need one sequence a data rank.
            batch=data if documents == "separate" else 2 * data,
        )
    )


def train_all(texts: list[tuple]) -> None:
    """Trains each case in turn on this world."""
    for folder, case in texts:
        assert run(_config(folder, case)) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small store of several documents."""
    folder = tmp_path_factory.mktemp("plan")
    generator = np.random.default_rng(0)
    for index in range(40):
        letters = generator.integers(97, 110, size=int(generator.integers(20, 300)))
        (folder / f"{index}.txt").write_bytes(bytes(letters.astype(np.uint8)))
    prepare_text([folder], folder / "store.zarr", held_out_fraction=0.1, pattern="*.txt")
    return folder


def test_planned_bytes_equal_the_ledger_of_real_training(folder, pool2, pool3, pool4) -> None:
    pools = {2: pool2, 3: pool3, 4: pool4}
    for ranks in (1, 2, 3, 4):
        cases = [case for case in CASES if case[0] * case[1] * case[2] == ranks]
        if ranks == 1:
            train_all([(folder, case) for case in cases])
        else:
            pools[ranks].run(train_all, [(folder, case) for case in cases])
        for case in cases:
            config = _config(folder, case)
            planned = [step_bytes(config, stage) for stage in config.train.curriculum]
            text = (config.run_directory / "metrics.jsonl").read_text(encoding="utf-8")
            lines = [json.loads(line) for line in text.splitlines()]
            steps = [line for line in lines if "eval" not in line]
            sent = [line["sent_bytes"] for line in steps]
            if config.data.documents == "join":
                assert sent == [planned[0], planned[0], planned[1]], case
                assert [line["planned_bytes"] for line in steps] == sent, case
            else:
                # Documents cut states off, which ones only the data say: the plan is the most.
                assert np.all(np.array(sent) <= [planned[0], planned[0], planned[1]]), case
            assert (sum(planned[1]) > 0) == (ranks > 1)
