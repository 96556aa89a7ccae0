"""The plan of grids: rehearsals on imagined ranks against formulas, and what it prints."""

from __future__ import annotations

import pytest
import torch

from tests.end_to_end.grid_training import TEXT
from xdist.comm.ledger import ledger
from xdist.config import Config, override, parse
from xdist.cost.moves import Moved, switch_bytes
from xdist.errors import ConfigError
from xdist.grid_shard import GridShard
from xdist.mesh import Mesh
from xdist.models import build
from xdist.models.vdt import SHARDINGS
from xdist.plan import grid_step, grids, plan, rank_bytes, step_memory
from xdist.plan.grids import placement_of, rehearsed, smaller


def _config(kind: str, *settings: str) -> Config:
    text = TEXT["vdt" if kind == "vdt" else "mamba_nd"].replace('"mamba_nd"', f'"{kind}"')
    return override(parse(text), list(settings))


CASES = [
    ("mamba_nd", ("parallel.dim=1",)),
    ("axial", ("model.head_dim=4",)),
    ("vdt", ()),
    ("vdt", ("parallel.dim=2",)),
    *[("vdt", (f"parallel.grid={name}", f"parallel.dim={dim}"))
      for name in SHARDINGS[1:] for dim in (0, 2)],
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_rehearsal_counts_is_what_the_formulas_say(
    case: tuple[str, tuple[str, ...]],
) -> None:
    """Every rank, uneven shares, patches that straddle a border."""
    config = _config(case[0], *case[1], "parallel.ring=3", "train.curriculum=[{batch=2}]")
    (stage,) = config.train.curriculum
    for rank in range(3):
        counted = rehearsed(config, stage, rank).moves
        formulas = grids.by_formula(config, stage, rank)
        assert sum(counted.values(), Moved()) == sum(formulas.values(), Moved())
    assert rank_bytes(config, stage, 0) > 0
    assert step_memory(config, stage, 0).kept > 0


def test_a_large_sample_is_rehearsed_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(
        "vdt",
        "parallel.ring=2",
        "model.sizes=[6,16,16]",
        "model.patch=[1,2,2]",
        "train.curriculum=[{}]",
    )
    stage = config.train.curriculum[0]
    exact, memory = grid_step(config, stage, 1)
    monkeypatch.setattr(grids, "MOST_TOKENS", 48)
    model = grids.sizes_of(config.model, config.parallel)
    assert smaller((6, 16, 16), model, 2) == (3, 10, 10)
    formulas, scaled = grid_step(config, stage, 1)
    assert formulas.pop("reduce") == exact.pop("reduce")
    assert formulas == {"blocks": sum(exact.values(), Moved())}
    assert scaled.kept == pytest.approx(memory.kept, rel=0.35)
    assert scaled.parameters == memory.parameters


@pytest.mark.parametrize("strategy", SHARDINGS)
def test_a_large_video_has_the_bytes_of_its_own_strategy(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rehearsed smaller: bytes to the last one, FLOPs nearly, of a rank with an uneven share."""
    config = _config(
        "vdt",
        f"parallel.grid={strategy}",
        "parallel.ring=2",
        "model.sizes=[5,16,12]",
        "model.patch=[1,2,2]",
        "train.curriculum=[{}]",
    )
    (stage,) = config.train.curriculum
    exact = rehearsed(config, stage, 1)
    monkeypatch.setattr(grids, "MOST_TOKENS", 48)
    found = rehearsed(config, stage, 1)
    assert sum(found.moves.values(), Moved()) == sum(exact.moves.values(), Moved())
    assert found.moves.keys() == {"blocks", "reduce"}
    assert found.flops == pytest.approx(exact.flops, rel=0.25)


def test_a_smaller_sample_leaves_every_rank_some_tokens() -> None:
    model = grids.sizes_of(_config("vdt", "model.sizes=[4,256,256]", "model.patch=[1,2,2]").model)
    assert smaller((4, 256, 256), model, 4) == (4, 128, 128)
    assert smaller((5, 8, 8), model, 4) == (5, 8, 8)
    assert smaller((4, 4096, 6), model, 4) == (4, 2 * 1365, 6)


def test_the_plan_names_the_strategy_that_places_nothing() -> None:
    text = plan(_config("vdt", "parallel.ring=2", "parallel.grid=ring")).table()
    assert "ring (parallel.grid = ring): dim 0 stays sharded in every block" in text
    assert "why" not in text
    assert "samples of" not in text


def test_the_plan_prints_the_placement_and_why() -> None:
    config = _config("axial", "model.head_dim=4", "parallel.ring=2", "train.curriculum=[{batch=2}]")
    text = plan(config).table()
    assert "samples of 9 x 8 x 7 positions, 2 a data rank" in text
    assert "needs dim 2 whole" in text
    assert "from dim" in text
    assert f"{placement_of(config, config.train.curriculum[-1]).switches} switch(es)" in text


def test_memory_falls_as_ranks_grow() -> None:
    kept = [
        rehearsed(_config("vdt", f"parallel.ring={ranks}", "train.curriculum=[{}]"), stage, 0)
        for ranks in (1, 2, 4)
        for stage in _config("vdt", "train.curriculum=[{}]").train.curriculum
    ]
    assert kept[0].kept_bytes > kept[1].kept_bytes > kept[2].kept_bytes


def test_an_imagined_rank_counts_what_a_real_one_sends() -> None:
    mesh = Mesh.imagined(1, ring=3)
    gshard = GridShard(mesh, (7, 5, 4))

    x = torch.empty(2, *gshard.local_sizes, 6, device="meta", requires_grad=True)
    with ledger() as moved:
        y, other = gshard.switch(x, 1)
        y.sum().backward()
    one = switch_bytes(gshard.shares, other.shares, 1, 2 * 4 * 6, 4)
    assert (moved.sent_bytes, moved.received_bytes) == (
        one.sent_bytes + one.received_bytes,
        one.sent_bytes + one.received_bytes,
    )
    assert other.dim == 1
    assert mesh.parameter_group is not None


def test_a_dry_run_is_refused_with_the_reason() -> None:
    from xdist.dry_run import dry_run

    with pytest.raises(ConfigError, match="a dry run knows no vdt"):
        dry_run(_config("vdt"))


def test_a_model_of_grids_takes_only_its_own_options() -> None:
    with pytest.raises(ConfigError, match="did you mean bases"):
        build(_config("mamba_nd", "model.options={base=3}").model)
    with pytest.raises(ConfigError, match="not of the type"):
        build(_config("mamba_nd", "model.options={bases=3.5}").model)
    with pytest.raises(ConfigError, match="does not fit a mamba_nd"):
        build(_config("mamba_nd").model, precision="bfloat16")
