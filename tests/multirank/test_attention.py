"""Law 1 for xdist.attention: every mask, layout, head count and strategy equals one device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import count, product
from statistics import median

import pytest
import torch

import xdist
from tests.multirank.attention_cases import Case, errors, results, run_cases, segments
from xdist.mask import Mask
from xdist.testing import RankPool, layouts

MASKS = {
    "causal": Mask(),
    "bidirectional": Mask(causal=False),
    "window": Mask(window=5),
    "two_sided": Mask(causal=False, window=(2, 4)),
    "prefix": Mask(prefix=3, window=4),
    "chunk": Mask(chunk=7),
    "per_head": Mask(window=[3, None, (0, 0), 30]),
    "wide": Mask(causal=False, window=(18, 40)),  # wider than a share, and than the sequence
}
FINITE = ("window", "two_sided", "chunk", "wide")
HEADS = ((4, 2), (4, 1), (4, 4))
# Fewer heads than ranks, heads that do not divide, a key head shared by ranks or not.
ODD_HEADS = ((1, 1), (3, 1), (3, 3), (5, 5), (6, 2), (9, 3), (2, 1))
PACKED = {23: (0, 0, 2, 9, 9, 17, 23), 24: (0, 1, 12, 24, 24), 7: (0, 3, 7)}


def strategies(mask_name: str) -> list[str]:
    return ["ulysses", "ring", "gather", *(["halo"] if mask_name in FINITE else [])]


def grid(parts: int, lengths: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Case]:
    """Every mask x layout x strategy; documents, heads, soft-cap and sinks take turns."""
    turn = count(parts)
    cases = []
    for n, (name, mask) in product(lengths, MASKS.items()):
        for layout in layouts(n, parts, seed=n).values():
            i = next(turn)
            heads, groups = HEADS[i % 3] if name == "per_head" else (HEADS + ODD_HEADS)[i % 10]
            base = Case(
                "auto",
                segments(layout),
                mask,
                n,
                heads,
                groups,
                documents=PACKED[n] if i % 2 else None,
                dtype=dtype,
                softcap=2.0 if i % 3 == 0 else None,
                sinks=i % 4 < 2,
            )
            cases += [replace(base, strategy=strategy) for strategy in strategies(name)]
    return cases


def cross_grid(parts: int) -> list[Case]:
    """Cross-attention: keys of another length, in a layout of their own or on every rank."""
    cases = []
    for strategy, name in product(("ulysses", "ring", "gather"), ("drawn", "empty", "zigzag")):
        base = Case(
            strategy,
            segments(layouts(11, parts, seed=1)[name]),
            Mask(causal=False),
            11,
            3,
            1,
            sinks=name == "drawn",
            m=17,
        )
        keys = segments(layouts(17, parts, seed=2)["drawn"])
        cases.append(replace(base, keys="replicated"))
        cases.append(replace(base, keys=keys))
        cases.append(
            replace(base, keys=keys, documents=(0, 4, 4, 11), key_documents=(0, 9, 12, 17))
        )
        chunked = Mask(causal=False, chunk=3)
        cases.append(replace(base, keys=keys, mask=chunked, heads=4, groups=2))
    return cases


def check(cases: list[Case], pool: RankPool | None, limit: float = 1e-10) -> None:
    """Runs the cases and holds every tensor of each to `limit`."""
    answers = pool.run(run_cases, cases) if pool else [run_cases(cases)]
    for number, case in enumerate(cases):
        ranks = [answer[number][0] for answer in answers]
        for name, error in errors(case, ranks).items():
            assert error <= limit, (name, error, case)


def test_one_rank_equals_the_dense_reference() -> None:
    check([*grid(1, (23,)), *cross_grid(1)], None)


def test_two_ranks_equal_one_device(pool2: RankPool) -> None:
    check([*grid(2, (23, 24)), *cross_grid(2)], pool2)


def test_three_ranks_equal_one_device(pool3: RankPool) -> None:
    check([*grid(3, (23,)), *cross_grid(3)], pool3)


def test_four_ranks_equal_one_device(pool4: RankPool) -> None:
    check([*grid(4, (23, 7)), *cross_grid(4)], pool4)


def test_float32_is_as_exact_as_one_rank(pool3: RankPool) -> None:
    check_medians(pool3, 3, torch.float32, ("drawn",))


def test_bfloat16_is_as_exact_as_one_rank(pool3: RankPool) -> None:
    check_medians(pool3, 3, torch.bfloat16, ("drawn",))


@cache
def errors_of_one_rank(case: Case, seed: int) -> dict[str, float]:
    """The same for every layout."""
    return errors(case, [results(case, seed)], seed)


def check_medians(
    pool: RankPool, parts: int, dtype: torch.dtype, names: tuple[str, ...], n: int = 23
) -> None:
    """Every mask and strategy on layouts of these names."""
    cases = []
    for mask_name, name in product(MASKS, names):
        layout = segments(layouts(n, parts, seed=3)[name])
        for i, strategy in enumerate(strategies(mask_name)):
            packed = PACKED[n] if i % 2 else None
            case = Case(strategy, layout, MASKS[mask_name], n, documents=packed, dtype=dtype)
            cases.append(replace(case, sinks=dtype == torch.float32 and i % 2 == 0))
    rounds_as_one_rank(pool, cases)


def rounds_as_one_rank(pool: RankPool, cases: list[Case]) -> None:
    """Medians over 5 seeds: at most max(2e-6, 1.5 x the error of one rank), per tensor."""
    seeds = tuple(range(5))
    answers = pool.run(run_cases, cases, seeds)
    for number, case in enumerate(cases):
        many = [errors(case, [a[number][s] for a in answers], s) for s in seeds]
        one = [errors_of_one_rank(case.on_one_rank(), s) for s in seeds]
        for name in many[0]:
            limit = max(2e-6, 1.5 * median(e[name] for e in one))
            assert median(e[name] for e in many) <= limit, (name, case)


def test_auto_and_no_shard_are_the_same_call(pool2: RankPool) -> None:
    layout = segments(xdist.Layout.zigzag(24, 2))
    check([Case("auto", layout, mask, 24, 4, 2) for mask in MASKS.values()], pool2)
    q, k, v = (torch.randn(2, 9, 4, 3) for _ in range(3))
    alone = xdist.attention(q, k, v, mask=Mask())
    mesh = xdist.init_mesh()
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(9, 1))
    assert torch.equal(alone, xdist.attention(q, k, v, shard, mask=Mask(), strategy="ring"))


def same_bits(case: Case) -> bool:
    first, second = results(case), results(case)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_call_gives_the_same_bits(pool3: RankPool) -> None:
    layout = segments(layouts(23, 3, seed=5)["drawn"])
    for strategy in strategies("window"):
        case = Case(strategy, layout, Mask(window=5), 23, dtype=torch.float32)
        assert all(pool3.run(same_bits, case))


def runs_empty(case: Case) -> tuple[bool, list[int]]:
    """Whether outputs of an empty share stay attached to the graph."""
    found = results(case)
    return found["out"].numel() == 0, [g.numel() for g in found.values()]


def test_a_rank_with_no_tokens_takes_part(pool2: RankPool) -> None:
    for strategy in ("ulysses", "ring", "gather"):
        case = Case(strategy, (((0, 9),), ()), Mask(), 9)
        assert [empty for empty, _ in pool2.run(runs_empty, case)] == [False, True]


def test_float16_is_as_exact_as_one_rank(pool2: RankPool) -> None:
    layout = segments(layouts(23, 2, seed=3)["drawn"])
    rounds_as_one_rank(
        pool2,
        [
            Case(strategy, layout, MASKS[name], 23, documents=PACKED[23], dtype=torch.float16)
            for name in ("causal", "two_sided")
            for strategy in strategies(name)
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_that_of_one_rank_on_every_layout(
    pool2: RankPool, pool4: RankPool, dtype: torch.dtype
) -> None:
    names = tuple(layouts(24, 4))
    for parts, pool in ((2, pool2), (4, pool4)):
        check_medians(pool, parts, dtype, names, n=24)
