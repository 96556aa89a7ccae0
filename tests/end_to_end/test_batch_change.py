"""A run goes on under another global batch when that is allowed, from the next unused sample."""

from __future__ import annotations

import pathlib

import pytest
import torch

from tests.end_to_end.training import config_of, lines_of, make_store, run_here, run_until
from xdist.config import Config
from xdist.data import TextStore
from xdist.mesh import Mesh
from xdist.train.feed import text_feed
from xdist.train.resume import Position, check_order, position_of, state_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A store."""
    made = tmp_path_factory.mktemp("batch")
    make_store(made)
    return made


DOUBLE = "train.accumulation=2"


def _cursors(folder: pathlib.Path, name: str) -> list[int]:
    lines = lines_of(config_of(folder, name))
    return [line["sample_cursor"] for line in lines if "eval" not in line]


def test_a_changed_batch_goes_on_from_the_next_sample_when_allowed(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2 samples a step, from step 3 on 4: none is repeated, none is left out."""
    name = "batch"
    run_until(str(folder), name, "train.step", 3)
    code, message = run_here(str(folder), name, DOUBLE)
    assert code == 2
    assert "checkpoint.allow_batch_change=true" in message
    capsys.readouterr()
    allowed = "checkpoint.allow_batch_change=true"
    run_until(str(folder), name, "train.step", 3, DOUBLE, allowed)
    assert "global batch 2->4, allowed by the config" in capsys.readouterr().out
    # From here on the new batch is the run's own: nothing has to be allowed any more.
    assert run_here(str(folder), name, DOUBLE) == (0, "")
    assert _cursors(folder, name) == [2, 4, 8, 12, 16, 20]


def test_a_finished_run_is_extended_by_a_stage_with_another_batch(
    folder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The samples used so far are the same: nothing has to be allowed."""
    first = "train.curriculum=[{length=61,batch=2,steps=2}%s]"
    assert run_here(str(folder), "longer", first % "") == (0, "")
    capsys.readouterr()
    assert run_here(str(folder), "longer", first % ",{length=61,batch=4,steps=2}") == (0, "")
    assert "global batch 2->4, as the next stage says, step 2" in capsys.readouterr().out
    assert _cursors(folder, "longer") == [2, 4, 8, 12]
    # A stage under way keeps its batch.
    code, message = run_here(
        str(folder), "longer", first.replace("batch=2,steps=2", "batch=3,steps=9") % ""
    )
    assert code == 2
    assert "the global batch changed" in message


def _rows(config: Config, position: Position, steps: int) -> list[torch.Tensor]:
    """The samples of the next steps, one by one, as the loop is fed with them."""
    feed = text_feed(config, Mesh.one_rank(), TextStore(config.data.store), position)
    try:
        made = [feed.next_step() for _ in range(steps)]
    finally:
        feed.close()
    return [row for step in made for micro in step.micro for row in micro.tokens]


def test_the_tokens_after_a_change_of_batch_are_those_of_the_next_samples(
    folder: pathlib.Path,
) -> None:
    """Twelve samples of one epoch, read one a step, or two a step and then three."""
    one = config_of(folder, "x", "train.curriculum=[{length=61,batch=1,steps=12}]")
    wanted = _rows(one, Position(), 12)
    two = config_of(folder, "x", "train.curriculum=[{length=61,batch=2,steps=9}]")
    position = Position()
    got = _rows(two, position, 3)
    for _ in range(3):
        position.made_step(two, 2)
    state = state_of(two, Mesh.one_rank(), position, {})
    three = config_of(
        folder,
        "x",
        "train.curriculum=[{length=61,batch=3,steps=5}]",
        "checkpoint.allow_batch_change=true",
    )
    got += _rows(three, position_of(state, three), 2)
    assert len(got) == len(wanted) == 12
    for row, other in zip(got, wanted, strict=True):
        assert torch.equal(row, other)


def test_a_stage_that_goes_on_counts_its_epochs_from_where_it_began(folder: pathlib.Path) -> None:
    """Where a stage counts its epochs from, through changes of batch, stage and length."""
    old = config_of(folder, "whole", "train.curriculum=[{length=61,batch=2,steps=9}]")
    position = Position()
    for _ in range(3):
        position.made_step(old, 2)
    state = state_of(old, Mesh.one_rank(), position, {})
    new = config_of(
        folder,
        "whole",
        "train.curriculum=[{length=61,batch=3,steps=5},{length=96,batch=3,steps=2}]",
        "checkpoint.allow_batch_change=true",
    )
    check_order(state, new)
    found = position_of(state, new)
    assert (found.step, found.sample_cursor, found.stage_first) == (3, 6, 0)
    for _ in range(2):
        found.made_step(new, 3)
    assert (found.step, found.sample_cursor, found.stage_first) == (5, 12, 12)
    # Saved with the new batch, it is the order of this config: no permission is needed.
    again = state_of(new, Mesh.one_rank(), found, {})
    plain = config_of(
        folder,
        "whole",
        "train.curriculum=[{length=61,batch=3,steps=5},{length=96,batch=3,steps=2}]",
    )
    check_order(again, plain)
    assert position_of(again, plain).stage_first == 12
    # Another length starts its own epoch at the cursor.
    other = config_of(
        folder,
        "whole",
        "train.curriculum=[{length=96,batch=2,steps=9}]",
        "checkpoint.allow_batch_change=true",
    )
    assert position_of(state, other).stage_first == 6
