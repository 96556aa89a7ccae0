"""A rank that is killed ends in PeerLost on every other rank, which says who and where."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Rank 0 also holds the store through which the survivors find out who is missing.
@pytest.mark.parametrize("lost", [0, 2])
def test_survivors_name_the_lost_rank_and_exit(lost: int) -> None:
    port = str(_free_port())
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launchers"))
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests/multirank/lost_peer.py"), str(lost)],
            env={
                **os.environ,
                "PYTHONPATH": paths,
                "RANK": str(rank),
                "WORLD_SIZE": "3",
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": "1",
            },
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
    assert ranks[lost].returncode == -9
    for number in {0, 1, 2} - {lost}:
        out, err = ended[number]
        assert ranks[number].returncode == 7, err
        said = dict(item.split("=") for item in out.split("LOST ")[1].split())
        assert said["move"] == "switch"
        assert said["rank"] == str(lost)
        assert said["host"] in {socket.gethostname(), "127.0.0.1"}
        assert f"rank {lost} on " in err
