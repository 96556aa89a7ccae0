"""Error of every recurrence against float64, by length, input dtype and ranks.

The reference is the same chunked kernel on one rank in float64, itself tested against a loop over
tokens to 1e-10; its inputs are the rounded ones. Error is max|a - b| / max|b|.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from operations import OPERATIONS, SMALL, Operation, call, share
from torch import Tensor

import xdist
from xdist.testing import RankPool

LENGTHS = (1 << 12, 1 << 16, 1 << 20)
DTYPES = (torch.float32, torch.bfloat16)
RANKS = (1, 4)
# Stay in float32 beside bfloat16 tokens, as models keep them.
WIDE = ("log_decay", "dt", "delta", "beta", "A", "D")


def results(
    operation: Operation, shard: Any, span: tuple[int, int], drawn: torch.dtype, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients of inputs with values of `drawn`, computed in `dtype`."""
    inputs, dout = share(operation, *span, drawn)
    leaves = {
        name: x.to(
            torch.float32 if dtype == torch.bfloat16 and name in WIDE else dtype
        ).requires_grad_()
        for name, x in inputs.items()
    }
    out = call(operation, shard, leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def reference(name: str, tokens: int, drawn: torch.dtype, folder: str) -> None:
    """On one rank: the results in float64, one file each."""
    found = results(OPERATIONS[name], None, (0, tokens), drawn, torch.float64)
    for tensor, x in found.items():
        torch.save(x, Path(folder) / f"{tensor}.pt")


def compare(
    operation: str, tokens: int, dtype: torch.dtype, folder: str, ranks: int
) -> dict[str, tuple[Tensor | None, float, float]]:
    """On each rank: (part of a tensor that all hold, largest difference, largest reference)."""
    mesh = xdist.init_mesh(ring=ranks)
    layout = xdist.Layout.contiguous(tokens, ranks)
    shard = xdist.SequenceShard(mesh, layout)
    ((start, stop),) = layout.segments(mesh.sequence_rank)
    found: dict[str, tuple[Tensor | None, float, float]] = {}
    tokens_of = OPERATIONS[operation].tokens(1, SMALL, torch.Generator())
    for name, x in results(OPERATIONS[operation], shard, (start, stop), dtype, dtype).items():
        want = torch.load(Path(folder) / f"{name}.pt", mmap=True, weights_only=True)
        size = float(want.abs().max())
        if name == "out" or name in tokens_of:
            own = want[:, start:stop]
            found[name] = (None, float((x.double() - own).abs().max()), size)
        else:
            found[name] = (x.double(), 0.0, size)
    return found


def _errors(ranks: list[dict[str, Any]], folder: str) -> dict[str, float]:
    found = {}
    for name, (part, _, size) in ranks[0].items():
        if part is None:
            largest = max(one[name][1] for one in ranks)
        else:
            want = torch.load(Path(folder) / f"{name}.pt", weights_only=True)
            total = torch.stack([one[name][0] for one in ranks]).sum(0)
            largest = float((total - want).abs().max())
        found[name] = largest / size if size else largest
    return found


def run(
    root: Path, lengths: tuple[int, ...] = LENGTHS, names: tuple[str, ...] = tuple(OPERATIONS)
) -> list[dict[str, Any]]:
    """One row an operation, length and dtype; ranks in columns."""
    rows = []
    with RankPool(1) as one, RankPool(4) as four:
        pools = {1: one, 4: four}
        for name in names:
            for tokens in lengths:
                for dtype in DTYPES:
                    rows.append(_row(name, tokens, dtype, pools))
                    print(rows[-1], flush=True)
    return rows


def _row(name: str, tokens: int, dtype: torch.dtype, pools: dict[int, RankPool]) -> dict[str, Any]:
    kind = str(dtype).removeprefix("torch.")
    row: dict[str, Any] = {"operation": f"{name}, {kind}", "tokens": tokens}
    with tempfile.TemporaryDirectory(prefix="xdist-bench-") as folder:
        pools[1].run(reference, name, tokens, dtype, folder)
        for ranks in RANKS:
            found = pools[ranks].run(compare, name, tokens, dtype, folder, ranks)
            errors = _errors(found, folder)
            row[f"out, {ranks} rank{'s' * (ranks > 1)}"] = f"{errors.pop('out'):.1e}"
            worst = max(errors, key=lambda key: errors[key])
            row[f"worst gradient, {ranks} rank{'s' * (ranks > 1)}"] = (
                f"{errors[worst]:.1e} (d{worst})"
            )
    return row
