"""Tokens per second and peak memory of the main job at three lengths, on 1 and 2 ranks.

Runs `xdist launch local` as a user would and reads metrics.jsonl; the first step, which also fills
caches, is left out.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LENGTHS = (1 << 16, 1 << 18, 1 << 20)
RANKS = (1, 2)
CONFIG = "configs/quickstart.toml"


def run(root: Path, steps: int = 4) -> list[dict[str, Any]]:
    """One row a length and rank count."""
    return [_measure(root, length, ranks, steps) for length in LENGTHS for ranks in RANKS]


def _measure(root: Path, length: int, ranks: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="xdist-bench-") as folder:
        overrides = [
            f"run.directory={folder}",
            "run.name=bench",
            f"parallel.ulysses={ranks}",
            f"train.curriculum=[{{length={length}, batch=1, steps={steps}}}]",
            "checkpoint.every_steps=0",
            f"evaluate.tokens={1 << 16}",
            f"evaluate.length={1 << 16}",
        ]
        command = [sys.executable, "-m", "xdist_launchers.cli", "launch", "local", CONFIG]
        print(f"length {length:,} on {ranks} rank(s)", flush=True)
        subprocess.run(
            [*command, *overrides, "--ranks", str(ranks)], cwd=root, check=True, stdout=sys.stderr
        )
        text = (Path(folder) / "bench" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    found = [line for line in lines if "tokens_per_s" in line and "eval" not in line][1:]
    speed = statistics.median(line["tokens_per_s"] for line in found)
    last = found[-1]
    return {
        "case": f"{length} on {ranks}",
        "length": length,
        "ranks": ranks,
        "tokens/s": speed,
        "tokens/s per rank": speed / ranks,
        "step (s)": length / speed,
        "peak memory per rank (MiB)": max(last["peak_memory_bytes"]) >> 20,
        "sent per step (bytes, all ranks)": sum(last["sent_bytes"]),
        "planned (bytes)": sum(last["planned_bytes"]),
    }
