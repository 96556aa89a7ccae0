"""Which xdist mask a model of HuggingFace Transformers asks for, read back from its own mask.

The library describes a mask by a function of (batch row, head, query index, key index). It is
asked at the edges where the masks that xdist knows differ, and must answer as one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from xdist.errors import MaskError
from xdist.mask import Mask

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def recognised(function: MaskFunction, size: int | None, device: torch.device) -> Mask:
    """The mask that answers as `function` does.

    Args:
        function: (row, head, query, key) -> visible, elementwise over index tensors.
        size: the window or chunk the model names beside it; None for a mask without one.
        device: where the tensors live that the function may hold.

    Raises:
        MaskError: no mask of xdist answers so.
    """
    queries, keys = _edges(size)
    q, k = (torch.tensor(x, device=device) for x in (queries, keys))
    zero = torch.zeros((), dtype=torch.int64, device=device)
    said = torch.as_tensor(function(zero, zero, q, k)).expand(len(queries)).cpu()
    for mask in _candidates(size):
        if torch.equal(said, _visible(mask, q.cpu(), k.cpu())):
            return mask
    raise MaskError(
        "the model asks for an attention mask that xdist does not know",
        f"it is neither causal nor bidirectional, whole, windowed or chunked (size {size})",
        "use a model with one of these masks",
    )


def _candidates(size: int | None) -> list[Mask]:
    if size is None:
        return [Mask(), Mask(causal=False)]
    window = size - 1  # the library counts the query's own key
    return [
        Mask(window=window),
        Mask(chunk=size),
        Mask(causal=False, window=size),
        Mask(causal=False, window=window),
    ]


def _edges(size: int | None) -> tuple[list[int], list[int]]:
    """Pairs of query and key indices at which masks of this size may differ."""
    s = 7 if size is None else size
    near = range(-2, 3)
    queries = {max(c * s + d, 0) for c, d in product((0, 1, 2, 3), near)}
    pairs = []
    for q in sorted(queries):
        keys = {q + c * s + d for c, d in product((-1, 0, 1), near)}
        keys |= {c * s + d for c, d in product((0, 1, 2, 3, 4), (-1, 0, 1))}
        pairs += [(q, k) for k in sorted(keys) if k >= 0]
    return [q for q, _ in pairs], [k for _, k in pairs]


def _visible(mask: Mask, q: Tensor, k: Tensor) -> Tensor:
    """The words of `Mask` for positions of one document."""
    left, right = mask.sides()
    seen = torch.ones_like(q, dtype=torch.bool)
    if mask.chunk is not None:
        seen &= q // mask.chunk == k // mask.chunk
    if left is not None:
        seen &= k >= q - left
    if right is not None:
        seen &= k <= q + right
    return seen
