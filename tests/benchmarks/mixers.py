"""Mixers beside the torch paths of HuggingFace Transformers: same layer, same weights.

Forward and backward, interleaved in changing order; as many pairs as fit into PAIR_S seconds.
Memory is the highest resident set of a process of its own, less what it held before the call.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xdist.nn import build_mixer
from xdist.nn.from_transformers import copy_weights

DIM = 128
TOKENS = (4096, 16384, 65536)
PAIR_S, PAIRS = 18.0, 9
THREADS = 2
# Their Mamba is a loop over tokens, whose backward writes the whole sequence once for every token:
# minutes at 4 Ki already, so that it is measured on fewer tokens there.
MAMBA_BACKWARD_TOKENS = (1024, 2048)
MEMORY_DIM, MEMORY_TOKENS = 64, (65536, 262144, 1048576)
SIZES: dict[str, dict[str, Any]] = {
    "mamba": {},
    "mamba2": {"head_dim": 64, "state_dim": 128},
    "gated_deltanet": {"head_dim": 32, "heads": 4, "key_heads": 2, "expand_v": 2.0},
}


def mamba() -> nn.Module:
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    return MambaMixer(MambaConfig(hidden_size=DIM, num_hidden_layers=1), 0)


def mamba2() -> nn.Module:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    config = Mamba2Config(
        hidden_size=DIM, num_heads=2 * DIM // 64, n_groups=1, state_size=128, num_hidden_layers=1
    )
    return Mamba2Mixer(config, 0)


def gated_deltanet() -> nn.Module:
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    config = module.Qwen3NextConfig(
        hidden_size=DIM, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=32,
        linear_value_head_dim=64, num_hidden_layers=1, layer_types=["linear_attention"],
    )  # fmt: skip
    return module.Qwen3NextGatedDeltaNet(config, 0)


LAYERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "mamba": ("Mamba", mamba),
    "mamba2": ("Mamba-2", mamba2),
    "gated_deltanet": ("Gated DeltaNet (Qwen3-Next)", gated_deltanet),
}


def pair_of(name: str) -> tuple[nn.Module, nn.Module]:
    """Our mixer and their layer with the same weights."""
    torch.manual_seed(0)
    theirs = LAYERS[name][1]().train()
    ours = build_mixer(name, DIM, **SIZES[name])
    copy_weights(ours, theirs.state_dict())
    return ours, theirs


def seconds(layer: nn.Module, x: Tensor, backward: bool) -> float:
    """Wall time of one pass."""
    gc.collect()
    start = time.perf_counter()
    if backward:
        layer(x).sum().backward()
    else:
        with torch.no_grad():
            layer(x)
    return time.perf_counter() - start


def compared(name: str, tokens: int, backward: bool, *, budget_s: float) -> dict[str, Any]:
    """One row: interleaved pairs of one layer at one length."""
    ours, theirs = pair_of(name)
    x = torch.randn(1, tokens, DIM, requires_grad=backward)
    with torch.no_grad():
        few = x[:, :300]
        assert torch.allclose(ours(few), theirs(few), rtol=1e-3, atol=1e-4), name
    for layer in (ours, theirs):
        seconds(layer, x[:, : min(tokens, TOKENS[0])], backward)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    began = time.perf_counter()
    for number in range(PAIRS):
        arms = [("ours", ours), ("theirs", theirs)]
        for arm, layer in arms if number % 2 else arms[::-1]:
            times[arm].append(seconds(layer, x, backward))
        spent = time.perf_counter() - began
        if spent * (number + 2) / (number + 1) > budget_s:
            break
    ratios = sorted(b / a for a, b in zip(times["ours"], times["theirs"], strict=True))
    mine, other = (statistics.median(times[arm]) for arm in ("ours", "theirs"))
    return {
        "layer": LAYERS[name][0],
        "tokens": tokens,
        "pass": "forward + backward" if backward else "forward",
        "xdist (s)": mine,
        "Transformers (s)": other,
        "ratio": other / mine,
        "ratios of pairs": f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
        "pairs": len(ratios),
        "xdist (KiB a token)": "",
    }


def peak_kib(name: str, tokens: int) -> float:
    """Highest resident set of forward and backward, in KiB, over what was held before it."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        f"import mixers; mixers.memory_child({name!r}, {tokens})"
    )
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join(str(path) for path in (here.parents[1], here.parents[1] / "kernels"))
    out = subprocess.run(
        [sys.executable, "-c", code, str(here)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    return float(json.loads(out.stdout.splitlines()[-1]))


def memory_child(name: str, tokens: int) -> None:
    """In a process of its own: prints the growth of its highest resident set in KiB."""
    torch.set_num_threads(THREADS)
    layer = build_mixer(name, MEMORY_DIM, **SIZES[name])
    x = torch.randn(1, tokens, MEMORY_DIM)
    layer(x[:, :512].clone()).sum().backward()
    before = _high_water_kib()
    layer(x).sum().backward()
    print(json.dumps(_high_water_kib() - before))


def _high_water_kib() -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    raise RuntimeError("this system does not tell a process its highest resident set")


def run(root: Path) -> list[dict[str, Any]]:
    """Rows of time, then of memory."""
    torch.set_num_threads(THREADS)
    lengths = {name: MAMBA_BACKWARD_TOKENS if name == "mamba" else TOKENS for name in LAYERS}
    cases = [(name, tokens, True) for name in LAYERS for tokens in lengths[name]]
    cases += [("mamba", tokens, False) for tokens in TOKENS]
    rows = [compared(*case, budget_s=PAIR_S) for case in cases]
    empty = dict.fromkeys(rows[0], "")
    for name, (title, _) in LAYERS.items():
        for tokens in MEMORY_TOKENS:
            held = {"layer": f"{title}, dim {MEMORY_DIM}", "tokens": tokens}
            kib = {
                "pass": "forward + backward",
                "xdist (KiB a token)": peak_kib(name, tokens) / tokens,
            }
            rows.append(empty | held | kib)
    return rows
