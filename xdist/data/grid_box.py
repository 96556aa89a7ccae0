"""Which box of a sample a rank reads: its slab."""

from __future__ import annotations

from collections.abc import Sequence

from xdist.data.grid_arrays import Box
from xdist.errors import DataError
from xdist.grid_shard import GridShard


def part_box(
    gshard: GridShard,
    origin: Sequence[int] | None = None,
    whole: Sequence[int] | None = None,
) -> Box:
    """The box of this rank's part of `gshard`'s grid, in positions of the sample.

    Args:
        gshard: of the crop, or of the whole sample.
        origin: where the crop lies in the sample; None is at 0.
        whole: the sample's sizes; None are the grid's.

    Raises:
        DataError: a crop that does not lie in the sample.
    """
    sizes = tuple(whole) if whole is not None else gshard.sizes
    at = tuple(origin) if origin is not None else (0,) * len(gshard.sizes)
    fits = len(sizes) == len(at) == len(gshard.sizes) and all(
        0 <= start <= start + crop <= size
        for start, crop, size in zip(at, gshard.sizes, sizes, strict=True)
    )
    if not fits:
        raise DataError(
            "a crop does not lie in its sample",
            f"{gshard.sizes} positions from {at} on, of {sizes}",
            "take a smaller crop",
        )
    box = [(start, start + crop) for start, crop in zip(at, gshard.sizes, strict=True)]
    base = at[gshard.dim]
    box[gshard.dim] = (base + gshard.start, base + gshard.stop)
    return box


def require_share(gshard: GridShard, least: int) -> None:
    """Raise where a rank would hold fewer than `least` positions along the sharded dim.

    Raises:
        DataError: naming the shares, and the dim that has the most positions.
    """
    if min(gshard.shares) >= least:
        return
    longest = max(range(len(gshard.sizes)), key=gshard.sizes.__getitem__)
    fits = gshard.sizes[gshard.dim] // max(least, 1)
    raise DataError(
        f"dim {gshard.dim} is too short for {gshard.size} ranks",
        f"its {gshard.sizes[gshard.dim]} positions give shares of {gshard.shares}, each rank needs "
        f"{least}",
        f"shard dim {longest} ({gshard.sizes[longest]} positions), or use at most {max(fits, 1)} "
        "ranks",
    )
