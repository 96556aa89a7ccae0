"""Runs whose ranks are killed at named points, attempt after attempt until they end well.

One process loads torch once and forks the ranks of every attempt, so that dozens of runs can be
ended by a real SIGKILL between two effects of a step or of a save.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import time
import traceback
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from tests.end_to_end.forked import be, fork, free_port, load
from tests.end_to_end.training import config_of
from xdist.checkpoint.points import Cut, ignore, kill

TWO = ("parallel.ulysses=2", "launch.ranks=2")
# Not points of the code: half a line of metrics.jsonl before the kill, and a checkpoint damaged
DAMAGE = "damage-newest"
TORN = "train.recorded-torn"
# Runs side by side: a rank that saves waits for the disk.
AT_ONCE = 2


@dataclass
class Case:
    """One run and where each of its attempts is cut: (rank, point, occurrence)."""

    name: str
    cuts: list[tuple[int, str, int]] = field(default_factory=list)
    ranks: int = 1

    @property
    def settings(self) -> tuple[str, ...]:
        """Evaluations between saves, so that their lines are cut too."""
        return ("evaluate.every_steps=3", *(TWO if self.ranks == 2 else ()))


def serve() -> None:
    """The helper process: reads cases from its input, forks their ranks, tells how they ended."""
    load()
    asked = json.loads(sys.stdin.read())
    folder = pathlib.Path(asked["folder"])
    waiting = [Case(**fields) for fields in json.loads(asked["cases"])]
    running: list[Attempts] = []
    ended = {}
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            running.append(Attempts(folder, waiting.pop(0)))
        for one in [one for one in running if one.over()]:
            running.remove(one)
            ended[one.case.name] = one.codes
        time.sleep(0.005)
    print(json.dumps(ended))


class Attempts:
    """The attempts of a run, one after another; exit codes of the ranks by attempt."""

    def __init__(self, folder: pathlib.Path, case: Case) -> None:
        self.folder, self.case = folder, case
        self.codes: list[list[int]] = []
        self._left: list[tuple[int, str, int] | None] = [*case.cuts, None]
        self._ranks: dict[int, int | None] = {}  # exit codes by process id, in the order of ranks

    def over(self) -> bool:
        """Take note of ranks that ended, and begin the next attempt; whether there is none."""
        for pid, code in self._ranks.items():
            if code is None and (status := os.waitpid(pid, os.WNOHANG))[0]:
                self._ranks[pid] = os.waitstatus_to_exitcode(status[1])
        codes = list(self._ranks.values())
        if None in codes:
            return False
        if codes:
            self.codes.append([code for code in codes if code is not None])
            self._ranks = {}
        if self._left:
            self._begin(self._left.pop(0))
        return not self._ranks and not self._left

    def _begin(self, cut: tuple[int, str, int] | None) -> None:
        if cut is not None and cut[1] == DAMAGE:
            checkpoints = config_of(self.folder, self.case.name).run_directory / "checkpoints"
            path = max(checkpoints.glob("step-*")) / "state.json"
            path.write_bytes(path.read_bytes()[:-1])
            return
        port = free_port()
        for rank in range(self.case.ranks):
            body = partial(be_rank, self.folder, self.case, rank, port, cut)
            self._ranks[fork(body)] = None


def be_rank(
    folder: pathlib.Path,
    case: Case,
    rank: int,
    port: int,
    cut: tuple[int, str, int] | None,
    settings: tuple[str, ...] = (),
) -> NoReturn:
    """Train as one rank in this forked process, which ends here."""
    code = 1
    try:
        be(rank, case.ranks, port, folder / f"{case.name}.log")
        from xdist.errors import XdistError
        from xdist.train import run

        config = config_of(folder, case.name, *(settings or case.settings))

        def tear(name: str) -> None:
            with (config.run_directory / "metrics.jsonl").open("a") as file:
                file.write('{"step": 5, "lo')
            kill(name)

        on_point = ignore
        if cut is not None and cut[0] == rank:
            torn = cut[1] == TORN
            name = "train.recorded" if torn else cut[1]
            on_point = Cut(name, cut[2], tear if torn else kill)
        try:
            code = run(config, on_point=on_point)
        except XdistError as error:
            code = error.exit_code
            raise
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)
