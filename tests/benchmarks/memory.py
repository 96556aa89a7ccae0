"""Long sequences on one rank: time and peak memory of a stack under checkpoint_grid.

Four layers `x + mixer(norm(x))` of width 128, each mixer with its published expansion, float32,
forward and backward. Every row runs in a process of its own, whose peak is the whole process's.

    make bench BENCH=memory                              every row
    ROWS="gla@1Mi mamba2@8Mi" make bench BENCH=memory    these; the others stay as they are

The 8 Mi rows take a head (a sum of squares) so that neither the output nor its gradient exists for
all tokens; the others make both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor, nn

from xdist.memory.grid import checkpoint_grid, explain
from xdist.nn import RMSNorm, build_mixer

DIM, LAYERS = 128, 4
MIXERS = (
    "linear",
    "gated_linear",
    "retention",
    "gla",
    "hgrn2",
    "deltanet",
    "gated_deltanet",
    "kda",
    "mamba2",
    "mamba",
    "prefix",
)
KI, MI = 2**10, 2**20
LONGEST = ("gla", "gated_deltanet", "mamba2")
ROWS = [
    *((name, tokens) for name in MIXERS for tokens in (64 * KI, 256 * KI, MI)),
    *((name, 8 * MI) for name in LONGEST),
]
LIMITS_GIB = {MI: 6, 8 * MI: 12}


class Layer(nn.Module):
    """x + mixer(norm(x))."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.norm, self.mixer = RMSNorm(DIM), build_mixer(name, DIM)

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        return x + self.mixer(self.norm(x), shard)


class SquaredSum(nn.Module):
    """A loss that needs nothing but the outputs."""

    def forward(self, y: Tensor, at: slice) -> Tensor:
        return y.square().sum()


def _peak_bytes() -> int:
    """The most memory this process has held so far."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (held,) = [line for line in lines if line.startswith("VmHWM")]
    return int(held.split()[1]) * KI


def measure(name: str, tokens: int) -> dict[str, Any]:
    """One row, in this process."""
    torch.manual_seed(0)
    layers = [Layer(name) for _ in range(LAYERS)]
    parameters = [p for layer in layers for p in layer.parameters()]
    checkpoint_grid(layers, torch.randn(1, KI, DIM, requires_grad=True)).sum().backward()
    before = _peak_bytes()
    x = torch.randn(1, tokens, DIM).requires_grad_()
    grid = explain(layers, x)
    head = SquaredSum() if tokens > MI else None
    start = time.perf_counter()
    y = checkpoint_grid(layers, x, head=head)
    middle = time.perf_counter()
    found = torch.autograd.grad(y, [x, *parameters], torch.ones_like(y), allow_unused=True)
    stop = time.perf_counter()
    assert all(g.isfinite().all() for g in found[1:] if g is not None)
    peak = _peak_bytes()
    limit = LIMITS_GIB.get(tokens)
    return {
        "row": label(name, tokens),
        "forward (s)": middle - start,
        "backward (s)": stop - middle,
        "tokens/s": int(tokens / (stop - start)),
        "peak (GiB)": peak / 2**30,
        "limit (GiB)": "" if limit is None else limit,
        "bytes per token": int((peak - before) / tokens),
        "kept by the grid (MiB)": grid.kept_bytes / MI,
        "grid": f"{grid.chunk_tokens} tokens x {grid.group_layers} layers",
        "threads": torch.get_num_threads(),
    }


def label(name: str, tokens: int) -> str:
    """A row's name, such as gla@256Ki."""
    return f"{name}@{tokens // MI}Mi" if tokens >= MI else f"{name}@{tokens // KI}Ki"


def run(root: Path) -> list[dict[str, Any]]:
    """The rows named in the variable ROWS, or all; each in a process of its own."""
    by_name = {label(*row): row for row in ROWS}
    asked = os.environ.get("ROWS", "").split() or list(by_name)
    if unknown := [name for name in asked if name not in by_name]:
        raise SystemExit(f"no rows {unknown}; there are {list(by_name)}")
    print(f"{len(asked)} rows: {' '.join(asked)}", flush=True)
    path = record.FOLDER / "memory.json"
    known = {}
    if path.exists():
        known = {row["row"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    for name in asked:
        known[name] = _in_a_process(name, *by_name[name]) | {"commit": record.commit()}
        print(json.dumps(known[name]), flush=True)
    return [known[name] for name in by_name if name in known]


def _in_a_process(name: str, mixer: str, tokens: int) -> dict[str, Any]:
    command = [sys.executable, __file__, mixer, str(tokens)]
    folder = str(Path(__file__).resolve().parent)
    paths = [folder, str(record.ROOT), str(record.ROOT / "kernels"), os.environ.get("PYTHONPATH")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"row {name} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
