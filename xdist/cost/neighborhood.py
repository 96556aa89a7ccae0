"""Bytes of attention over sets of a grid, as formulas.

Along the sharded dim a rank fetches the keys and values between the first and the last key that
its queries see, from whoever holds them; the other dims are whole and move nothing. So the bytes
follow from the rule of one dim, and with a window they do not depend on that dim's length:

    neighbourhood   at most (window - 1) dilation positions on either side of a share
    blocks          at most window - 1 positions on either side
    strided         everything: tokens are dealt anew instead, so that a rank holds whole classes

`other` is the elements of keys and values in one position of the sharded dim: B G (D + E) times
the other dims.
"""

from __future__ import annotations

from xdist.cost.moves import Moved, relayout_bytes, sum_itemsize, window_bytes
from xdist.layout import Layout, even_sizes
from xdist_kernels.neighborhood.rules import Blocks, Near, Rule, span


def key_windows(rule: Rule, layout: Layout) -> tuple[tuple[int, int], ...]:
    """`[start, stop)` of the keys each rank's queries see, its own share included.

    layout: contiguous shares of the rule's dim; an empty share needs nothing.
    """
    return tuple(
        span(rule, *held[0]) if (held := layout.segments(rank)) else (0, 0)
        for rank in range(layout.parts)
    )


def rule_bytes(
    rule: Rule, layout: Layout, rank: int, other: int, itemsize: int, *, backward: bool = False
) -> Moved:
    """What one call moves on `rank`: forward keys and values in their dtype, backward their
    gradients in that of sums."""
    moved = window_bytes(layout, key_windows(rule, layout), rank, other, itemsize)
    return moved.back(itemsize, sum_itemsize(itemsize)) if backward else moved


def neighborhood_bytes(
    size: int,
    parts: int,
    rank: int,
    *,
    window: int,
    dilation: int = 1,
    other: int,
    itemsize: int,
    backward: bool = False,
) -> Moved:
    """Of `xdist.neighborhood_attention`, whose sharded dim has `size` positions over `parts`."""
    layout = Layout.contiguous(size, parts)
    rule = Near(size, window, dilation)
    return rule_bytes(rule, layout, rank, other, itemsize, backward=backward)


def window_attention_bytes(
    size: int,
    parts: int,
    rank: int,
    *,
    window: int,
    shift: int = 0,
    other: int,
    itemsize: int,
    backward: bool = False,
) -> Moved:
    """Of `xdist.window_attention`, whose sharded dim has `size` positions over `parts`."""
    layout = Layout.contiguous(size, parts)
    rule = Blocks(size, window, shift)
    return rule_bytes(rule, layout, rank, other, itemsize, backward=backward)


def class_step(size: int, grid: int) -> int:
    """Distance between the at most `grid` positions of one set of grid attention."""
    return -(-size // grid)


def class_layout(size: int, step: int, parts: int) -> Layout:
    """Whole classes modulo `step` for each rank, as even as they come.

    A rank with classes `[a, b)` holds the positions `[a, b)`, `[a + step, b + step)`, ..., in this
    order: its own positions are again classes, modulo b - a.
    """
    bounds = [0]
    for share in even_sizes(step, parts):
        bounds.append(bounds[-1] + share)
    held = [
        [
            (min(start + bounds[rank], size), min(start + bounds[rank + 1], size))
            for start in range(0, size, step)
        ]
        for rank in range(parts)
    ]
    return Layout.from_segments(size, [[(a, b) for a, b in one if a < b] for one in held])


def grid_attention_bytes(
    size: int, parts: int, rank: int, *, grid: int, keys: int, outputs: int, itemsize: int
) -> Moved:
    """Forward of `xdist.grid_attention` along a sharded dim of `size`; backward is `.back()`.

    keys: elements of q, k and v in one position of that dim; outputs: those of the result.
    """
    shares = Layout.contiguous(size, parts)
    dealt = class_layout(size, class_step(size, grid), parts)
    there = relayout_bytes(shares, dealt, rank, keys, itemsize)
    return there + relayout_bytes(dealt, shares, rank, outputs, itemsize)
