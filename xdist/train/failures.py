"""What a run that cannot go on leaves behind: status.json, and a diagnosis of bad numbers.

Telling the user is for whoever started the rank: `run` raises once the record is written.
"""

from __future__ import annotations

import json
import pathlib
import socket
from typing import Any

import torch

from xdist.errors import PeerLost, XdistError
from xdist.train.engine import Engine
from xdist.train.record import STATUS, Record, read_json, replace

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def record_failure(error: BaseException, record: Record, step: int) -> None:
    """Write status.json for `error`.

    An error that all ranks raise alike is written by rank 0 alone. A rank that only lost a peer
    does not overwrite what the failing rank said of itself.
    """
    if getattr(error, "agreed", False) and record.rank != 0:
        return
    if isinstance(error, PeerLost):
        if read_json(record.directory / STATUS).get("state") == "failed":
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


def dump_diagnosis(record: Record, engine: Engine, facts: dict[str, Any]) -> pathlib.Path:
    """Write diagnosis.json: `facts`, and the size of each parameter. Rank 0 writes."""
    path = record.directory / "diagnosis.json"
    if record.rank == 0:
        parameters = {
            name: {
                "shape": list(p.shape),
                "largest": float(p.detach().abs().max()) if p.numel() else 0.0,
                "not_finite": int((~torch.isfinite(p.detach())).sum()),
            }
            for name, p in engine.module.named_parameters()
        }
        text = json.dumps({**facts, "parameters": parameters}, indent=1)
        replace(path, text + "\n")
    return path
