"""A task's store: what is written, what a rank reads of it, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from xdist.data import Request, TextStore, prepare_task, sample_start
from xdist.data.loader import IGNORED, Place, read_batch
from xdist.data.tasks import Copy, Mqar
from xdist.errors import ConfigError, DataError
from xdist.layout import Layout
from xdist_launchers.cli import app

SIZES: dict[str, Any] = {"length": 40, "samples": 50, "held_out": 7, "vocab": 64, "pairs": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tasks")
    prepare_task("mqar", made / "mqar", **SIZES, queries=5, seed=3)
    return made


def test_the_store_holds_the_samples_and_their_answers(folder: Path) -> None:
    store = TextStore(folder / "mqar")
    task = Mqar(vocab=64, pairs=6, queries=5)
    assert store.vocabulary_size == 64
    for stream, (name, count) in enumerate((("train", 50), ("held_out", 7))):
        split = store.split(name)
        tokens, labels = task.make(40, 3, stream, np.arange(count))
        assert split.dtype == np.uint8
        assert np.array_equal(split.read(0, split.length), tokens.reshape(-1))
        assert np.array_equal(split.labels(0, split.length), labels.reshape(-1))
        assert split.facts["scored"] == 5 * count
        assert np.array_equal(split.cu_seqlens, np.arange(count + 1) * 40)
        assert (split.sample_length, split.names[-1]) == (40, str(count - 1))
    store.verify()


def test_the_same_settings_give_the_same_store_in_parts_of_any_size(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = TextStore(folder / "mqar").fingerprint
    monkeypatch.setattr("xdist.data.task_store._BLOCK_TOKENS", 130)
    monkeypatch.setattr("xdist.data.task_store.CHUNK_BYTES", 300)
    again = prepare_task("mqar", folder / "parts", **SIZES, queries=5, seed=3)
    assert again.fingerprint == wanted
    TextStore(folder / "parts").verify()
    other = prepare_task("mqar", folder / "seed", **SIZES, queries=5, seed=4)
    assert other.fingerprint != wanted


def test_labels_need_a_wider_type_only_where_the_vocabulary_fills_it(tmp_path: Path) -> None:
    prepare_task("copy", tmp_path / "s", length=8, samples=3, held_out=0, vocab=256)
    store = TextStore(tmp_path / "s")
    assert store.split_names == ["train"]
    tokens, labels = Copy(vocab=256).make(8, 0, 0, np.arange(3))
    assert store.split("train").dtype == np.uint8
    assert np.array_equal(store.split("train").labels(0, 24), labels.reshape(-1))
    assert np.array_equal(store.split("train").read(0, 24), tokens.reshape(-1))


def test_a_held_out_length_of_its_own(tmp_path: Path) -> None:
    made = prepare_task(
        "passkey", tmp_path / "s", length=200, samples=4, held_out=2, held_out_length=1000
    )
    assert made.tokens == {"train": 800, "held_out": 2000}
    assert TextStore(tmp_path / "s").split("held_out").sample_length == 1000


@pytest.mark.parametrize("documents", ["join", "separate"])
@pytest.mark.parametrize("make", [Layout.contiguous, Layout.zigzag])
def test_each_rank_reads_its_own_answers(folder: Path, make: Any, documents: str) -> None:
    """The rows of a batch, put together from 3 ranks, are samples with their labels."""
    split = TextStore(folder / "mqar").split("train")
    rows = 4 if documents == "join" else 1
    length = 40 if documents == "join" else 120
    layout = make(length, 3)
    request = Request.draw(1, 0, rows, layout, split.length, unit=40)
    tokens = torch.full((rows, length), -7)
    labels = tokens.clone()
    for rank in range(3):
        batch = read_batch(split, request, Place(0, 1, rank), documents=documents)  # type: ignore[arg-type]
        here = torch.from_numpy(layout.positions(rank))
        tokens[:, here], labels[:, here] = batch.tokens, batch.labels
        assert batch.cu_seqlens == (None if documents == "join" else (0, 40, 80, 120))
    for row, start in enumerate(request.starts):
        assert start % 40 == 0
        assert np.array_equal(tokens[row], split.read(start, start + length))
        answers = split.labels(start, start + length)
        assert np.array_equal(labels[row], np.where(answers < 0, IGNORED, answers))


def test_every_epoch_starts_at_a_sample() -> None:
    """170 samples of 10 tokens in sequences of 4 samples: the phase is whole samples."""
    starts = [sample_start(0, cursor, 1700, 40, unit=10) for cursor in range(42 * 20)]
    assert {start % 10 for start in starts} == {0}
    assert len({start % 40 for start in starts}) > 1
    for epoch in range(20):
        assert len(set(starts[42 * epoch : 42 * (epoch + 1)])) == 42


@pytest.mark.parametrize(("length", "documents"), [(39, "separate"), (80, "join"), (20, "join")])
def test_sequences_that_cut_samples_are_refused(folder: Path, length: int, documents: str) -> None:
    split = TextStore(folder / "mqar").split("train")
    request = Request(0, (0,), Layout.contiguous(length, 1))
    with pytest.raises(DataError, match="a sample of this task has 40 tokens"):
        read_batch(split, request, documents=documents)  # type: ignore[arg-type]


def test_a_store_in_the_way_is_kept_only_with_the_same_settings(folder: Path) -> None:
    target = folder / "mqar"
    before = (target / "zarr.json").read_bytes()
    kept = prepare_task("mqar", target, **SIZES, queries=5, seed=3, existing="keep")
    assert kept.kept
    assert (target / "zarr.json").read_bytes() == before
    with pytest.raises(DataError, match="other data than these settings"):
        prepare_task("mqar", target, **SIZES, queries=6, seed=3, existing="keep")
    with pytest.raises(DataError, match="exists"):
        prepare_task("mqar", target, **SIZES, queries=5, seed=3)
    with pytest.raises(ConfigError, match="samples = 0"):
        prepare_task("mqar", folder / "none", **{**SIZES, "samples": 0})
    assert not (folder / "none").exists()


def test_damaged_answers_are_an_error(folder: Path, tmp_path: Path) -> None:
    """A store of answers outside the vocabulary, one that lost them, and one of other answers."""
    store = tmp_path / "store"
    shutil.copytree(folder / "mqar", store)
    # Chunks that were swapped keep their checksums; verify() sees it.
    chunk, other = store / "train/labels/c/0", store / "train/tokens/c/0"
    saved = chunk.read_bytes()
    chunk.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match="train/labels is not the one that was prepared"):
        TextStore(store).verify()
    chunk.write_bytes(saved)
    TextStore(store).verify()
    chunk.unlink()
    with pytest.raises(DataError, match="chunk train/labels/c/0 is missing"):
        TextStore(store).split("train").labels(0, 40)
    shutil.rmtree(store / "train" / "labels")
    with pytest.raises(DataError, match="labels"):
        TextStore(store).split("train")


def test_answers_outside_the_vocabulary_are_an_error(tmp_path: Path) -> None:
    prepare_task("copy", tmp_path / "s", length=8, samples=2, held_out=0, vocab=9)
    prepare_task("copy", tmp_path / "t", length=8, samples=2, held_out=0, vocab=60)
    shutil.copy(tmp_path / "t/train/labels/c/0", tmp_path / "s/train/labels/c/0")
    with pytest.raises(DataError, match="an answer outside the vocabulary"):
        TextStore(tmp_path / "s").split("train").labels(0, 16)


def test_the_command_writes_a_store(tmp_path: Path) -> None:
    command = ["prepare", "task", "state_tracking", str(tmp_path / "s"), "--length", "16"]
    more = ["--samples", "20", "--held-out", "4", "--group", "a5", "--seed", "9"]
    done = CliRunner().invoke(app, [*command, *more])
    assert done.exit_code == 0
    assert "train: 320 tokens in 20 documents" in done.output
    facts = json.loads((tmp_path / "s/zarr.json").read_text())["attributes"]["xdist"]["facts"]
    assert facts["task"] == {"name": "state_tracking", "group": "a5", "seed": 9}
    assert facts["vocabulary_size"] == 60
    assert "kept as it is" in CliRunner().invoke(app, [*command, *more]).output
    refused = CliRunner().invoke(
        app, [*command[:2], "copy", str(tmp_path / "t"), *command[4:], "--digits", "3"]
    )
    assert refused.exit_code == 2
    assert not (tmp_path / "t").exists()
