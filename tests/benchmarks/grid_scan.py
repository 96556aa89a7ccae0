"""Selective scans of half a volume in both directions on one thread: grid_scan beside permuted
copies, forward and with every gradient, time and memory.

Each row runs in a process of its own; memory is the growth of its highest resident set, which
counts outputs and gradients but not the inputs.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from typing import Any

TITLE = "Scans of grids beside permuted copies"
NOTE = (
    "Selective scan, 16 channels of 4 states, both directions with steps, B and C of their own, "
    "float32, one thread, forward and backward, the second of two passes, CPU seconds. permuted "
    "copies is what one writes by hand: tokens put in the order of the scan, "
    "xdist.bidirectional, and back. memory is the growth of the highest resident set over both "
    "passes: outputs and gradients, the inputs not."
)
SIZES = (50, 117, 95)
CHANNELS, STATES = 16, 4
ORDERS = ((0, 1, 2), (2, 0, 1), (1,))
FORMS = ("grid_scan", "permuted copies")


def _sides(torch: Any) -> list[dict[str, Any]]:
    def tokens(width: int) -> Any:
        return torch.randn(1, *SIZES, width).requires_grad_()

    u, a = tokens(CHANNELS), -torch.rand(CHANNELS, STATES)
    return [
        {"u": u, "delta": tokens(CHANNELS), "A": a, "B": tokens(STATES), "C": tokens(STATES),
         "delta_softplus": True}
        for _ in range(2)
    ]  # fmt: skip


def _by_hand(sides: list[dict[str, Any]], order: tuple[int, ...]) -> tuple[Any, Any]:
    import torch

    import xdist

    rows = [d for d in range(3) if d not in order]
    ahead = [0, *(d + 1 for d in (*rows, *order)), 4]
    count = prod(SIZES[d] for d in order)
    given = [
        {
            name: x.permute(*ahead).reshape(-1, count, x.shape[-1])
            if isinstance(x, torch.Tensor) and x.dim() == 5
            else x
            for name, x in side.items()
        }
        for side in sides
    ]
    outs = xdist.bidirectional(xdist.selective_scan, *given)
    shape = [1, *(SIZES[d - 1] for d in ahead[1:4]), CHANNELS]
    back = [ahead.index(place) for place in range(5)]
    return tuple(out.reshape(shape).permute(*back) for out in outs)


def measure(form: str, order: tuple[int, ...]) -> dict[str, float]:
    """In this process: seconds of each direction, and MiB."""
    import torch

    import xdist

    torch.set_num_threads(1)
    sides = _sides(torch)
    leaves = {id(x): x for side in sides for x in side.values() if getattr(x, "is_leaf", False)}
    wanted = [x for x in leaves.values() if x.requires_grad]
    dout = torch.randn(1, *SIZES, CHANNELS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward = backward = 0.0
    for _ in range(2):
        begun = time.process_time()
        if form == "grid_scan":
            outs = xdist.grid_scan(xdist.selective_scan, sides, order=order, reverse="both")
        else:
            outs = _by_hand(sides, order)
        y = outs[0] + outs[1]
        del outs
        between = time.process_time()
        torch.autograd.grad(y, wanted, dout)
        forward, backward = between - begun, time.process_time() - between
        del y
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "forward (s)": round(forward, 2),
        "backward (s)": round(backward, 2),
        "memory (MiB)": round((peak - before) / 1024, 0),
    }


def run(root: Path) -> list[dict[str, Any]]:
    """Each order and form in a process of its own."""
    rows = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels")])
    for order in ORDERS:
        for form in FORMS:
            call = [sys.executable, __file__, form, json.dumps(order)]
            said = subprocess.check_output(call, text=True, env=environment)
            rows.append({"order": str(order), "form": form, **json.loads(said)})
    return rows


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], tuple(json.loads(sys.argv[2])))))
