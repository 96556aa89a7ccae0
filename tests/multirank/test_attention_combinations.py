"""Every combination of what a mask is made of, with and without documents, on every layout under
every strategy: none is left to what hypothesis happens to draw (test_attention_properties.py)."""

from __future__ import annotations

from itertools import product

import pytest

from tests.multirank.attention_cases import Case, segments
from tests.multirank.attention_draws import finite
from tests.multirank.test_attention_properties import Pools
from xdist.mask import Mask, Window
from xdist.testing import RankPool, layouts

N = 23
DOCUMENTS = (0, 4, 4, 13, N)
WINDOWS: tuple[Window | list[Window], ...] = (
    None, 3, (2, None), (None, 1), [None, 2, (1, 3), 0]
)  # fmt: skip
MASKS = [
    Mask(causal, window, prefix, chunk)
    for causal, window, prefix, chunk in product((True, False), WINDOWS, (0, 5), (None, 7))
]
LAYOUTS = ("contiguous", "zigzag", "drawn")
DEGREES = (2, 3, 4)


def strategies(mask: Mask) -> list[str]:
    able = ["ulysses", "ring", "gather", "2d"]
    return [*able, "halo"] if finite(mask) else able


def cases() -> list[Case]:
    """The product; each mask meets every degree under every strategy (2d: 4 ranks, the least that
    has two axes). Head counts, head dims, soft-cap, sinks and memory order take turns."""
    found = []
    for number, (mask, documents) in enumerate(product(MASKS, (None, DOCUMENTS))):
        for place, strategy in enumerate(strategies(mask)):
            for turn, name in enumerate(LAYOUTS):
                parts = 4 if strategy == "2d" else DEGREES[(number + place + turn) % 3]
                i = 7 * number + 3 * place + turn
                layout = layouts(N, parts, seed=number)[name]
                found.append(
                    Case(
                        strategy, segments(layout), mask, N, 4, (1, 2, 4)[i % 3], documents,
                        softcap=2.0 if i % 5 == 0 else None, sinks=i % 4 == 0, batch=1 + i % 2,
                        value_dim=(4, 3)[i % 2], ulysses=2 if strategy == "2d" else 1,
                        strided=i % 3 == 1, few=i % 4 < 2,
                    )
                )  # fmt: skip
    return found


def check(some: list[Case], pools: Pools) -> None:
    faults = pools.faults(some)
    wrong = [(case, fault) for case, fault in zip(some, faults, strict=True) if fault]
    assert not wrong, f"{len(wrong)} of {len(some)}, the first: {wrong[0]}"


def test_the_product_is_whole() -> None:
    """Nothing that `cases` says of itself is left out: counted, not run."""
    every = cases()
    met = {(c.mask, c.documents, c.strategy, c.layout) for c in every}
    assert len(met) == len(every) == 2 * 3 * sum(len(strategies(mask)) for mask in MASKS)
    for mask in MASKS:
        for strategy in strategies(mask):
            own = [c for c in every if (c.mask, c.strategy) == (mask, strategy)]
            degrees = {len(c.layout) for c in own}
            assert degrees == ({4} if strategy == "2d" else set(DEGREES))


def test_some_combinations_equal_the_dense_reference(
    pool2: RankPool, pool3: RankPool, pool4: RankPool
) -> None:
    check(cases()[::13], Pools(pool2, pool3, pool4))


@pytest.mark.slow
def test_every_combination_equals_the_dense_reference(
    pool2: RankPool, pool3: RankPool, pool4: RankPool
) -> None:
    check(cases(), Pools(pool2, pool3, pool4))
