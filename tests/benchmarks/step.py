"""One forward and backward of the hybrid model on one long sequence: time and memory of each rank.

    python tests/benchmarks/step.py [--length 1048576] [--ranks 2] [--repeat 2] [--window 128]

Prints one JSON object a rank: CPU seconds and wall seconds of each repetition, tokens a second and
peak resident bytes. CPU time is what other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

import xdist
from xdist.memory.allocator import keep_small_blocks
from xdist.models.hybrid_lm import HybridConfig, build
from xdist.testing import run_ranks


def resident_bytes(key: str) -> int:
    """A line of /proc/self/status (VmHWM: the peak, VmRSS: now), bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {key} in /proc/self/status")


def measure(options: dict[str, Any]) -> dict[str, Any]:
    """On one rank: `repeat` passes over this rank's part of a random sequence."""
    keep_small_blocks()
    torch.set_num_threads(1)
    mesh = xdist.init_mesh(ring=int(os.environ.get("WORLD_SIZE", "1")))
    shard = xdist.SequenceShard(
        mesh, xdist.Layout.contiguous(options["length"], mesh.sequence_size)
    )
    config = HybridConfig(window=options["window"], ngram_orders=tuple(options["ngrams"]))
    model = build(
        config, precision=options["precision"], tile_tokens=options["tile_tokens"], seed=0
    )
    generator = torch.Generator().manual_seed(mesh.sequence_rank)
    tokens = torch.randint(0, 256, (1, shard.local_length), generator=generator)
    found: dict[str, Any] = {"rank": mesh.sequence_rank, "cpu_s": [], "wall_s": []}
    for _ in range(options["repeat"]):
        cpu, wall = time.process_time(), time.perf_counter()
        model.loss(tokens, tokens, shard).backward()
        found["cpu_s"].append(round(time.process_time() - cpu, 2))
        found["wall_s"].append(round(time.perf_counter() - wall, 2))
        model.zero_grad()
    best = min(found["cpu_s"])
    found["tokens_per_cpu_s"] = round(shard.local_length / best) if best else None
    found["peak_bytes"] = resident_bytes("VmHWM")
    return found


def main() -> None:
    """Parse the arguments, run the ranks, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1_048_576)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--tile-tokens", type=int, default=1024)
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--ngrams", type=int, nargs="*", default=[2, 3, 4])
    options = vars(parser.parse_args())
    load = os.getloadavg()[0]
    for found in run_ranks(measure, options["ranks"], options):
        print(json.dumps({**found, "load_before": round(load, 1)}))


if __name__ == "__main__":
    main()
