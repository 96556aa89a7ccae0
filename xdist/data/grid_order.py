"""Which sample of a store of grids a run reads next, and which part of it.

A pure function of (seed, sample cursor), whatever the number of ranks. An epoch draws every sample
once, in a permutation of its own; a crop lies anywhere in its sample, or in a box of it, each place
as likely.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from xdist.data.order import permute
from xdist.errors import DataError


def grid_sample(seed: int, cursor: int, samples: int, *, first: int = 0) -> int:
    """The number of the sample at `cursor`, of `samples`; first: the cursor that epochs are counted
    from (the start of a stage of a curriculum).

    Raises:
        DataError: there are no samples.
    """
    if samples < 1:
        raise DataError("the split has no samples", f"{samples} samples", "prepare some")
    epoch, number = divmod(cursor - first, samples)
    return permute(number, samples, f"{seed}/{first}/grid/{epoch}")


def crop_origin(
    seed: int,
    cursor: int,
    sizes: Sequence[int],
    crop: Sequence[int],
    box: Sequence[int] = (),
) -> tuple[int, ...]:
    """Where the crop of the sample at `cursor` starts along each dim.

    box: start and stop of each dim, one after another, of the part that crops lie in; () is all.

    Raises:
        DataError: the crop is larger than the sample or than the box, or the box is not inside.
    """
    starts = tuple(box[::2]) or (0,) * len(sizes)
    stops = tuple(box[1::2]) or tuple(sizes)
    if (
        not len(sizes) == len(crop) == len(starts) == len(stops)
        or any(stop > size for stop, size in zip(stops, sizes, strict=True))
        or any(b - a < c for a, b, c in zip(starts, stops, crop, strict=True))
    ):
        raise DataError(
            f"a crop of {tuple(crop)} positions does not fit a sample",
            f"the sample at cursor {cursor} has {tuple(sizes)}"
            + (f", crops lie in {list(box)}" if box else ""),
            "make the crop smaller or data.crop_box wider, or leave the crop out for whole "
            "samples of model.sizes",
        )
    found = []
    for dim, (start, stop, part) in enumerate(zip(starts, stops, crop, strict=True)):
        text = f"{seed}/crop/{cursor}/{dim}"
        word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        found.append(start + word % (stop - start - part + 1))
    return tuple(found)
