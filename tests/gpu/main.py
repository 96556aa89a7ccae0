"""`make gpu`: law 1 on a card, then one step of 1 Mi tokens, into docs/benchmarks/gpu-DATE.md.

Runs from a plain copy of the tree with PYTHONPATH=.:kernels:launchers and any Python that has
torch 2.11 or newer. Without a card it says so in one line and passes. `--device cpu --small` runs
the same code anywhere (a test does).
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# gpu_law1, gpu_step and record are found by the ranks' processes as well.
sys.path[:0] = [str(HERE), str(HERE.parent / "benchmarks")]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="short lengths and one seed")
    parser.add_argument("--out", type=Path, help="folder instead of docs/benchmarks")
    return parser.parse_args()


def _no_card(device: str) -> str:
    """Why nothing can be checked here, in one line; "" when it can."""
    if importlib.util.find_spec("torch") is None:
        return f"gpu: {sys.executable} has no torch, nothing checked (GPU_PYTHON names another)"
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return f"gpu: torch {torch.__version__} sees no CUDA device here, nothing checked"
    return ""


def law_rows(device: str, length: int, seeds: int) -> list[dict[str, Any]]:
    """Law 1 on one rank, and on two gloo ranks that share the device."""
    import gpu_law1

    from xdist.testing import RankPool

    rows = gpu_law1.check(device, "contiguous", length, seeds)
    with RankPool(2) as pool:
        for layout in ("contiguous", "zigzag"):
            rows += pool.run(gpu_law1.check, device, layout, length, seeds)[0]
    return rows


def main() -> int:
    """0: passed, or no card; 1: a case is outside what law 1 allows."""
    arguments = _arguments()
    if why := _no_card(arguments.device):
        print(why)
        return 0
    import gpu_step
    import record

    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    began = time.perf_counter()
    length, seeds = (37, 1) if arguments.small else (1021, 5)
    rows = law_rows(arguments.device, length, seeds)
    for row in rows:
        if not row["passed"]:
            print("FAILED", row)
    failed = sum(not row["passed"] for row in rows)
    print(f"law 1: {len(rows)} cases, {failed} failed, {time.perf_counter() - began:.0f} s")

    tokens = 1 << 10 if arguments.small else 1 << 20
    precisions = ("float32",) if arguments.small else ("float32", "bfloat16")
    steps = [gpu_step.run(arguments.device, tokens, precision) for precision in precisions]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    command, note = "make gpu", f"Law 1: {len(rows)} cases, {failed} failed (gpu-law1-{date}.md)."
    for name, title, table, text in (
        (f"gpu-law1-{date}", "Law 1 on a card", rows, f"Lengths {length}, {seeds} seed(s)."),
        (f"gpu-{date}", "One step of the main model on a card", steps, note),
    ):
        path = record.write(name, title, command, table, note=text, folder=arguments.out)
        print(f"wrote {path}")
    for row in steps:
        print(row)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
