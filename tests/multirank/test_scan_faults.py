"""A rank that is killed in the middle of a chain ends in PeerLost on every other rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xdist.comm.worlds import Rendezvous

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("algorithm", ["chain", "pipelined"])
def test_the_others_name_the_rank_killed_in_a_chain(algorithm: str) -> None:
    # As under torchrun: the ranks meet at a store that outlives them all.
    meeting = Rendezvous()
    common = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launchers")),
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(meeting.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/multirank/lost_in_chain.py"), algorithm],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        ended = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1].returncode == -9
    for number in (0, 2):
        out, err = ended[number]
        assert ranks[number].returncode == 7, err
        assert out == "LOST move=scan rank=1\n"
