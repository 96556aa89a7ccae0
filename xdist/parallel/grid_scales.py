"""A coarse grid brought back onto a fine one: each fine token takes its coarse cell's value.

Sharded before and after: one dim, the coarse and the fine grid each in `torch.tensor_split`'s runs.
Moves: the coarse positions that a rank's fine tokens lie in and others hold, at most a few a border
    (a window, `xdist.cost.moves.window_bytes`). Saved for backward: nothing but indices. Must
    divide: nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xdist.cost.grid_scan import spread_windows
from xdist.errors import ShapeError
from xdist.grid_shard import GridShard


def spread(x: Tensor, coarse: GridShard, fine: GridShard, stride: int) -> Tensor:
    """x [B, ceil(S1/stride), ..., C] of the coarse grid as [B, S1, ..., C] of the fine one.

    Fine position i takes coarse position i // stride, along every dim.

    Raises:
        ShapeError: the grids do not belong together.
    """
    wanted = tuple(-(-size // stride) for size in fine.sizes)
    if coarse.sizes != wanted or coarse.dim != fine.dim:
        raise ShapeError(
            f"a grid {stride} times as coarse as {fine.sizes} is {wanted}, sharded along dim "
            f"{fine.dim}",
            f"got {coarse.sizes}, sharded along dim {coarse.dim}",
        )
    windows = spread_windows(fine.sizes[fine.dim], stride, fine.size)
    x = coarse.window(x, windows)
    for dim in range(len(fine.sizes)):
        first = windows[fine.rank][0] if dim == fine.dim else 0
        places = torch.div(fine.positions(dim), stride, rounding_mode="floor") - first
        x = x.index_select(dim + 1, places.to(x.device))
    return x
