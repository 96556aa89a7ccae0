"""One rank of a world whose middle rank is killed during a chain; run as a script."""

from __future__ import annotations

import os
import signal
import sys

import torch

import xdist
from xdist.comm.scan import Scan
from xdist.errors import PeerLost
from xdist.layout import Layout


def main(algorithm: str) -> None:
    mesh = xdist.init_mesh(device="cpu", ring=3)
    layout = Layout.zigzag(60, 3)
    plan = Scan(layout, mesh.sequence_group, transition="matrix", algorithm=algorithm, blocks=4)
    # Too large for a socket's buffers.
    like = torch.ones(1, 1, 8, 100_000)
    states, transitions = [like] * 2, [torch.eye(8).expand(1, 1, 8, 8)] * 2
    plan.start(states, transitions, like).wait()
    try:
        pending = plan.start(states, transitions, like)
        if mesh.sequence_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        pending.wait()
    except PeerLost as error:
        print(f"LOST move={error.move} rank={error.rank}", flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv[1])
