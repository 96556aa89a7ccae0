"""Which sample of a store of grids a run reads next, and which part of it.

A pure function of (seed, sample cursor), whatever the number of ranks. An epoch draws every sample
once, in a permutation of its own; a crop lies anywhere in its sample, each place as likely.
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
    seed: int, cursor: int, sizes: Sequence[int], crop: Sequence[int]
) -> tuple[int, ...]:
    """Where the crop of the sample at `cursor` starts along each dim.

    Raises:
        DataError: the crop is larger than the sample.
    """
    if len(sizes) != len(crop) or any(c > s for c, s in zip(crop, sizes, strict=True)):
        raise DataError(
            f"a crop of {tuple(crop)} positions does not fit a sample",
            f"the sample at cursor {cursor} has {tuple(sizes)}",
            "make the crop smaller, or leave it out for whole samples of model.sizes",
        )
    found = []
    for dim, (whole, part) in enumerate(zip(sizes, crop, strict=True)):
        text = f"{seed}/crop/{cursor}/{dim}"
        word = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        found.append(word % (whole - part + 1))
    return tuple(found)
