"""One rank of a world that loses a member in the middle of a move; run as a script."""

from __future__ import annotations

import os
import signal
import sys

import torch

import xdist
from xdist import comm
from xdist.errors import PeerLost


def main(lost: int) -> None:
    mesh = xdist.init_mesh(device="cpu", ring=int(os.environ["WORLD_SIZE"]))
    x = torch.ones(2, 6)
    comm.gather(x, mesh.sequence_group, dim=1)
    if mesh.sequence_rank == lost:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        for _ in range(3):
            comm.switch(x, mesh.sequence_group, from_dim=0, to_dim=1)
    except PeerLost as error:
        # Named first, for the test; then the message a person reads.
        print(f"LOST move={error.move} rank={error.rank} host={error.host}", flush=True)
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(int(sys.argv[1]))
