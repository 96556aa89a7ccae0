"""Checks of a call of attention before anything is sent, but those of its tensors' shapes."""

from __future__ import annotations

import hashlib
import math
from numbers import Real

from torch import Tensor

from xdist.comm.checks import disagreeing_ranks
from xdist.cost.attention_keys import Problem
from xdist.dropout import Dropout
from xdist.errors import DesyncError, MaskError, ShapeError
from xdist.mask import Mask
from xdist.shard import SequenceShard


def check_kinds(shard: object, **tensors: object) -> None:
    """Refuses what is no tensor (None is no sinks), and a shard of something else."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) and not (name == "sinks" and x is None):
            raise ShapeError(
                f"{name} must be a tensor", f"got {type(x).__name__}", "pass a torch.Tensor"
            )
    if shard is not None and not isinstance(shard, SequenceShard):
        raise ShapeError(
            "attention takes a SequenceShard or None",
            f"got {type(shard).__name__}",
            "pass xdist.SequenceShard(mesh, layout); for grids there is xdist.grid_attention",
        )


def check_settings(
    mask: Mask, scale: float | None, softcap: float | None, dropout: Dropout | None
) -> None:
    """Refuses settings of another kind, and numbers that would make every output a NaN."""
    if not isinstance(mask, Mask):
        raise MaskError(
            "mask must be an xdist.Mask",
            f"got {type(mask).__name__}",
            "describe what is visible by xdist.Mask(causal=, window=, prefix=, chunk=)",
        )
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ShapeError(f"{name} must be a number", f"got {type(value).__name__}")
        if not math.isfinite(value):
            raise ShapeError(f"{name} must be finite", f"got {value}")
    if softcap is not None and not softcap > 0:
        raise ShapeError("softcap must be positive", f"got {softcap}", "leave it None for no cap")
    if dropout is not None and not isinstance(dropout, Dropout):
        raise ShapeError(
            "dropout must be an xdist.Dropout",
            f"got {type(dropout).__name__}",
            "pass xdist.Dropout(rate, seed=, step=, layer=): what every rank knows alike",
        )


def check_device(q: Tensor, shard: SequenceShard) -> None:
    """Refuses tensors of another kind of device than the one the shard's ranks talk by."""
    if shard.group is not None and q.device.type != shard.mesh.device.type:
        raise ShapeError(
            "q, k and v are not on the device of the shard's mesh",
            f"they are on {q.device}, the mesh is on {shard.mesh.device}",
            "move them there, or make the mesh with device=",
        )


def check_alike(problem: Problem, shard: SequenceShard, *settings: object) -> None:
    """Inside `xdist.checks()`: refuses ranks that make different calls, on all of them."""
    said = repr((problem, settings)).encode()
    others = disagreeing_ranks(shard.group, hashlib.sha256(said).digest())
    if others:
        raise DesyncError(
            "the ranks of one sequence make different calls of attention",
            f"sequence ranks {others} differ from sequence rank 0, which sees {problem.mask}",
            "give every rank the same mask, dtype, batch, heads, strategy and settings, and inputs "
            "that need gradients on all of them or on none",
        )
