"""One micro-step of a model of grids on a rank that is imagined: what it would move and hold.

The model itself is called, on tensors of the meta device, which have shapes and no values; the
ledger counts its exchanges, and nothing is computed or sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from xdist.comm.ledger import Ledger, ledger
from xdist.cost.moves import Moved
from xdist.grid_shard import GridShard
from xdist.mesh import Mesh
from xdist.models import build
from xdist.models.grid_config import DTYPES
from xdist.plan.meta import MetaRun


@dataclass(frozen=True)
class Rehearsed:
    """One micro-step of one rank: what moves by move, FLOPs, and what tensors hold.

    kept_bytes: from forward to backward; peak_bytes: at most, parameters and gradients included.
    """

    moves: dict[str, Moved] = field(hash=False)
    flops: int
    kept_bytes: int
    peak_bytes: int
    parameter_bytes: int


def rehearse(
    model: Any,
    sizes: tuple[int, ...],
    rows: int,
    mesh: Mesh,
    dim: int = 0,
    *,
    counted: bool = False,
) -> Rehearsed:
    """Forward and backward of `rows` samples of these sizes on a rank that is imagined.

    model: the sizes of a model of grids; mesh: of the meta device; dim: sharded where the samples
    come in; counted: whether the loss counts its positions itself.
    """
    gshard = GridShard(mesh, sizes, dim)
    with ledger() as moved, MetaRun() as held:
        with torch.device("meta"):
            module = build(model)
        parameters = held.live_bytes
        x, labels = inputs_of(model, gshard, rows)
        before = held.live_bytes
        with _Flops() as flops:
            valid = None if counted else 1
            loss: Tensor = module.loss(x, labels, gshard, valid_tokens=valid)
            kept = held.live_bytes - before
            loss.backward()
        del loss
    return Rehearsed(_by_move(moved), flops.count, kept, held.peak_bytes, parameters)


def inputs_of(model: Any, gshard: GridShard, rows: int) -> tuple[Tensor, Tensor]:
    """x and labels of a rank's part, without values, on the mesh's device."""
    dtype, shape = DTYPES[model.dtype], (rows, *gshard.local_sizes)
    device = gshard.mesh.device
    if hasattr(model, "classes"):
        x = torch.empty(*shape, model.channels, dtype=dtype, device=device)
        return x, torch.empty(shape, dtype=torch.int64, device=device)
    # Of video: two channels beside its own, for what is known and for the time.
    x = torch.empty(*shape, model.channels + 2, dtype=dtype, device=device)
    return x, torch.empty(*shape, model.channels, dtype=dtype, device=device)


class _Flops(TorchDispatchMode):
    """Adds up the operations of matrix products, attention and convolutions, by torch's own
    formulas. (torch's counter follows modules, and takes no module inside an autograd Function.)"""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.count += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _by_move(moved: Ledger) -> dict[str, Moved]:
    return {name: Moved(one.sent_bytes, one.received_bytes) for name, one in moved.by_move.items()}
