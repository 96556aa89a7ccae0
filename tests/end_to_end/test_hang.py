"""Failure 13: a rank that hangs ends the run with 7; the message says who, where, since when.

All runs are made once, a few at a time: most of their time is spent waiting.
"""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Callable

import pytest

from tests.end_to_end.forked import Case, Ended
from tests.end_to_end.training import config_of, losses, make_store, status_of

HOST = os.uname().nodename
LIMIT_S = 5
# Steps take milliseconds; the first one may be slow on a busy machine.
LIMITS = [f"train.step_timeout_s={LIMIT_S}", "train.first_step_timeout_s=120"]
FIRST = ["train.step_timeout_s=4", "train.first_step_timeout_s=6"]
EVEN = [*LIMITS, "train.curriculum=[{length=64,batch=2,steps=6}]"]
# The signal of a hang, its notice, reports, verdict: within 10 s of the time limit.
PEERS_S = LIMIT_S + 10

CASES = [
    Case("stopped", LIMITS, 3, 2, "stop", "train.backward", 4, settled=[0, 1]),
    Case("first-rank", LIMITS, 2, 0, "stop", "train.backward", 4, settled=[1]),
    Case("data", LIMITS, act="sleep 60", point="data", count=4),
    Case("late-start", [*LIMITS], act=f"sleep {LIMIT_S + 4}", point="train.backward"),
    Case("first-step", FIRST, act="sleep 60", point="train.backward"),
    Case("lock", LIMITS, act="hold_lock 60", point="train.backward", count=4, settled=[0]),
    Case("full-disk", LIMITS, act="full_disk 60", point="train.backward", count=4),
    Case("evaluation", LIMITS, act="sleep 60", point="train.status", count=2),
    Case("skip", EVEN, act="skip_a_move", count=3),
    Case("other", EVEN, act="other_a_move", count=3),
    Case("shape", EVEN, act="shape_a_move", count=3),
    Case("killed", LIMITS, act="kill", point="train.backward", count=4),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("hang")
    make_store(made)
    return made


@pytest.fixture(scope="module")
def ended(folder: pathlib.Path, drive: Callable[..., dict[str, Ended]]) -> dict[str, Ended]:
    return drive(folder, CASES, at_once=4)


def _logs(folder: pathlib.Path, name: str) -> pathlib.Path:
    return folder / "runs" / name / "logs"


def _told(said: str) -> list[str]:
    """The three lines of the verdict, from rank 0's output."""
    lines = said.strip().splitlines()
    return lines[lines.index(next(line for line in lines if HOST in line)) :]


def test_a_stopped_rank_is_named_by_the_others(
    folder: pathlib.Path, ended: dict[str, Ended]
) -> None:
    one = ended["stopped"]
    assert one.codes == [7, 7, None]
    assert one.seconds < PEERS_S
    what, why, do = _told(one.said[0])
    assert re.match(rf"rank 2 on {HOST} hangs: in backward of step 4 since \d+ s; it was ", what)
    assert "stopped by a signal (SIGSTOP)" in what
    assert "ranks 0, 1 wait in reduce" in why
    assert f"step 4 took longer than train.step_timeout_s = {LIMIT_S} s" in why
    assert "training resumes from the last checkpoint" in do
    # Told by one rank.
    assert "hangs" not in one.said[1]
    status = status_of(config_of(folder, "stopped"))
    assert (status["state"], status["exit_code"]) == ("failed", 7)
    assert (status["rank"], status["host"]) == (2, HOST)
    assert status["reason"].startswith("rank 2 on ")
    assert status["last_checkpoint"].endswith("step-00000002")


def test_stacks_and_moves_of_every_rank_that_can_are_written(
    folder: pathlib.Path, ended: dict[str, Ended]
) -> None:
    logs = _logs(folder, "stopped")
    for rank in (0, 1):
        stacks = (logs / f"rank-{rank}.stacks.txt").read_text()
        assert "in finish" in stacks
        assert "xdist/train/loop.py" in stacks
        assert '"name": "reduce"' in (logs / f"rank-{rank}.hang.json").read_text()
    moves = (logs / "rank-2.moves").read_text()
    assert " step 4: backward" in moves.splitlines()[0]
    assert re.search(r" ended \w+ of \(0, 1, 2\) in (forward|backward)", moves)
    for name in ("rank-0.stacks.txt", "rank-0.moves"):
        assert (logs / name).stat().st_mode & 0o777 == 0o600


def test_rank_0_may_be_the_one_that_hangs(folder: pathlib.Path, ended: dict[str, Ended]) -> None:
    """It holds the store of the rendezvous: nothing is asked of it."""
    one = ended["first-rank"]
    assert one.codes == [None, 7]
    assert one.seconds < PEERS_S
    assert f"rank 0 on {HOST} hangs: in backward of step 4" in one.said[1]
    assert status_of(config_of(folder, "first-rank"))["rank"] == 0


def test_a_rank_that_waits_for_data_is_named_with_what_the_others_wait_in(
    folder: pathlib.Path, ended: dict[str, Ended]
) -> None:
    one = ended["data"]
    assert one.codes == [7, 7]
    assert one.seconds < PEERS_S
    assert re.search(rf"rank 1 on {HOST} is in data of step 4 since \d+ s", one.said[0])
    assert re.search(r"rank 0 waits in reduce \(move \d+, in agreement\)", one.said[0])
    assert "_read_ahead" in (_logs(folder, "data") / "rank-1.stacks.txt").read_text()


def test_a_slow_first_step_has_a_limit_of_its_own(
    folder: pathlib.Path, ended: dict[str, Ended]
) -> None:
    assert ended["late-start"].codes == [0, 0]
    assert len(losses(config_of(folder, "late-start"))) == 6
    one = ended["first-step"]
    assert one.codes == [7, 7]
    assert f"rank 1 on {HOST} is in backward of step 1" in one.said[0]
    assert "step 1 took longer than train.first_step_timeout_s = 6 s" in one.said[0]


def test_a_rank_that_keeps_pythons_lock_is_named_and_its_stacks_are_written(
    folder: pathlib.Path, ended: dict[str, Ended]
) -> None:
    one = ended["lock"]
    assert one.codes == [7, None]
    assert one.seconds < PEERS_S
    assert f"rank 1 on {HOST} hangs: in backward of step 4" in one.said[0]
    assert "does not let go of Python's lock" in one.said[0]
    assert "in hold_lock" in (_logs(folder, "lock") / "rank-1.stacks.txt").read_text()


def test_a_rank_that_cannot_write_ends_all_the_same(ended: dict[str, Ended]) -> None:
    """Neither its note, nor its report, nor status.json: a full disk."""
    one = ended["full-disk"]
    assert one.codes == [7, 7]
    assert one.seconds < PEERS_S
    assert f"rank 1 on {HOST} hangs: in backward of step 4" in one.said[0]


def test_every_kind_of_span_has_the_limit(ended: dict[str, Ended]) -> None:
    """Between a step and the next one, here."""
    one = ended["evaluation"]
    assert one.codes == [7, 7]
    assert f"rank 1 on {HOST} is in record of step 2" in one.said[0]


@pytest.mark.parametrize("change", ["skip", "other", "shape"])
def test_moves_that_differ_are_told_and_never_give_wrong_data(
    ended: dict[str, Ended], change: str
) -> None:
    """One rank leaves a move out, makes another one, or gives another shape: exit code 8."""
    one = ended[change]
    assert one.codes == [8, 8]
    assert one.seconds < PEERS_S
    text = one.said[0]
    assert "the ranks do not make the same moves: " in text
    there = {
        "skip": r"for rank 1, which does not make this move: it waits in reduce \(in forward",
        "other": r"switch of \[.*\] float32 on rank 1 \(in forward",
        "shape": r"gather of \[2, 32, 4\] float32 on rank 1 \(in forward",
    }
    assert re.search(there[change], text)
    assert re.search(r"gather of \[2, 32, 8\] float32( on rank 0)? \(in forward", text)
    assert "look for a move that only some ranks make" in text


def test_a_killed_rank_is_told_with_host_and_what_it_was_doing(
    folder: pathlib.Path, ended: dict[str, Ended]
) -> None:
    one = ended["killed"]
    assert one.codes == [7, -9]
    assert one.seconds < 10
    assert f"rank 1 on {HOST} was lost during reduce: its process has ended" in one.said[0]
    assert re.search(r"rank 1 was in backward of step 4 since \d+ s", one.said[0])
    assert "rank 1 was in backward" in status_of(config_of(folder, "killed"))["reason"]
