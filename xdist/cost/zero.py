"""Bytes that DeepSpeed 0.19 moves at each ZeRO stage, as formulas; no torch, no process group.

With R data x sequence ranks, E trained elements in float32, groups g of the optimizer padded to
E_g (a multiple of 2R), and p the padded share of a parameter, ceil(elements / R), a rank sends,
and receives, in bytes

    stage   each micro-step                               each optimizer step
    0       0                                             2 (R-1)/R 4E    all-reduce
    1       0                                             2 (R-1)/R 4E + (R-1)/R 4 sum E_g
    2       2 (R-1)/R 4E    all-reduce of buckets         (R-1)/R 4 sum E_g    all-gather
    3       2 (R-1) 4 sum p    all-gather, reduce-scatter one norm a group

Stages 1 and 2 all-reduce gradients of which each rank then keeps its part: DeepSpeed's default,
`use_multi_rank_bucket_allreduce`. With it off each bucket is reduced to its owner, in half the
bytes and more calls; that is not in these formulas. Stage 3 gathers a parameter once a micro-step
where the model fits into `stage3_max_reuse_distance` and `stage3_max_live_parameters`; parameters
of at most `stage3_param_persistence_threshold` elements stay gathered and are gathered again once
a step. The first two micro-steps of a run move more at stage 3, while the order of modules is
learned. Offloading adds one norm a group at stages 1 and 2, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from xdist.cost.moves import Moved

ITEM_BYTES = 4
NORM_BYTES = 4
WIDE_NORM_BYTES = 8
PERSISTENT_ELEMENTS = 100_000  # DeepSpeed's own default


def _all_reduce(nbytes: int, ranks: int) -> Moved:
    moved = 2 * nbytes * (ranks - 1) // ranks
    return Moved(moved, moved)


def _gather(own_bytes: int, ranks: int) -> Moved:
    return Moved((ranks - 1) * own_bytes, (ranks - 1) * own_bytes)


def padded(elements: int, ranks: int) -> int:
    """Elements of a flat group of stages 1 and 2, with its padding."""
    return -(-elements // (2 * ranks)) * 2 * ranks


def share(elements: int, ranks: int) -> int:
    """Elements of a rank's part of a parameter at stage 3, with its padding."""
    return -(-elements // ranks)


def micro_step(
    stage: int,
    groups: Sequence[Sequence[int]],
    ranks: int,
    *,
    persistent: int = PERSISTENT_ELEMENTS,
) -> Moved:
    """What each rank moves in one forward and backward pass.

    groups: elements of each trained parameter, by group of the optimizer. persistent: parameters
    of at most this many elements stay gathered at stage 3.
    """
    sizes = [size for group in groups for size in group]
    if stage < 2:
        return Moved(0, 0)
    if stage == 2:
        return _all_reduce(sum(sizes) * ITEM_BYTES, ranks)
    gathered = sum(share(size, ranks) for size in sizes if size > persistent)
    reduced = sum(share(size, ranks) for size in sizes)
    return _gather(gathered * ITEM_BYTES, ranks) + _gather(reduced * ITEM_BYTES, ranks)


def optimizer_step(
    stage: int,
    groups: Sequence[Sequence[int]],
    ranks: int,
    *,
    persistent: int = PERSISTENT_ELEMENTS,
    offload: bool = False,
) -> Moved:
    """What each rank moves once a step, besides its micro-steps; arguments as `micro_step`.

    offload: the optimizer state is kept on the host.
    """
    moved = Moved(0, 0)
    if stage < 2:
        moved += _all_reduce(sum(sum(group) for group in groups) * ITEM_BYTES, ranks)
    if stage in (1, 2):
        for group in groups:
            moved += _gather(padded(sum(group), ranks) // ranks * ITEM_BYTES, ranks)
            moved += _all_reduce(NORM_BYTES if offload else 0, ranks)
    if stage == 3:
        kept = [size for group in groups for size in group if size <= persistent]
        moved += _gather(sum(share(size, ranks) for size in kept) * ITEM_BYTES, ranks)
        for _ in groups:
            moved += _all_reduce(NORM_BYTES if offload else WIDE_NORM_BYTES, ranks)
    return moved
