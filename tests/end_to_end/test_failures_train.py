"""Failures 10, 11 and 12 in training: exit code, three lines, nothing lost, on every rank alike."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import xdist
from tests.end_to_end.training import config_of, lines_of, losses, make_store, run_here, status_of
from xdist.checkpoint import load_latest
from xdist.config import Config
from xdist.data.prepare import prepare_text
from xdist.errors import XdistError
from xdist.models import build
from xdist.shard import SequenceShard
from xdist.testing import RankPool
from xdist.train import run

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("failures")
    make_store(made)
    assert run(config_of(made, "whole")) == 0
    return made


def _damaged(folder: pathlib.Path, where: pathlib.Path, *, flip: bool) -> pathlib.Path:
    """A copy of the store with its third chunk of training tokens missing or one bit off."""
    shutil.copytree(folder / "store.zarr", where)
    chunk = where / "train" / "tokens" / "c" / "2"
    if flip:
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 1
        chunk.write_bytes(data)
    else:
        chunk.unlink()
    return where


def test_failure_10_a_store_that_does_not_fit_is_refused_before_the_first_step(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Of more tokens than the model knows, or without what is evaluated at the end."""
    np.save(tmp_path / "ids.npy", np.arange(1000, dtype=np.int64))
    prepare_text([tmp_path / "ids.npy"], tmp_path / "ids.zarr", vocabulary_size=1000,
                 held_out_fraction=0)  # fmt: skip
    told = {}
    for name, store, size in (
        ("wide", tmp_path / "ids.zarr", 999),
        ("no-split", tmp_path / "ids.zarr", 1000),
        ("misnamed", folder / "store.zarr", 256),
    ):
        settings = (f"data.store={store}", f"model.vocab_size={size}", "data.held_out=held_out")
        if name == "misnamed":
            settings = (*settings[:2], "data.held_out=test")
        code, told[name] = run_here(str(folder), name, *settings)
        assert code == 5
        metrics = folder / "runs" / name / "metrics.jsonl"
        assert not metrics.exists() or not metrics.read_text()
    assert "vocabulary has 1000 tokens, model.vocab_size = 999" in told["wide"]
    assert "model.vocab_size=1000" in told["wide"]
    assert "'held_out' to evaluate on" in told["no-split"]
    assert "data.held_out = 'test', the store has held_out, train" in told["misnamed"]
    # The setting says nothing of a model of the caller's.
    config = config_of(folder, "own", f"data.store={folder}/store.zarr", "model.vocab_size=255")
    wide = config.model.model_copy(update={"vocab_size": 256})
    module = build(wide)
    assert run(config, build=lambda _: module) == 0


LONG = "train.curriculum=[{length=96,batch=4,steps=12}]"


@pytest.mark.parametrize("flip", [False, True])
def test_failure_10_a_bad_chunk_stops_every_rank_with_5(
    folder: pathlib.Path, tmp_path: pathlib.Path, pool2: RankPool, flip: bool
) -> None:
    """The chunk lies in one rank's slice; both raise the same error and one tells."""
    store = _damaged(folder, tmp_path / "bad.zarr", flip=flip)
    settings = (LONG, f"data.store={store}", "parallel.ulysses=2", "checkpoint.every_steps=1")
    name = f"bad-{flip}"
    codes = pool2.run(run_here, str(folder), name, *settings)
    assert codes[0] == codes[1]
    code, message = codes[0]
    assert code == 5
    what, why, do = message.splitlines()
    assert what.startswith("rank ")
    assert "chunk train/tokens/c/2" in what
    assert "needed by sample " in what
    assert why
    assert "xdist prepare text" in do
    config = config_of(folder, name, *settings)
    status = status_of(config)
    assert (status["state"], status["exit_code"]) == ("failed", 5)
    assert status["host"] == os.uname().nodename
    steps = len(losses(config))
    found = load_latest(config.run_directory / "checkpoints")
    assert (found.step if found else 0) == steps == status["step"]


def test_failure_10_skipping_drops_the_same_samples_on_every_rank(
    folder: pathlib.Path, tmp_path: pathlib.Path, pool2: RankPool
) -> None:
    store = _damaged(folder, tmp_path / "bad.zarr", flip=True)
    settings = (LONG, f"data.store={store}", "data.on_bad=skip")
    exact = ("model.dtype=float64", "train.precision=float64")
    assert run_here(str(folder), "skip-1", *settings, *exact, "data.max_bad=100") == (0, "")
    two = ("data.max_bad=100", "parallel.ulysses=2")
    assert pool2.run(run_here, str(folder), "skip-2", *settings, *exact, *two) == [(0, "")] * 2
    one, many = config_of(folder, "skip-1"), config_of(folder, "skip-2")
    assert losses(many) == pytest.approx(losses(one), rel=1e-10, abs=0)
    loaded = load_latest(many.run_directory / "checkpoints")
    assert loaded is not None
    dropped = loaded.state["bad_samples"]
    assert dropped >= 2
    cap = (f"data.max_bad={dropped - 1}", "parallel.ulysses=2")
    codes = pool2.run(run_here, str(folder), "skip-cap", *settings, *cap)
    assert [code for code, _ in codes] == [5, 5]
    assert f"data.max_bad is {dropped - 1}" in codes[0][1]
    assert "train/tokens/c/2" in codes[0][1]


class Poisoned(nn.Module):
    """A model of the caller's own, not a number in some calls on one rank."""

    def __init__(self, config: Config, rank: int, calls: tuple[int, ...]) -> None:
        super().__init__()
        self.table = nn.Embedding(config.model.vocab_size, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Parameter(0.1 * torch.randn(config.model.vocab_size, 8))
        self.rank, self.bad_calls, self.calls = rank, calls, 0

    def loss(
        self, tokens: Tensor, labels: Tensor, shard: SequenceShard, *, valid_tokens: int
    ) -> Tensor:
        """The global mean; on one rank the hidden states of the calls named (from 1) are NaN."""
        self.calls += 1
        hidden = self.inner(self.table(tokens))
        if shard.mesh.world_rank == self.rank and self.calls in self.bad_calls:
            hidden = hidden * torch.nan
        return xdist.cross_entropy(hidden, self.head, labels, shard, valid_tokens=valid_tokens)


def _poisoned(folder: str, name: str, calls: tuple[int, ...], *settings: str) -> tuple[int, str]:
    config = config_of(pathlib.Path(folder), name, *settings)
    try:
        return run(config, build=lambda config: Poisoned(config, 1, calls)), ""
    except XdistError as error:
        return error.exit_code, str(error)


def test_failure_11_a_bad_step_is_skipped_by_all_ranks(
    folder: pathlib.Path, pool2: RankPool
) -> None:
    """NaN on rank 1 in step 3: no rank changes its parameters, and the line names the rank."""
    codes = pool2.run(_poisoned, str(folder), "poisoned", (3,), "parallel.ulysses=2")
    assert codes == [(0, "")] * 2
    lines = [line for line in lines_of(config_of(folder, "poisoned")) if "eval" not in line]
    assert [line["step"] for line in lines if "skipped" in line] == [3]
    why = lines[2]["skipped"]
    assert "samples 4 to 5" in why
    assert "rank 1: " in why
    assert "rank 0" not in why
    assert lines[2]["loss"] is None
    assert lines[3]["loss"] is not None


def test_failure_11_too_many_end_with_6_and_leave_the_checkpoint(
    folder: pathlib.Path, pool2: RankPool
) -> None:
    settings = ("parallel.ulysses=2", "train.max_skipped=1", "checkpoint.every_steps=3")
    codes = pool2.run(_poisoned, str(folder), "given-up", (4, 5), *settings)
    assert codes[0] == codes[1]
    code, message = codes[0]
    assert code == 6
    what, why, do = message.splitlines()
    assert what == "2 steps in a row were not finite; the last is step 5"
    assert "rank 1: " in why
    assert "train.max_skipped is 1" in why
    assert "step-00000003" in do
    config = config_of(folder, "given-up", *settings)
    status = status_of(config)
    assert (status["state"], status["exit_code"]) == ("failed", 6)
    loaded = load_latest(config.run_directory / "checkpoints")
    assert loaded is not None
    assert loaded.step == 3
    diagnosis = json.loads((config.run_directory / "diagnosis.json").read_text())
    assert diagnosis["step"] == 5
    assert diagnosis["losses"][-1] == "nan"
    assert all(entry["not_finite"] == 0 for entry in diagnosis["parameters"].values())


def test_failure_11_a_learning_rate_out_of_all_bounds(folder: pathlib.Path) -> None:
    """Nothing is poisoned here: the weights grow until the products overflow."""
    code, message = run_here(str(folder), "diverged", LONG, "optimizer.learning_rate=1e30")
    assert code == 6
    assert "4 steps in a row were not finite" in message
    assert "lower optimizer.learning_rate" in message
    config = config_of(folder, "diverged", LONG, "optimizer.learning_rate=1e30")
    assert load_latest(config.run_directory / "checkpoints") is not None


RANK = """
import sys
sys.path[:0] = {paths!r}
import os, pathlib, signal
from tests.end_to_end.training import config_of
from xdist.checkpoint import Cut
from xdist.errors import XdistError
from xdist.models import build
from xdist.train import run
config = config_of(pathlib.Path({folder!r}), "lost", "parallel.ulysses=2")
cut = Cut("train.backward", 4) if os.environ["RANK"] == "1" else (lambda name: None)
try:
    sys.exit(run(config, on_point=cut))
except XdistError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_failure_12_a_killed_rank_ends_the_others_with_7(folder: pathlib.Path) -> None:
    """Rank 1 is killed inside step 4; rank 0 stops by itself, says who, and the run resumes."""
    from torch.distributed import TCPStore

    # The store of a launcher: it hands out a free port and outlives the ranks.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "launchers")]
    code = RANK.format(paths=paths, folder=str(folder))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ranks[1].communicate(timeout=120)
    lost_at = time.monotonic()
    out, _ = ranks[0].communicate(timeout=60)
    assert time.monotonic() - lost_at < 10
    assert [process.returncode for process in ranks] == [7, -signal.SIGKILL]
    assert "rank 1" in out
    config = config_of(folder, "lost", "parallel.ulysses=2")
    status = status_of(config)
    assert (status["state"], status["exit_code"]) == ("failed", 7)
    assert (status["rank"], status["host"]) == (1, os.uname().nodename)
    assert status["last_checkpoint"].endswith("step-00000002")
    assert run(config_of(folder, "lost")) == 0
    assert losses(config) == pytest.approx(losses(config_of(folder, "whole")), rel=1e-5)
