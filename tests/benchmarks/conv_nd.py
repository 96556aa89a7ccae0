"""Depthwise 3 x 3 x 3 convolutions of a volume on one thread: xdist beside torch's own and beside
shifted multiply-adds, forward and with every gradient, time and memory.

Each form runs in a process of its own; memory is the growth of its highest resident set,
which counts results and gradients but not the input.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TITLE = "Depthwise convolutions of volumes"
NOTE = (
    "3 x 3 x 3 taps, stride 1, one thread, channels last: medians of 5 passes, CPU seconds. torch "
    "is torch.conv3d on a view of the same memory (channels_last_3d) under autograd; shifted is 27 "
    "multiply-adds of shifted views, planes at a time, and its gradients by the same. backward "
    "makes the gradients of input, weight and bias. memory is the growth of the highest resident "
    "set over all passes: results and gradients, the input not."
)
SIZES = (100, 117, 95)
FORMS = ("xdist", "torch", "shifted")
PASSES = 5
Call = Callable[[], Any]


def _shifted(x: Any, weight: Any, dout: Any) -> tuple[Call, Call]:
    """Forward and backward by shifted multiply-adds, ROWS planes of dim 1 at a time."""
    import torch
    from torch.nn.functional import pad

    rows, taps = 2, weight.squeeze(1).movedim(0, -1).flatten(0, 2)
    n, h, w = x.shape[1:-1]
    places = [(a, b, c) for a in range(3) for b in range(3) for c in range(3)]

    def tiles() -> Any:
        for start in range(0, n, rows):
            stop = min(start + rows, n)
            low, high = max(start - 1, 0), min(stop + 1, n)
            around = (0, 0, 1, 1, 1, 1, low - start + 1, stop + 1 - high)
            yield slice(start, stop), slice(low, high), around

    def forward() -> Any:
        out = torch.empty_like(x)
        for at, near, around in tiles():
            seen, count = pad(x[:, near], around), at.stop - at.start
            total = torch.zeros_like(x[:, at])
            for (a, b, c), tap in zip(places, taps, strict=True):
                total.addcmul_(seen[:, a : a + count, b : b + h, c : c + w], tap)
            out[:, at] = total
        return out

    def backward() -> Any:
        dx, dtaps = torch.zeros_like(x), torch.zeros_like(taps)
        for at, near, around in tiles():
            seen, count, part = pad(x[:, near], around), at.stop - at.start, dout[:, at]
            dseen = torch.zeros_like(seen)
            for number, (a, b, c) in enumerate(places):
                where = (slice(None), slice(a, a + count), slice(b, b + h), slice(c, c + w))
                dseen[where].addcmul_(part, taps[number])
                dtaps[number] += (seen[where] * part).sum((0, 1, 2, 3))
            dx[:, near] += pad(dseen, [-size for size in around])
        return dx, dtaps, dout.sum((0, 1, 2, 3))

    return forward, backward


def _graph(form: str, x: Any, weight: Any, bias: Any, dout: Any) -> tuple[Call, Call]:
    import torch

    import xdist

    conv = xdist.conv_nd  # loaded before memory is counted
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    kept: list[Any] = []

    def forward() -> Any:
        if form == "xdist":
            out = conv(x, weight, bias, groups=x.shape[-1])
        else:
            image = x.movedim(-1, 1)
            out = torch.conv3d(image, weight, bias, padding=1, groups=x.shape[-1])
            out = out.movedim(1, -1)
        kept[:] = [out]
        return out

    def backward() -> Any:
        return torch.autograd.grad(kept.pop(), leaves, dout)

    return forward, backward


def measure(form: str, channels: int, dtype: str) -> dict[str, float]:
    """In this process: median seconds of each direction, and MiB."""
    import torch

    torch.set_num_threads(1)
    kind = getattr(torch, dtype)
    x, dout = (torch.randn(1, *SIZES, channels).to(kind) for _ in range(2))
    weight, bias = torch.randn(channels, 1, 3, 3, 3).to(kind), torch.randn(channels).to(kind)
    if form == "shifted":
        forward, backward = _shifted(x, weight, dout)
    else:
        forward, backward = _graph(form, x, weight, bias, dout)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, list[float]] = {"forward (s)": [], "backward (s)": []}
    for _ in range(PASSES + 1):
        for name, call in (("forward (s)", forward), ("backward (s)", backward)):
            begun = time.process_time()
            call()
            found[name].append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    medians = {name: statistics.median(times[1:]) for name, times in found.items()}
    return {**medians, "memory (MiB)": (peak - before) / 1024}


def run(root: Path) -> list[dict[str, Any]]:
    """One row a number of channels, dtype and form."""
    rows = []
    paths = os.pathsep.join(str(root / name) for name in (".", "kernels", "tests/benchmarks"))
    for channels, dtype in ((16, "float32"), (32, "float32"), (16, "bfloat16"), (32, "bfloat16")):
        for form in FORMS:
            code = (
                f"import conv_nd, json; print(json.dumps(conv_nd.measure{(form, channels, dtype)}))"
            )
            text = subprocess.run(
                [sys.executable, "-c", code],
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            said = json.loads(text.splitlines()[-1])
            name = f"{form}, {channels} channels, {dtype}"
            rows.append({"form": name, "grid": " x ".join(map(str, SIZES)), **said})
    return rows
