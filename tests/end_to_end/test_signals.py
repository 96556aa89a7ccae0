"""Failure 6: a signal to any rank, in any phase, saves once and ends with 75; so does a second.

Each run is taken up again and ends as the one that was not disturbed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest

from tests.end_to_end.forked import Case, Ended
from tests.end_to_end.training import config_of, lines_of, make_store, status_of

EVALUATES = "evaluate.every_steps=3"
LONG = "train.step_timeout_s=60"
CASES = [
    Case("whole", [EVALUATES]),
    Case("one-rank", [EVALUATES], act="term", point="train.backward", count=3),
    Case("in-save", [EVALUATES], rank=0, act="term", point="save.manifest_written", count=1),
    # Asked in the step before: the evaluation after step 3 is left out, and made on resuming.
    Case("before-evaluation", [EVALUATES], act="term", point="train.backward", count=3),
    Case("in-evaluation", [EVALUATES], act="term", point="evaluation", count=2),
    Case("in-last-evaluation", [EVALUATES], act="term", point="evaluation", count=5),
    # No data ever come: the step is not begun.
    Case("data", [EVALUATES, LONG], act="term_and_sleep 60", point="data", count=4),
    Case("twice", [EVALUATES], act="term_twice", point="train.backward", count=4),
    Case("twice-unsaved", [EVALUATES], act="term_twice", point="train.backward", count=1),
    Case(
        "twice-in-move",
        [EVALUATES, LONG],
        rank=0,
        act="term_twice_later",
        point="train.step",
        count=4,
    ),
]
AGAIN = [Case(case.name, [EVALUATES]) for case in CASES if case.name != "whole"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("signals")
    make_store(made)
    return made


@pytest.fixture(scope="module")
def ended(
    folder: pathlib.Path, drive: Callable[..., dict[str, Ended]]
) -> dict[str, tuple[Ended, dict[str, object]]]:
    """How each run ended, and its status.json then."""
    first = drive(folder, CASES)
    found = {
        case.name: (first[case.name], status_of(config_of(folder, case.name))) for case in CASES
    }
    again = drive(folder, AGAIN)
    assert all(one.codes == [0, 0] for one in again.values())
    return found


def _numbers(folder: pathlib.Path, name: str) -> list[list[object]]:
    return [
        [line["step"], line["eval"]["loss"] if "eval" in line else line["loss"]]
        for line in lines_of(config_of(folder, name))
    ]


@pytest.mark.parametrize("name", [case.name for case in AGAIN])
def test_a_run_that_was_told_to_stop_ends_as_one_that_was_not(
    folder: pathlib.Path, ended: dict[str, tuple[Ended, dict[str, object]]], name: str
) -> None:
    """The same steps and evaluations on record, bit by bit, in the same order."""
    assert ended["whole"][0].codes == [0, 0]
    assert _numbers(folder, name) == _numbers(folder, "whole")
    assert status_of(config_of(folder, name))["state"] == "finished"


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("one-rank", 3),
        ("in-save", 3),
        ("before-evaluation", 3),
        ("in-evaluation", 3),
        ("in-last-evaluation", 6),
        ("twice-unsaved", 2),
    ],
)
def test_all_ranks_save_once_at_a_step_boundary_and_end_with_75(
    ended: dict[str, tuple[Ended, dict[str, object]]], name: str, step: int
) -> None:
    """The signal went to one rank alone."""
    one, status = ended[name]
    assert one.codes == [75, 75]
    assert (status["state"], status["exit_code"], status["step"]) == ("preempted", 75, step)
    assert str(status["last_checkpoint"]).endswith(f"step-{step:08}")
    assert "SIGTERM" in str(status["reason"]) or "another rank" in str(status["reason"])


def test_a_rank_that_waits_for_data_stops_without_them(
    ended: dict[str, tuple[Ended, dict[str, object]]],
) -> None:
    one, status = ended["data"]
    assert one.codes == [75, 75]
    assert one.seconds < 30
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert str(status["last_checkpoint"]).endswith(f"step-{status['step']:08}")


@pytest.mark.parametrize("name", ["twice", "twice-in-move"])
def test_a_second_signal_ends_at_once_when_a_checkpoint_is_young(
    folder: pathlib.Path, ended: dict[str, tuple[Ended, dict[str, object]]], name: str
) -> None:
    """In a step, and while the main thread waits in a move, where Python calls no handler."""
    one, status = ended[name]
    rank = 1 if name == "twice" else 0
    assert one.codes[rank] == 75
    # The other one, which got no signal, lost it.
    assert one.codes[1 - rank] in (7, -6)
    assert (status["state"], status["exit_code"], status["step"]) == ("preempted", 75, 3)
    assert "ended at once; the last checkpoint is 1 step old" in str(status["reason"])
    assert str(status["last_checkpoint"]).endswith("step-00000002")
