"""Runs that are killed, at named points and at random instants, end as the undisturbed run.

Cut points: a real SIGKILL between two effects of a step or of a save, in dozens of runs.
Random instants: the command line as a user starts it, killed from outside.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch

from tests.end_to_end.cut_runs import DAMAGE, TORN, TWO, Case, be_rank
from tests.end_to_end.forked import fork, free_port, load
from tests.end_to_end.killed_command import MARK, Command, marked
from tests.end_to_end.training import config_of, lines_of, make_store, status_of
from tests.launchers.conftest import PATHS
from xdist.checkpoint import load_latest
from xdist.checkpoint.points import SAVE_POINTS

# What must not depend on how often a run was killed; times and memory do.
SAME = ("step", "stage", "sequence_length", "loss", "grad_norm", "learning_rate", "sample_cursor")


def _case(*cuts: tuple[int, str, int] | tuple[str, int], ranks: int = 1) -> Case:
    whole = [cut if len(cut) == 3 else (0, *cut) for cut in cuts]
    words = "-then-".join(f"r{r}-{name}-{count}" for r, name, count in whole)
    return Case(f"{ranks}-{words}", whole, ranks)


# Six steps, saves after 2, 4 and 6, the third of them deletes a checkpoint. Two files of tensors.
_IN_SAVE = [name for name in SAVE_POINTS if name != "save.old_moved" and "prune" not in name]
FAST = [
    _case(("train.updated", 4)),
    _case(("save.tensors_written", 3)),
    _case(("save.manifest_half_written", 2), ("save.renamed", 1)),
    _case(("save.prune_moved", 1)),
    _case((1, "train.backward", 4), (0, "save.folder_flushed", 1), ranks=2),
]
SLOW = [
    *(_case((name, count)) for name in _IN_SAVE for count in (1, 2)),
    *(_case((name, 4)) for name in ("train.step", "train.backward", "train.reduced")),
    *(_case((name, 5)) for name in ("train.updated", "train.recorded", "train.status")),
    *(_case((name, 1)) for name in ("train.step", "train.recorded", "train.finished")),
    _case(("save.pruned", 1)),
    _case((TORN, 5)),
    # A checkpoint that is found broken is saved again over itself.
    _case(("train.step", 5), (DAMAGE, 0), ("save.old_moved", 1)),
    _case(("train.step", 6), (DAMAGE, 0), ("save.renamed", 1), ("save.begin", 1)),
    # Killed again and again without a step in between, and once in every save.
    _case(*[("train.step", 1)] * 3, ("save.begin", 1), ("save.begin", 1)),
    *(
        _case((rank, name, 3), (1 - rank, name, 1), ranks=2)
        for rank, name in enumerate(("train.backward", "train.reduced"))
    ),
    _case((0, "save.tensors_flushed", 2), (0, "save.directory_flushed", 1), ranks=2),
    _case((0, "save.manifest_written", 3), (1, "train.step", 1), ranks=2),
]


def _points(cases: list[Case]) -> set[tuple[str, int]]:
    """Distinct (point, occurrence) cuts."""
    return {(name, n) for case in cases for _, name, n in case.cuts if name != DAMAGE}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "cases",
    [pytest.param(FAST, id="few"), pytest.param(FAST + SLOW, id="all", marks=pytest.mark.slow)],
)
def test_a_run_cut_at_a_named_point_ends_as_the_undisturbed_one(
    tmp_path: pathlib.Path, cases: list[Case]
) -> None:
    """Every cut is a SIGKILL of one rank; losses, evaluations and tensors are equal bit by bit."""
    points = _points(cases)
    assert sum(name.startswith("save.") for name, _ in points) >= 3
    if cases is not FAST:
        assert len(points) >= 30
    assert len({case.name for case in cases}) == len(cases)
    make_store(tmp_path)
    whole = {ranks: Case(f"undisturbed-{ranks}", ranks=ranks) for ranks in (1, 2)}
    ended = _drive(tmp_path, [*whole.values(), *cases])
    for case in cases:
        assert _outcomes_are_right(case, ended[case.name]), (case, ended[case.name])
        expected = config_of(tmp_path, whole[case.ranks].name, *case.settings)
        _assert_same_run(config_of(tmp_path, case.name, *case.settings), expected)


def _outcomes_are_right(case: Case, outcomes: list[list[int]]) -> bool:
    """The rank that was to be cut was, the others noticed, and the last attempt succeeded."""
    cuts = [cut for cut in case.cuts if cut[1] != DAMAGE]
    for (rank, name, _), codes in zip(cuts, outcomes[:-1], strict=True):
        left = [code for other, code in enumerate(codes) if other != rank]
        # The other rank says PeerLost, unless gloo aborts it first or the run had ended for it.
        if codes[rank] != -signal.SIGKILL or not set(left) <= {7, -signal.SIGABRT}:
            print(f"{case.name}: {name} ended with {codes}")
            return False
    return outcomes[-1] == [0] * case.ranks


def _assert_same_run(run: Any, expected: Any) -> None:
    """The same losses, evaluations and final tensors, bit by bit, and a finished run."""
    assert _numbers(run) == _numbers(expected), run.run.name
    assert (status_of(run)["state"], status_of(run)["exit_code"]) == ("finished", 0)
    assert (run.run_directory / "report.html").exists()
    folders = [config.run_directory / "checkpoints" for config in (run, expected)]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1], f"{run.run.name} left something in its checkpoints"
    ours, theirs = (load_latest(folder) for folder in folders)
    assert ours is not None
    assert theirs is not None
    assert (ours.step, ours.rejected) == (theirs.step, ())
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert torch.equal(tensor, theirs.tensors[name]), (run.run.name, name)


def _numbers(config: Any) -> list[list[Any]]:
    """What is on record of every step and evaluation, in order."""
    return [
        [line["step"], line["eval"]["loss"]] if "eval" in line else [line[key] for key in SAME]
        for line in lines_of(config)
    ]


def _drive(folder: pathlib.Path, cases: list[Case]) -> dict[str, list[list[int]]]:
    """Make all attempts of all cases in one helper process: exit codes of the ranks by attempt."""
    text = json.dumps([asdict(case) for case in cases])
    mark = uuid.uuid4().hex
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from tests.end_to_end import cut_runs; cut_runs.serve()",
        ],
        input=json.dumps({"folder": str(folder), "cases": text}),
        env=os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", MARK: mark},
        stdout=subprocess.PIPE,
        text=True,
        timeout=800,
        check=True,
    )
    assert not marked(mark)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A store, and by name the runs that were not disturbed."""
    made = tmp_path_factory.mktemp("kill")
    make_store(made)
    return made


def _undisturbed(folder: pathlib.Path, ranks: int) -> Any:
    command = Command(folder, f"undisturbed-{ranks}", ranks)
    if not command.config.run_directory.exists():
        command.start()
        assert command.finish() == 0
    return command.config


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("ranks", "kills", "seed", "settings"),
    [
        pytest.param(2, 2, 6, (), id="few"),
        pytest.param(2, 6, 5, (), id="launcher", marks=pytest.mark.slow),
        pytest.param(2, 3, 9, ("launch.max_restarts=2",), id="restarts", marks=pytest.mark.slow),
        pytest.param(1, 3, 7, (), id="one-rank", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_at_random_instants_ends_as_the_undisturbed_one(
    folder: pathlib.Path, ranks: int, kills: int, seed: int, settings: tuple[str, ...]
) -> None:
    """The command is given again until the run is done; the slow cases make 12 kills.

    With launch.max_restarts only ranks are killed, and the launcher itself starts new ones.
    """
    restarts = 0
    expected = _undisturbed(folder, ranks)
    draw, log, struck, number = random.Random(seed), folder / f"kills-{seed}.jsonl", 0, 0
    while struck < kills:
        number += 1
        command = Command(folder, f"killed-{seed}-{number}", ranks, *settings)
        try:
            while command.process is None or not command.ended or command.process.returncode:
                command.start()
                if struck == kills:
                    assert command.finish() == 0
                    continue
                command.wait_for_instant(draw)
                seconds = round(time.monotonic() - command.began, 3)
                instant = {"seed": seed, "run": number, "seconds": seconds, "step": command.step}
                whom = command.strike(draw)
                if not whom:
                    # It came to its end before it was struck: by itself it ends well.
                    assert command.finish() == 0
                    continue
                struck += 1
                line = json.dumps(instant | {"killed": whom})
                print(line)
                with log.open("a") as file:
                    file.write(line + "\n")
        finally:
            command.clear()
        _assert_same_run(command.config, expected)
        restarts += command.restarts
        assert command.restarts == 0 or "; restart 1 of 2" in command.said
    assert len(log.read_text().splitlines()) == kills
    assert (restarts > 0) == bool(settings)


RANDOM_STEPS = 60
RANDOM = (
    *TWO,
    f"train.curriculum=[{{length=61,batch=2,steps={RANDOM_STEPS}}}]",
    "checkpoint.every_steps=4",
    "evaluate.every_steps=9",
    # Where rank 0 is killed before it listens, nobody but this limit ends rank 1.
    "launch.init_timeout_s=10.0",
)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("kills", "seed"),
    [pytest.param(3, 1, id="few"), pytest.param(20, 2, id="all", marks=pytest.mark.slow)],
)
def test_random_ranks_killed_at_random_instants(
    tmp_path: pathlib.Path, kills: int, seed: int
) -> None:
    """Whole processes, from outside, by SIGKILL; the instants stand in kills.jsonl.

    Five kills a run; each run then ends as the undisturbed one, bit by bit.
    """
    make_store(tmp_path)
    mark = uuid.uuid4().hex
    subprocess.run(
        [
            sys.executable,
            "-c",
            "from tests.end_to_end import test_kill_campaign; test_kill_campaign.serve_random()",
        ],
        input=json.dumps({"folder": str(tmp_path), "kills": kills, "seed": seed}),
        env=os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", MARK: mark},
        text=True,
        timeout=800,
        check=True,
    )
    assert not marked(mark)
    lines = [json.loads(line) for line in (tmp_path / "kills.jsonl").read_text().splitlines()]
    print(*lines, sep="\n")
    assert len(lines) == kills
    assert {line["rank"] for line in lines} == {0, 1}
    # The killed one by the signal; the other says that it lost it, or gloo aborts it first.
    assert all(line["codes"][line["rank"]] == -signal.SIGKILL for line in lines)
    assert all(line["codes"][1 - line["rank"]] in (7, 3, -signal.SIGABRT) for line in lines)
    expected = config_of(tmp_path, "undisturbed", *RANDOM)
    assert len(lines_of(expected)) > RANDOM_STEPS
    for name in {line["run"] for line in lines}:
        _assert_same_run(config_of(tmp_path, name, *RANDOM), expected)


def serve_random() -> None:
    """The helper process: forks ranks, kills one of them at a random instant, again and again."""
    load()
    asked = json.loads(sys.stdin.read())
    folder, draw = pathlib.Path(asked["folder"]), random.Random(asked["seed"])
    assert _forked(folder, "undisturbed", None, draw) is None
    struck, number = 0, 0
    while struck < asked["kills"]:
        number += 1
        name, of_this = f"random-{number}", 0
        while True:
            # Of each rank as often, so that both are among a few.
            victim = struck % 2 if struck < 2 else draw.randrange(2)
            more = struck < asked["kills"] and of_this < 5
            line = _forked(folder, name, victim if more else None, draw)
            if line is None:
                break
            struck, of_this = struck + 1, of_this + 1
            with (folder / "kills.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


def _forked(
    folder: pathlib.Path, name: str, victim: int | None, draw: random.Random
) -> dict[str, Any] | None:
    """One start of a run, to its end (None) or to the kill of rank `victim` (facts of it)."""
    metrics = config_of(folder, name).run_directory / "metrics.jsonl"

    def step() -> int:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return sum('"step_s"' in line for line in lines)

    port, began = free_port(), time.monotonic()
    start_kill = draw.random() < 0.25
    until = began + draw.uniform(0.0, 1.0) if start_kill else began
    first = 0 if start_kill else step() + draw.randint(1, 12)
    delay = draw.uniform(0.0, 0.05)
    case = Case(name, ranks=2)
    pids = [fork(partial(be_rank, folder, case, rank, port, None, RANDOM)) for rank in range(2)]
    killed: dict[str, Any] | None = None
    codes: list[int | None] = [None, None]
    while None in codes:
        for rank, pid in enumerate(pids):
            if codes[rank] is None and (status := os.waitpid(pid, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(status[1])
        due = time.monotonic() >= until and step() >= first
        if victim is not None and killed is None and codes == [None, None] and due:
            time.sleep(delay)
            seconds = round(time.monotonic() - began, 3)
            os.kill(pids[victim], signal.SIGKILL)
            killed = {"run": name, "rank": victim, "seconds": seconds, "step": step()}
        time.sleep(0.005)
    if killed is not None and codes[victim or 0] == -signal.SIGKILL:
        return killed | {"codes": codes}
    assert codes == [0, 0], (name, codes)
    return None
