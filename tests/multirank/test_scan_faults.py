"""A rank that is killed in the middle of a chain ends in PeerLost on every other rank."""

from __future__ import annotations

import os
import signal

import pytest
import torch

import xdist
from xdist.comm.scan import Scan
from xdist.errors import PeerLost
from xdist.layout import Layout
from xdist.testing import RankFailed, run_ranks


def killed_in_a_chain(algorithm: str) -> tuple[str, int | None] | None:
    """The middle rank dies between start and wait; what the others are told: move and rank."""
    mesh = xdist.init_mesh(device="cpu", ring=3)
    plan = Scan(
        Layout.zigzag(60, 3),
        mesh.sequence_group,
        transition="matrix",
        algorithm=algorithm,
        blocks=4,
    )
    # Too large for a socket's buffers.
    like = torch.ones(1, 1, 8, 100_000)
    states, transitions = [like] * 2, [torch.eye(8).expand(1, 1, 8, 8)] * 2
    plan.start(states, transitions, like).wait()
    pending = plan.start(states, transitions, like)
    if mesh.sequence_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        pending.wait()
    except PeerLost as error:
        return error.move, error.rank
    return None


@pytest.mark.parametrize("algorithm", ["chain", "pipelined"])
def test_the_others_name_the_rank_killed_in_a_chain(algorithm: str) -> None:
    with pytest.raises(RankFailed) as failure:
        run_ranks(killed_in_a_chain, 3, algorithm)
    assert failure.value.rank == 1
    assert failure.value.results == {0: ("scan", 1), 2: ("scan", 1)}
