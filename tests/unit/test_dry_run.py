"""The dry run: real exchanges on ranks that do not exist, held to the plan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xdist.comm.collectives import is_initialised
from xdist.comm.worlds import fake_world
from xdist.config import Config, load, parse
from xdist.cost.moves import Moved
from xdist.dry_run import dry_run
from xdist.dry_run import run as module
from xdist.errors import LaunchError, XdistError
from xdist.models import build
from xdist.plan import plan, step_moves
from xdist.plan.meta import MetaRun

ROOT = Path(__file__).resolve().parents[2]
TEXT = """
[model]
dim = 32
head_dim = 16
pattern = "linear*2,attention*1"
window = 5
ngram_orders = [2, 3]
ngram_buckets = 64
[parallel]
data = {data}
ring = {ring}
ulysses = {ulysses}
layout = "{layout}"
[engine]
name = "{engine}"
[train]
tile_tokens = 32
curriculum = [
  {{length = 61, batch = {data}, steps = 3}},
  {{length = 9001, batch = {data}, steps = 2}},
]
accumulation = {accumulation}
"""


def _config(
    data: int = 1,
    ring: int = 1,
    ulysses: int = 1,
    layout: str = "contiguous",
    engine: str = "plain",
    accumulation: int = 1,
) -> Config:
    return parse(
        TEXT.format(
            data=data, ring=ring, ulysses=ulysses, layout=layout, engine=engine,
            accumulation=accumulation,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        (1, 1, 1, "contiguous", "plain", 1),
        (1, 2, 3, "zigzag", "plain", 2),
        (2, 2, 2, "contiguous", "fsdp", 1),
        (3, 1, 2, "contiguous", "deepspeed", 3),
    ],
    ids=str,
)
def test_what_a_step_exchanges_is_what_the_plan_says(case: tuple) -> None:
    config = _config(*case)
    result = dry_run(config)
    assert {one.rank for one in result.rehearsals} == {0, config.ranks // 2, config.ranks - 1}
    assert {one.stage for one in result.rehearsals} == {0, 1}
    for one in result.rehearsals:
        assert one.agrees
        assert one.rows == 1
        assert (one.exchanges > 0) == (config.ranks > 1)
        # Exchanges do not grow with the sequence: those of the whole stage are the same.
        stage = config.train.curriculum[one.stage]
        micro = config.train.model_copy(update={"accumulation": one.micro_steps})
        whole = step_moves(
            config.model_copy(update={"train": micro}), stage, one.rank,
            engine=config.engine.name == "plain",
        )  # fmt: skip
        if one.stage == 1:
            assert one.shortened
            assert one.length < stage.length
            assert one.length % config.parallel.sequence_ranks == (
                stage.length % config.parallel.sequence_ranks
            )
            assert one.counted == whole
    assert not is_initialised()
    assert sys.excepthook is sys.__excepthook__


def test_tensors_weigh_what_real_ones_would() -> None:
    config = _config()
    with MetaRun() as held:
        with torch.device("meta"):
            model = build(config.model, tile_tokens=32)
        whole = 4 * model.parameter_count()
        assert held.live_bytes == whole
        tokens = torch.empty(1, 100, dtype=torch.int64, device="meta")
        model.loss(tokens, tokens, None, valid_tokens=100).backward()
        del tokens
        assert held.live_bytes == 2 * whole
    real = build(config.model, tile_tokens=32)
    tokens = torch.randint(0, 256, (1, 100))
    real.loss(tokens, tokens, None, valid_tokens=100).backward()
    shapes = {name: p.grad.shape for name, p in model.named_parameters()}
    assert shapes == {name: p.grad.shape for name, p in real.named_parameters()}


def test_planned_tensors_are_near_those_of_the_rehearsal() -> None:
    config = load(ROOT / "configs" / "quickstart.toml", ["launch.ranks=2"])
    for one in dry_run(config).rehearsals:
        assert 0.75 < one.planned_tensor_bytes / one.tensor_bytes < 1.4, one


def test_a_step_that_exchanges_other_bytes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object, **options: object) -> dict[str, Moved]:
        return step_moves(*args, **options) | {"halo": Moved(1, 2)}  # type: ignore[arg-type]

    monkeypatch.setattr(module, "step_moves", wrong)
    with pytest.raises(XdistError, match=r"(?s)rank 0 moves other bytes in stage 0.*halo: counted"):
        dry_run(_config(ring=2))
    assert not is_initialised()


def test_the_fake_world_refuses_to_stand_beside_another() -> None:
    with fake_world(0, 2), pytest.raises(LaunchError, match="beside a real one"), fake_world(1, 2):
        pass
    assert not is_initialised()


def test_the_output_says_what_was_not_checked() -> None:
    table = dry_run(_config(ring=2, engine="fsdp", accumulation=5)).table()
    for words in (
        "the same", "* shorter than the stage", "nothing was computed or sent", "data.store",
        "the engine fsdp", "all 2 ranks", "1 x 2",
    ):  # fmt: skip
        assert words in table, table


def test_many_ranks_get_a_few_columns() -> None:
    config = _config(2, 3, 4)
    table = plan(config).table()
    assert len(next(line for line in table.splitlines() if line.startswith("  rank")).split()) <= 5


def _xdist(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "xdist_launchers.cli", *arguments],
        check=False, capture_output=True, text=True, timeout=280, cwd=ROOT,
    )  # fmt: skip


def test_the_command_refuses_what_real_ranks_would(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(TEXT.format(data=1, ring=2, ulysses=1, layout="zigzag", engine="plain",
                                accumulation=1), encoding="utf-8")  # fmt: skip
    good = _xdist("plan", str(path), "--dry-run")
    assert good.returncode == 0, good.stderr
    assert "dry run: 2 rank(s), data 1 x ring 2 x ulysses 1" in good.stdout
    bad = _xdist("plan", str(path), "--dry-run", "launch.ranks=3")
    assert bad.returncode == 2, bad.stderr
    assert "3 ranks do not fit" in bad.stderr
