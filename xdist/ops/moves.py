"""The one move that is public by itself."""

from __future__ import annotations

from torch import Tensor

from xdist.comm import switch as switch_move
from xdist.comm.collectives import ProcessGroup
from xdist.ops.graph_break import graph_break


@graph_break
def switch(
    x: Tensor,
    group: ProcessGroup | None,
    *,
    from_dim: int,
    to_dim: int,
    from_size: int | None = None,
) -> Tensor:
    """The sharded `from_dim` becomes whole and the whole `to_dim` becomes sharded. Differentiable.

    Before: each rank of `group` holds its share of `from_dim`. After: all of it, and its share of
    `to_dim`; shares are those of `torch.tensor_split`. `from_size` is the whole size of
    `from_dim`; it may be left out when every rank holds the same. `group=None` is one rank, the
    identity. Moves (P-1)/P of x each way, backward the same; nothing is saved; nothing must divide
    anything. The dtype is kept. Source: the all-to-all of DeepSpeed-Ulysses (arXiv 2309.14509) and
    DSP (arXiv 2403.10266).

    Raises:
        ShapeError: the dims are equal or not in x, or x does not hold its share of `from_size`.
    """
    return switch_move(x, group, from_dim=from_dim, to_dim=to_dim, from_size=from_size)
