"""Runs on grids: the loop of tokens, with crops, slabs, checkpoints, engines and the plan."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.end_to_end.grid_training import config_of, evaluations, make_stores, run_each
from tests.end_to_end.training import CutShortError, cut_short, lines_of, losses, status_of
from xdist.checkpoint import Cut
from xdist.data import GridRequest
from xdist.errors import DataError
from xdist.mesh import Mesh
from xdist.models import build
from xdist.testing import RankPool
from xdist.train import run
from xdist.train.grid_work import GridWork

KINDS = ("mamba_nd", "vdt")
CASES = [
    ("mamba_nd", "ring", ("parallel.ring=2",)),
    ("mamba_nd", "dim 1", ("parallel.ring=2", "parallel.dim=1")),
    ("mamba_nd", "fsdp", ("parallel.ring=2", "engine.name=fsdp")),
    ("mamba_nd", "data", ("parallel.data=2", "train.accumulation=1")),
    ("vdt", "ring", ("parallel.ring=2",)),
    ("vdt", "dim 2", ("parallel.ulysses=2", "parallel.dim=2")),
    ("vdt", "data", ("parallel.data=2", "train.accumulation=1")),
    ("vdt", "as many as there are", ("train.accumulation=1",)),
    ("vdt", "tensor", ("parallel.ring=2", "parallel.grid=megatron_sp")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The stores, and a run of each model on one rank."""
    made = tmp_path_factory.mktemp("grids")
    make_stores(made)
    assert run_each(str(made), [(kind, f"{kind} one".replace(" ", "-"), ()) for kind in KINDS]) == [
        (0, ""),
        (0, ""),
    ]
    return made


def _name(kind: str, name: str) -> str:
    return f"{kind}-{name}".replace(" ", "-")


@pytest.fixture(scope="module")
def two(folder: pathlib.Path, pool2: RankPool) -> list[Any]:
    """Every case of two ranks, in one call."""
    cases = [(kind, _name(kind, name), settings) for kind, name, settings in CASES]
    return pool2.run(run_each, str(folder), cases)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{k} {n}" for k, n, _ in CASES])
def test_two_ranks_train_as_one_with_the_bytes_of_the_plan(
    folder: pathlib.Path, two: list[Any], case: int
) -> None:
    kind, name, settings = CASES[case]
    assert [rank[case] for rank in two] == [(0, ""), (0, "")]
    one = lines_of(config_of(folder, kind, f"{kind}-one"))
    many = lines_of(config_of(folder, kind, _name(kind, name), *settings))
    assert len(one) == len(many) == config_of(folder, kind, "x").train.total_steps + 1
    for left, right in zip(one, many, strict=True):
        if "eval" in left:
            assert right["eval"]["loss"] == pytest.approx(left["eval"]["loss"], rel=1e-10)
            assert right["eval"]["tokens"] == left["eval"]["tokens"]
            assert right["eval"].get("dice") == left["eval"].get("dice")
            continue
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-10)
        assert right["grad_norm"] == pytest.approx(left["grad_norm"], rel=1e-9)
        assert right["sequence_length"] == left["sequence_length"]
        assert right["sent_bytes"] == right["planned_bytes"]
        assert min(right["sent_bytes"]) > 0


def test_what_a_run_of_volumes_writes(folder: pathlib.Path) -> None:
    config = config_of(folder, "mamba_nd", "mamba_nd-one")
    final = evaluations(lines_of(config))[-1]
    # The slab is two planes of nine by eight, and only these are scored.
    assert final["tokens"] == 9 * 8 * 2
    assert list(final["dice"]) == ["class0", "class1", "class2"]
    assert all(share is None or 0 <= share <= 1 for share in final["dice"].values())
    facts = json.loads((config.run_directory / "run.json").read_text())
    assert facts["measure"] == "bits/position"
    assert [layout["sizes"] for layout in facts["layouts"]] == [[7, 8, 6], [9, 8, 7]]
    lengths = [line["sequence_length"] for line in lines_of(config) if "eval" not in line]
    assert lengths == [4 * 4 * 3, 4 * 4 * 3, 5 * 4 * 4, 5 * 4 * 4]
    report = (config.run_directory / "report.html").read_text()
    assert "bits per position" in report
    assert "overlap of each class with the truth" in report
    summary = json.loads((config.run_directory / "summary.json").read_text())
    assert summary["dice"] == final["dice"]


def test_what_a_run_of_video_writes(folder: pathlib.Path) -> None:
    config = config_of(folder, "vdt", "vdt-one")
    final = evaluations(lines_of(config))[-1]
    assert "bits_per_token" not in final
    assert "dice" not in final
    report = (config.run_directory / "report.html").read_text()
    assert "squared error over the tokens" in report


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_cut_goes_on_to_the_bit(folder: pathlib.Path, kind: str) -> None:
    """Cut in the second stage, whose samples are whole, after a save in it or before it."""
    config = config_of(folder, kind, f"{kind}-cut", "checkpoint.every_steps=1")
    last = config.train.total_steps
    with pytest.raises(CutShortError):
        run(config, on_point=Cut("train.updated", last, cut_short))
    assert run(config) == 0
    assert losses(config) == losses(config_of(folder, kind, f"{kind}-one"))


def test_other_data_and_another_crop_are_refused_on_resume(folder: pathlib.Path) -> None:
    again = ("mamba_nd", "mamba_nd-one")
    with pytest.raises(DataError, match="degraded"):
        run(config_of(folder, *again, "data.noise=11.0", "checkpoint.resume=strict"))
    assert status_of(config_of(folder, *again))["exit_code"] == 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("model.sizes=[9,8,8]", "data.slab=[0,2,3]"), r"model.sizes = \[9, 8, 8\]"),
        (("model.channels=2",), "model.channels = 2"),
        (("model.classes=4",), "model.classes = 4"),
    ],
)
def test_samples_that_are_not_those_of_the_config_are_refused(
    folder: pathlib.Path, settings: tuple[str, ...], said: str
) -> None:
    with pytest.raises(DataError, match=said):
        run(config_of(folder, "mamba_nd", "refused", *settings))


@pytest.mark.parametrize(
    ("kind", "other", "said"),
    [
        ("vdt", "mamba_nd", r"kind 'volume'(.|\n)*data.kind = 'video'(.|\n)*xdist prepare video"),
        ("mamba_nd", "vdt", r"kind 'video'(.|\n)*data.kind = 'volume'(.|\n)*xdist prepare volume"),
    ],
)
def test_a_store_of_another_kind_is_refused(
    folder: pathlib.Path, kind: str, other: str, said: str
) -> None:
    with pytest.raises(DataError, match=said):
        run(config_of(folder, kind, "refused", f"data.store={folder / f'{other}.zarr'}"))


def test_a_store_with_nothing_held_out_says_what_to_do(folder: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"no split 'held_out'(.|\n)*or data.slab to a part"):
        run(config_of(folder, "mamba_nd", "refused", "data.slab=[]"))


def test_a_video_that_is_left_out_teaches_nothing(folder: pathlib.Path) -> None:
    """All of it is known: no gradient, and the loss of the other row alone."""
    config = config_of(folder, "vdt", "left-out")
    work = GridWork(config, Mesh.one_rank())
    request = GridRequest.draw(0, 0, 2, config.model.sizes, work.trained)
    batch = work.read(work.trained, request, range(2))
    left = batch.without([1])
    assert batch.counts[1] > 0
    assert left.counts == (batch.counts[0], 0)
    assert batch.without([]) is batch
    model = build(config.model, seed=0)
    gshard = work.shard

    def gradients(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        loss = model.loss(x.double(), labels.double(), gshard)
        return loss, *torch.autograd.grad(loss, [*model.parameters()])

    alone = gradients(left.x[:1], left.labels[:1])
    for one, both in zip(alone, gradients(left.x, left.labels), strict=True):
        torch.testing.assert_close(both, one, rtol=1e-10, atol=1e-14)
    none = batch.without([0, 1])
    assert all(not one.any() for one in gradients(none.x, none.labels))


def test_a_rank_hears_of_what_another_cannot_read(folder: pathlib.Path, pool2: RankPool) -> None:
    (code, said), other = (rank[0] for rank in pool2.run(
        run_each, str(folder), [("mamba_nd", "absent", ("parallel.ring=2", "data.store=/nowhere"))]
    ))  # fmt: skip
    assert code == other[0] == 5
    assert "no data store at /nowhere" in said
