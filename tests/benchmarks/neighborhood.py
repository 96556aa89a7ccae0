"""Attention over sets of a grid on one thread: the kernels with the tiles that `rows_of` chooses
beside tiles of twice and of half as many queries along every dim, forward and backward.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TITLE = "Attention over sets of a grid by tiles"
NOTE = (
    "The kernels alone, float32, one thread, one sample and two heads: medians of 5 passes by "
    "turns, CPU microseconds a token and head. chosen is what rows_of takes, half and twice are "
    "tiles with half and with twice as many queries along each dim, where they can be."
)
# Name of a rule, its settings behind the size, sizes of the grid, head dim.
CASES = (
    ("Near", (3, 1), (24, 24, 24), 16),
    ("Near", (3, 4), (24, 24, 24), 16),
    ("Near", (7, 1), (64, 64), 32),
    ("Near", (63, 1), (4096,), 32),
    ("Blocks", (8, 0), (64, 64), 32),
    ("Strided", (8,), (64, 64), 32),
)
PASSES = 5


def measure(number: int) -> list[dict[str, Any]]:
    """In this process: one case, a row a tile."""
    import torch

    from xdist_kernels.neighborhood import rules as kinds
    from xdist_kernels.neighborhood import torch as kernel
    from xdist_kernels.neighborhood.tiles import rows_of, runs_of

    torch.set_num_threads(1)
    kind, settings, sizes, width = CASES[number]
    rules = [getattr(kinds, kind)(size, *settings) for size in sizes]
    q, k, v, dout = (torch.randn(1, *sizes, 2, width) for _ in range(4))
    chosen = rows_of(rules)
    tiles = {"chosen": chosen}
    for name, times in (("half", 0.5), ("twice", 2)):
        rows = (int(n * times) for n in chosen)
        tiles[name] = tuple(
            min(max(n, 1), rule.most_rows) for n, rule in zip(rows, rules, strict=True)
        )
    runs = {
        name: [runs_of(rule, 0, rule.size, 0, n) for rule, n in zip(rules, rows, strict=True)]
        for name, rows in tiles.items()
        if name == "chosen" or rows != chosen
    }
    scale, each = width**-0.5, 1e6 / (2 * q[0, ..., 0, 0].numel())
    found: dict[str, list[list[float]]] = {name: [[], []] for name in runs}
    for _ in range(PASSES + 1):
        for name, one in runs.items():
            begun = time.process_time()
            kernel.forward(q, k, v, runs=one, scale=scale)
            between = time.process_time()
            kernel.backward(q, k, v, dout, runs=one, scale=scale)
            found[name][0].append((between - begun) * each)
            found[name][1].append((time.process_time() - between) * each)
    title = f"{kind}{settings} of {' x '.join(map(str, sizes))}, head dim {width}"
    return [
        {
            "rule": title,
            "tile": f"{' x '.join(map(str, tiles[name]))} ({name})",
            "forward (us)": statistics.median(forward[1:]),
            "backward (us)": statistics.median(backward[1:]),
        }
        for name, (forward, backward) in found.items()
    ]


def run(root: Path) -> list[dict[str, Any]]:
    """Each case in a process of its own."""
    rows: list[dict[str, Any]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "kernels")])
    for number in range(len(CASES)):
        call = [sys.executable, __file__, str(number)]
        rows += json.loads(subprocess.check_output(call, text=True, env=environment))
    return rows


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
