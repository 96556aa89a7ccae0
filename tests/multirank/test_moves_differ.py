"""Ranks whose calls differ are told so, and never go on with what they did not ask for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

import xdist
from xdist import comm
from xdist.comm.recorder import LINE_BYTES, Move, Recorder, mismatch, move_from, read_file
from xdist.errors import DesyncError
from xdist.testing import run_ranks

ROOT = Path(__file__).resolve().parents[2]


class _Group:
    group_name = "g"


def _move(recorder: Recorder, name: str, peer: int, me: int, shape: tuple[int, ...]) -> Move:
    """A move of two ranks: this one's message to `peer` and the one back."""
    spec = {peer: (shape, "torch.float32")}
    move, _, _ = recorder.begin(name, GROUP, lambda: range(2), spec, spec)
    return move


GROUP = _Group()


def test_messages_of_equal_calls_have_equal_tags_and_others_do_not() -> None:
    one, two = Recorder(), Recorder()
    spec = ((2, 3), "torch.float32")
    _, sends, _ = one.begin("switch", GROUP, lambda: range(2), {1: spec}, {})
    _, _, receives = two.begin("switch", GROUP, lambda: range(2), {}, {0: spec})
    assert sends[1] == receives[0]
    # Another size, dtype, move, or place among the messages.
    others = [("switch", (2, 4), "torch.float32"), ("switch", (2, 3), "torch.float64")]
    others += [("gather", (2, 3), "torch.float32")]
    for name, shape, dtype in others:
        _, tags, _ = Recorder().begin(name, GROUP, lambda: range(2), {1: (shape, dtype)}, {})
        assert tags[1] != receives[0]
    _, again, _ = one.begin("switch", GROUP, lambda: range(2), {1: spec}, {})
    assert again[1] != sends[1]


def test_a_contradiction_is_found_and_slowness_is_none() -> None:
    ranks = {0: Recorder(), 1: Recorder()}
    for _ in range(3):
        for me, recorder in ranks.items():
            move = _move(recorder, "switch", 1 - me, me, (2, 3))
            recorder.wait(move)
            recorder.end(move)
    for me, recorder in ranks.items():
        recorder.wait(_move(recorder, "switch", 1 - me, me, (4, 5)))

    def told() -> dict[int, list[Move]]:
        texts = {me: json.dumps([m.fields() for m in r.moves()]) for me, r in ranks.items()}
        return {me: [move_from(one) for one in json.loads(t)] for me, t in texts.items()}

    # Both sent what the other waits for: a slow connection.
    assert mismatch(told()) == ""
    # A move that was started and is not waited for yet holds nobody up.
    other = Recorder()
    _move(other, "reduce", 0, 1, (1,))
    assert mismatch({1: other.moves()}) == ""
    ranks[1] = Recorder()
    for _ in range(3):
        ranks[1].end(_move(ranks[1], "switch", 0, 1, (2, 3)))
    ranks[1].wait(_move(ranks[1], "gather", 0, 1, (7,)))
    assert mismatch(told()) == (
        "message 4 from rank 1 to rank 0 is gather of [7] float32 on rank 1 and "
        "switch of [4, 5] float32 on rank 0"
    )


KILLED = """
import os, pathlib, signal, sys
from xdist.comm.recorder import Recorder
class Group: group_name = "g"
recorder, group = Recorder(), Group()
recorder.open_file(pathlib.Path(sys.argv[1]))
recorder.say("head 7:")
recorder.enter("backward")
for number in range(70):
    move, _, _ = recorder.begin("ring", group, lambda: range(2), {}, {1: ((3,), "torch.int64")})
    recorder.wait(move)
    if number < 69:
        recorder.end(move)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_last_moves_of_a_killed_process_can_be_read(tmp_path: Path) -> None:
    """Nothing was flushed: the file is mapped."""
    path = tmp_path / "rank-0.moves"
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launchers"))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)],
        env=os.environ | {"PYTHONPATH": paths},
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    head, moves = read_file(path)
    assert head.endswith("head 7: backward")
    assert len(moves) == 64
    assert [int(line.split()[0]) for line in moves] == list(range(7, 71))
    assert moves[-1].split()[2:4] == ["waits", "ring"]
    assert all(line.split()[2] == "ended" for line in moves[:-1])
    assert path.stat().st_size == 65 * LINE_BYTES
    assert path.stat().st_mode & 0o777 == 0o600


def _differ(change: str) -> str:
    mesh = xdist.init_mesh(device="cpu", ulysses=2, timeout_s=10)
    group, x = mesh.sequence_group, torch.ones(2, 6)
    comm.switch(x, group, from_dim=0, to_dim=1)
    odd = mesh.world_rank == 1
    try:
        if odd and change == "move":
            comm.gather(x, group, dim=0)
        elif odd and change == "dtype":
            comm.switch(x.double(), group, from_dim=0, to_dim=1)
        elif odd and change == "size":
            comm.switch(x[:, :2], group, from_dim=0, to_dim=1)
        else:
            comm.switch(x, group, from_dim=0, to_dim=1)
    except DesyncError as error:
        return str(error)
    return "went on"


@pytest.mark.slow
def test_without_a_training_loop_it_is_told_when_the_groups_timeout_is_over() -> None:
    changes = {"move": "gather of ", "dtype": " float64", "size": "[2, 1]"}
    # Side by side: each waits for the timeout.
    with ThreadPoolExecutor(len(changes)) as threads:
        told = list(threads.map(partial(run_ranks, _differ, 2), changes))
    for (change, there), texts in zip(changes.items(), told, strict=True):
        for text in texts:
            assert "the ranks do not make the same moves: message 2 from rank" in text, change
            assert there in text
            assert "switch of [2, 3] float32 on rank 0" in text
            assert "look for a move that only some ranks make" in text
