"""Softmax attention on one device, dense, in float64: the words of the design and nothing else.

Nothing here is shared with the library: a token is (document, place in it), a pair of tokens is
visible or not by the words of `Mask`, dropped or not by the words of `Dropout`'s hash, and
torch's autograd makes the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_WORD = np.uint64(0xFFFFFFFF)


def places(cuts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The document of every token and its place inside it, int64 `[N]`, by counting."""
    document = [d for d in range(len(cuts) - 1) for _ in range(cuts[d], cuts[d + 1])]
    place = [i for d in range(len(cuts) - 1) for i in range(cuts[d + 1] - cuts[d])]
    return torch.tensor(document, dtype=torch.int64), torch.tensor(place, dtype=torch.int64)


def near(causal: bool, window: Any, place: Tensor, key_place: Tensor) -> Tensor:
    """Bool `[N, M]`: whether causal and one head's window allow a key."""
    allowed = torch.ones(len(place), len(key_place), dtype=torch.bool)
    after = key_place[None, :] - place[:, None]  # how far the key lies behind the query
    if causal:
        allowed &= after <= 0
    if window is None:
        return allowed
    if isinstance(window, int):
        window = (window, 0) if causal else (window, window)
    left, right = window
    if left is not None:
        allowed &= after >= -left
    if right is not None:
        allowed &= after <= right
    return allowed


def visible_pairs(
    heads: int, cuts: Sequence[int], key_cuts: Sequence[int], *,
    causal: bool, windows: Sequence[Any], prefix: int, chunk: int | None,
) -> Tensor:  # fmt: skip
    """Bool `[H, N, M]`; `windows` holds one window for all heads, or one a head."""
    document, place = places(cuts)
    key_document, key_place = places(key_cuts)
    same = document[:, None] == key_document[None, :]
    if chunk is not None:
        same &= (place // chunk)[:, None] == (key_place // chunk)[None, :]
    first = (key_place < prefix)[None, :]
    each = [same & (first | near(causal, window, place, key_place)) for window in windows]
    return torch.stack(each if len(each) == heads else each * heads)


def kept_pairs(
    rate: float, seeds: tuple[int, int, int], rows: Sequence[int], heads: int, n: int, m: int
) -> Tensor:
    """Bool `[B, H, N, M]`: which probabilities dropout keeps; `seeds` = (seed, step, layer)."""
    key = 0
    for number in seeds:
        key = _mixed64(key ^ number)
    names = (
        np.asarray(rows, dtype=np.uint64)[:, None, None],
        np.arange(heads, dtype=np.uint64)[None, :, None],
        np.arange(n, dtype=np.uint64)[None, None, :],
    )
    a, c = (_word(np.full((1, 1, 1), begin, np.uint64), key) for begin in (0x9E3779B9, 0x3C6EF372))
    for name in names:
        a, c = _word(a, name), _word(c, name)
    b = _word(np.full(m, 0xDAA66D2B, np.uint64), np.arange(m, dtype=np.uint64))
    x = _times(a[..., None] ^ b, 0x7FEB352D)
    x = _times((x ^ x >> np.uint64(15)) + c[..., None] & _WORD, 0x846CA68B)
    signed = (x ^ np.uint64(2**31)).astype(np.int64) - 2**31
    return torch.from_numpy(signed >= round(rate * 2**32) - 2**31)


def _mixed64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def _times(x: NDArray[np.uint64], factor: int) -> NDArray[np.uint64]:
    return x * np.uint64(factor) & _WORD


def _mixed32(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = _times(x ^ x >> np.uint64(16), 0x7FEB352D)
    x = _times(x ^ x >> np.uint64(15), 0x846CA68B)
    return x ^ x >> np.uint64(16)


def _word(state: NDArray[np.uint64], name: NDArray[np.uint64] | int) -> NDArray[np.uint64]:
    name = np.asarray(name, dtype=np.uint64)
    state = _mixed32(state ^ name & _WORD)
    return _mixed32(state ^ name >> np.uint64(32))


def dense(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *,
    seen: Tensor, scale: float, softcap: float | None, factors: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out `[B,N,H,E]` of float64 q `[B,N,H,D]`, k, v `[B,M,G,*]`, and what sinks take `[B,N,H]`.

    `seen` bool `[H,N,M]`; `factors` `[B,H,N,M]` multiplies the probabilities (dropout).
    """
    shared = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    some = seen.any(-1)[None, :, :, None]
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(~some, 0.0)
    if sinks is not None:
        sink = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : k.shape[1]] * some
    taken = (1 - weights.sum(-1)).transpose(1, 2) * some[..., 0].transpose(1, 2)
    if factors is not None:
        weights = weights * factors
    return torch.einsum("bhij,bjhe->bihe", weights, v), taken
