"""What a run that cannot go on leaves behind: status.json, and a diagnosis of bad numbers.

Telling the user is for whoever started the rank: `run` raises once the record is written.
"""

from __future__ import annotations

import json
import pathlib
import socket
from typing import Any

import torch

from xdist.console import on_disk
from xdist.errors import PeerLost, XdistError
from xdist.mesh import Mesh
from xdist.train.agree import share_json_rows
from xdist.train.engines.protocol import Engine
from xdist.train.record import Record, read_status, replace

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def record_failure(error: BaseException, record: Record, step: int) -> None:
    """Write status.json for `error`.

    An error that all ranks raise alike is written by rank 0 alone. A rank that only lost a peer
    does not overwrite what the failing rank said of itself.
    """
    if getattr(error, "agreed", False) and record.rank != 0:
        return
    if isinstance(error, PeerLost):
        # Nor what one said that was told twice to stop, and left.
        if _said(record) in ("failed", "preempted"):
            return
        reason, code = str(error), error.exit_code
    elif isinstance(error, XdistError):
        reason, code = str(error), error.exit_code
    elif isinstance(error, KeyboardInterrupt):
        reason, code = "interrupted", INTERRUPTED
    else:
        reason, code = f"{type(error).__name__}: {error}", 1
    rank, host = getattr(error, "rank", None), getattr(error, "host", "")
    record.status(
        "failed",
        step,
        exit_code=code,
        reason=reason,
        rank=record.rank if rank is None else rank,
        host=host or socket.gethostname(),
    )


def _said(record: Record) -> str:
    """The state in status.json, "" where it cannot be read."""
    try:
        return str(read_status(record.directory).get("state", ""))
    except OSError:
        return ""


def dump_diagnosis(
    record: Record, mesh: Mesh, engine: Engine, facts: dict[str, Any]
) -> pathlib.Path:
    """Write diagnosis.json: `facts`, and the size of each parameter. All ranks call, 0 writes."""
    path = record.directory / "diagnosis.json"
    names = [f"model/{name}" for name, _ in engine.module.named_parameters()]
    held = engine.pieces()
    mine = {name: _size_of(held[name].values) for name in names if name in held}
    told = share_json_rows(mine, mesh)
    if record.rank == 0:
        shapes = engine.specs()
        parameters = {
            name.removeprefix("model/"): {
                "shape": list(shapes[name].shape),
                # A NaN in any part is shown, whatever the order of the ranks.
                "largest": float(torch.tensor([r[name][0] for r in told if name in r]).max()),
                "not_finite": sum(rank[name][1] for rank in told if name in rank),
            }
            for name in names
        }
        text = json.dumps({**facts, "parameters": parameters}, indent=1)
        with on_disk(str(path)):
            replace(path, text + "\n")
    return path


def _size_of(values: torch.Tensor) -> tuple[float, int]:
    """The largest absolute value (0 of none), and how many are not finite."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return largest, int((~torch.isfinite(values)).sum())
