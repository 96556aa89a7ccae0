"""The inverse of batched unit lower triangular matrices, block by block.

    (I + [[X11, 0], [X21, X22]])^-1 = [[Y11, 0], [-Y22 X21 Y11, Y22]],   Yii = (I + Xii)^-1

The small blocks on the diagonal are solved directly; then each step doubles the blocks with two
products. The result is as exact as one triangular solve, and made of batched matrix products.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this, products are too small to pay for themselves; measured on a CPU.
BASE = 16


def _blocks(x: Tensor, size: int, row: int, column: int) -> Tensor:
    """Of every pair of neighbouring diagonal blocks of x [N,C,C]: block (row, column), a view
    [N, C / (2 * size), size, size]."""
    count, side, _ = x.shape
    return x.as_strided(
        (count, side // (2 * size), size, size),
        (side * side, 2 * size * (side + 1), side, 1),
        x.storage_offset() + (row * side + column) * size,
    )


def _base(x: Tensor, size: int) -> Tensor:
    """Inverses of the diagonal blocks of `size` of I + x: [N, C / size, size, size]."""
    count, side, _ = x.shape
    own = x.as_strided(
        (count, side // size, size, size),
        (side * side, size * (side + 1), side, 1),
        x.storage_offset(),
    )
    one = torch.eye(size, dtype=x.dtype, device=x.device).expand(own.shape)
    return torch.linalg.solve_triangular(own, one, upper=False, unitriangular=True)


def unit_inverse(x: Tensor) -> Tensor:
    """(I + x)^-1 for x [N,C,C] contiguous and strictly lower triangular, C a power of two."""
    count, side, _ = x.shape
    size = min(BASE, side)
    if size == side:
        return _base(x, size).view(count, side, side)
    inverse = torch.zeros_like(x)
    own = _base(x, size).view(count, side // (2 * size), 2, size, size)
    _blocks(inverse, size, 0, 0).copy_(own[:, :, 0])
    _blocks(inverse, size, 1, 1).copy_(own[:, :, 1])
    while size < side:
        first, second, below = (
            _blocks(block, size, *at).reshape(-1, size, size)
            for block, at in ((inverse, (0, 0)), (inverse, (1, 1)), (x, (1, 0)))
        )
        product = torch.bmm(torch.bmm(second, below), first).neg_()
        _blocks(inverse, size, 1, 0).copy_(product.view(count, -1, size, size))
        size *= 2
    return inverse
