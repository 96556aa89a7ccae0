"""Law 1 on a device: every operation, sharded or not, against one CPU rank in float64.

Runs on each rank; needs torch and xdist's operations only (no zarr, pydantic, ray, deepspeed).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import xdist
from xdist.comm.reduce import start_reduce

SEEDS = 5
FLOAT64_TOLERANCE = 1e-10
FLOAT32_FLOOR = 2e-6
FLOAT32_FACTOR = 1.5

# (sharded inputs by name, inputs held whole by name) -> output sharded like the inputs
Inputs = dict[str, Tensor]
Call = Callable[[Inputs, Inputs, "xdist.SequenceShard | None"], Tensor]


@dataclass(frozen=True)
class Case:
    """One operation with its shapes; `local` tensors are sharded, `whole` ones are not.

    Shapes hold "N" where the sequence is; a name with the suffix "-" is drawn negative, one with
    "+" between 0 and 0.3. like: the input that has the output's shape; "": queries by values.
    """

    name: str
    local: dict[str, tuple]
    whole: dict[str, tuple]
    call: Call
    documents: tuple[float, ...] = ()
    like: str = ""


def _attention(strategy: str, **mask: Any) -> Call:
    def call(local: Inputs, whole: Inputs, shard: Any) -> Tensor:
        # One rank has nothing to choose between; strategies are for several.
        chosen = strategy if shard is not None and shard.mesh.sequence_size > 1 else "auto"
        q, k, v = local["q"], local["k"], local["v"]
        return xdist.attention(q, k, v, shard, mask=xdist.Mask(**mask), strategy=chosen)

    return call


def _linear(strategy: str) -> Call:
    def call(local: Inputs, whole: Inputs, shard: Any) -> Tensor:
        decay = local.get("decay-", whole.get("decay-"))
        chosen = strategy if shard is not None and shard.mesh.sequence_size > 1 else "auto"
        q, k, v = local["q"], local["k"], local["v"]
        return xdist.linear_attention(q, k, v, shard, log_decay=decay, strategy=chosen)

    return call


def _recurrence(name: str, strategy: str, algorithm: str) -> Call:
    def call(local: Inputs, whole: Inputs, shard: Any) -> Tensor:
        alone = shard is None or shard.mesh.sequence_size == 1
        ways = {} if alone else {"strategy": strategy, "algorithm": algorithm}
        given = {key.rstrip("+-"): x for key, x in (local | whole).items()}
        return getattr(xdist, name)(**given, shard=shard, **ways)

    return call


def _convolution(local: Inputs, whole: Inputs, shard: Any) -> Tensor:
    return xdist.causal_conv1d(local["x"], whole["w"], whole["b"], shard, activation="silu")


Q, KV = (2, "N", 4, 16), (2, "N", 2, 16)
QKV = {"q": Q, "k": KV, "v": (2, "N", 2, 24)}
LINEAR = {"q": (2, "N", 4, 8), "k": (2, "N", 4, 8), "v": (2, "N", 4, 12)}
CUTS = (0.0, 0.21, 0.21, 0.6, 1.0)
DELTA = LINEAR | {"k": (2, "N", 4, 8), "beta+": (2, "N", 4)}
# op, label, sharded inputs, inputs held whole, the input that has the output's shape
RECURRENCES: tuple[tuple[str, str, dict, dict, str], ...] = (
    ("delta_rule", "no decay", DELTA, {}, "v"),
    ("delta_rule", "scalar decay", DELTA | {"log_decay-": (2, "N", 4)}, {}, "v"),
    ("delta_rule", "diagonal decay", DELTA | {"log_decay-": (2, "N", 4, 8)}, {}, "v"),
    (
        "ssd",
        "",
        {
            "x": (2, "N", 4, 12),
            "dt+": (2, "N", 4),
            "B": (2, "N", 2, 8),
            "C": (2, "N", 2, 8),
        },
        {"A-": (4,), "D": (4,)},
        "x",
    ),
    (
        "selective_scan",
        "",
        {
            "u": (2, "N", 6),
            "delta+": (2, "N", 6),
            "B": (2, "N", 4),
            "C": (2, "N", 4),
        },
        {"A-": (6, 4), "D": (6,)},
        "u",
    ),
    (
        "prefix_attention",
        "",
        {"k": (2, "N", 4, 12), "v": (2, "N", 4, 12)},
        {"q": (4, 12)},
        "v",
    ),
)

CASES = [
    *(
        Case(f"attention {strategy} {label}", QKV, {}, _attention(strategy, **mask), documents)
        for strategy in ("ulysses", "ring", "gather")
        for label, mask, documents in (
            ("causal", {}, ()),
            ("full, documents", {"causal": False}, CUTS),
            ("window, documents", {"window": 9}, CUTS),
        )
    ),
    Case("attention halo window", QKV, {}, _attention("halo", window=9), CUTS),
    *(
        Case(f"linear attention {strategy} {label}", LINEAR | local, whole, _linear(strategy), CUTS)
        for strategy in ("scan", "switch")
        for label, local, whole in (
            ("no decay", {}, {}),
            ("fixed decay", {}, {"decay-": (4,)}),
            ("scalar decay", {"decay-": (2, "N", 4)}, {}),
            ("diagonal decay", {"decay-": (2, "N", 4, 8)}, {}),
        )
    ),
    *(
        Case(
            f"{name} {strategy} {algorithm} {label}".rstrip(),
            local,
            whole,
            _recurrence(name, strategy, algorithm),
            CUTS,
            like,
        )
        for name, label, local, whole, like in RECURRENCES
        for strategy, algorithm in (("scan", "gather"), ("scan", "chain"), ("switch", "auto"))
    ),
    Case("causal_conv1d", {"x": (2, "N", 6)}, {"w": (6, 4), "b": (6,)}, _convolution, CUTS),
]


def draw(case: Case, length: int, seed: int) -> tuple[Inputs, Inputs, Tensor]:
    """Inputs and output weights in float64 on the CPU, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(name: str, shape: tuple) -> Tensor:
        sizes = [length if size == "N" else size for size in shape]
        x = torch.randn(sizes, generator=generator, dtype=torch.float64)
        if name.endswith("+"):
            return 0.3 * x.sigmoid()
        return -torch.nn.functional.softplus(x) if name.endswith("-") else x

    local = {name: tensor(name, shape) for name, shape in case.local.items()}
    whole = {name: tensor(name, shape) for name, shape in case.whole.items()}
    # Heads as the queries, features as the values; a convolution keeps the shape of x.
    if case.like:
        return local, whole, tensor("out", case.local[case.like])
    shapes = case.local if "q" in case.local else {"q": case.local["x"], "v": case.local["x"]}
    return local, whole, tensor("out", (*shapes["q"][:-1], shapes["v"][-1]))


def evaluate(
    case: Case,
    drawn: tuple[Inputs, Inputs, Tensor],
    shard: xdist.SequenceShard | None,
    device: str,
    dtype: torch.dtype,
) -> Inputs:
    """Output and every gradient, whole, on the CPU in float64."""

    def leaf(x: Tensor, *, sharded: bool) -> Tensor:
        x = x.to(device, dtype)
        x = shard.scatter(x) if shard is not None and sharded else x
        return x.detach().clone().requires_grad_()

    local = {name: leaf(x, sharded=True) for name, x in drawn[0].items()}
    whole = {name: leaf(x, sharded=False) for name, x in drawn[1].items()}
    out = case.call(local, whole, shard)
    weight = drawn[2].to(device, dtype)
    (out * (weight if shard is None else shard.scatter(weight))).sum().backward()
    found = {"out": out.detach()} | {f"d{name}": x.grad for name, x in local.items()}
    if shard is not None:
        found = {name: shard.gather(x) for name, x in found.items()}
    for name, x in whole.items():
        part = x.grad
        group = None if shard is None else shard.mesh.sequence_group
        found[f"d{name}"] = part if group is None else start_reduce(part, group).wait()
    return {name: x.cpu().double() for name, x in found.items()}


def relative(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|b|."""
    return float((a - b).abs().max() / b.abs().max())


def check(device: str, layout: str, length: int, seeds: int = SEEDS) -> list[dict[str, Any]]:
    """All cases on this rank's share of `ring` = world: one row a case, dtype and tensor kind.

    A row holds the median error over the seeds of the worst tensor, what is allowed, and `passed`.
    """
    # Every rank also computes the whole by itself.
    world = xdist.init_mesh(device=device).world_size
    mesh = xdist.init_mesh(ring=world, device=device)
    rows = []
    for case in CASES:
        cuts = [round(cut * length) for cut in case.documents] or None
        parts = getattr(xdist.Layout, layout)(length, mesh.sequence_size)
        shard = xdist.SequenceShard(mesh, parts, cuts)
        parts_of_one = xdist.Layout.contiguous(length, 1)
        cpu = xdist.SequenceShard(xdist.Mesh.one_rank("cpu"), parts_of_one, cuts)
        one = xdist.SequenceShard(xdist.Mesh.one_rank(device), parts_of_one, cuts)
        for dtype in (torch.float64, torch.float32):
            errors: dict[str, list[float]] = {}
            own: dict[str, list[float]] = {}
            for seed in range(seeds):
                drawn = draw(case, length, seed)
                reference = evaluate(case, drawn, cpu, "cpu", torch.float64)
                for into, where in ((errors, shard), (own, one)):
                    found = evaluate(case, drawn, where, device, dtype)
                    for name, x in reference.items():
                        into.setdefault(name, []).append(relative(found[name], x))
            rows.append(_row(case.name, layout, mesh.sequence_size, dtype, errors, own))
    return rows


def _row(
    name: str,
    layout: str,
    ranks: int,
    dtype: torch.dtype,
    errors: dict[str, list[float]],
    own: dict[str, list[float]],
) -> dict[str, Any]:
    medians = {tensor: statistics.median(found) for tensor, found in errors.items()}
    limits = {
        tensor: FLOAT64_TOLERANCE
        if dtype == torch.float64
        else max(FLOAT32_FLOOR, FLOAT32_FACTOR * statistics.median(own[tensor]))
        for tensor in medians
    }
    worst = max(medians, key=lambda tensor: medians[tensor] / limits[tensor])
    return {
        "case": name,
        "layout": layout,
        "ranks": ranks,
        "dtype": str(dtype).removeprefix("torch."),
        "worst tensor": worst,
        "error": medians[worst],
        "allowed": limits[worst],
        # Written so that a NaN does not pass.
        "passed": all(medians[tensor] <= limits[tensor] for tensor in medians),
    }
