"""Ranks that all write: whichever of them is killed inside a save, in the step or in the
background, the run ends as the undisturbed one."""

from __future__ import annotations

import pathlib
import signal
from collections.abc import Callable

import pytest
import torch

from tests.end_to_end.forked import Case, Ended
from tests.end_to_end.training import config_of, held_out, losses, make_store
from xdist.checkpoint import load_latest, open_checkpoint

FSDP = ["engine.name=fsdp"]
# (rank, point, occurrence): each rank writes two files in each of the saves of steps 2, 4 and 6.
CUTS = [
    (1, "save.tensors_written", 3),
    (1, "save.tensors_flushed", 2),
    (0, "save.tensors_written", 4),
    (0, "save.manifest_half_written", 2),
    (0, "save.renamed", 2),
]


def _cases(asynchronous: bool) -> list[Case]:
    settings = [*FSDP, f"checkpoint.asynchronous={str(asynchronous).lower()}"]
    how = "behind" if asynchronous else "in-step"
    return [
        Case(f"{how}-{rank}-{point}", settings, rank=rank, act="kill", point=point, count=count)
        for rank, point, count in CUTS
    ]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, drive: Callable[..., dict[str, Ended]]
) -> pathlib.Path:
    """A store, and the run that was not disturbed."""
    made = tmp_path_factory.mktemp("saves")
    make_store(made)
    assert drive(made, [Case("whole", FSDP)])["whole"].codes == [0, 0]
    return made


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_rank_killed_inside_a_save_that_all_ranks_write(
    folder: pathlib.Path, drive: Callable[..., dict[str, Ended]], asynchronous: bool
) -> None:
    cases = _cases(asynchronous)
    ended = drive(folder, cases)
    for case in cases:
        codes = ended[case.name].codes
        assert codes[case.rank] == -signal.SIGKILL, case
        # The other says PeerLost, unless gloo aborts it first.
        assert codes[1 - case.rank] in (7, -signal.SIGABRT), case
        checkpoints = config_of(folder, case.name).run_directory / "checkpoints"
        for path in checkpoints.glob("step-*"):
            open_checkpoint(path)
    again = drive(folder, [Case(case.name, case.settings) for case in cases])
    whole = config_of(folder, "whole")
    theirs = load_latest(whole.run_directory / "checkpoints")
    assert theirs is not None
    for case in cases:
        assert again[case.name].codes == [0, 0], case
        config = config_of(folder, case.name)
        assert losses(config) == losses(whole), case
        assert held_out(config) == held_out(whole), case
        ours = load_latest(config.run_directory / "checkpoints")
        assert ours is not None
        assert ours.step == theirs.step
        for name, tensor in ours.tensors.items():
            assert torch.equal(tensor, theirs.tensors[name]), name
