"""Law 1 for xdist.attention on drawn calls: any mask, layout, documents, heads, degree, strategy.

Hypothesis draws in this process; the ranks of a pool run many draws in one call, against the dense
float64 reference, output and the gradient of every input. Draws follow from a fixed seed;
`XDIST_DRAW_SEED=7 XDIST_DRAWS=5000` takes others. A draw that fails is made smaller and printed as
a `Case`: mend the fault, then put the case into `ONCE_WRONG`. Each draw is a short run of
hypothesis with a seed of its own: one long run would try neighbours of what it has tried before,
and leave much of so wide a space out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

import xdist
from tests.multirank.attention_cases import Case, joined, mesh_of, reference, results
from tests.multirank.attention_draws import STRATEGIES, cases, finite
from xdist.errors import StrategyError
from xdist.mask import Mask, Spans
from xdist.testing import RankPool
from xdist_kernels.attention import band, blockwise, flash, pieces

SEED = int(os.environ.get("XDIST_DRAW_SEED", "0"))
BATCH = 50
# Beyond this many runs of single cases a failing draw is printed as small as it got.
SHRINK_RUNS = 400
# The least error that counts in a narrow dtype, where one rank's own may be zero by luck.
FLOOR = {torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# What a rank gives: tensors, or what it refused with and how many bytes it had sent by then.
Answer = dict[str, Tensor] | tuple[str, int]

HALVES = (((0, 5),), ((5, 9),))
APART = [(1, 1), (3, 3)]
PAIRS_OF_WINDOWS = Mask(causal=False, window=[*APART, (0, 2), (0, 2)])
ONCE_WRONG = [
    # Sizes that passed 64 bits when a position was added: queries saw nothing.
    Case("ring", HALVES, Mask(causal=False, window=2**63 - 1), 9),
    Case("ulysses", HALVES, Mask(chunk=2**63 - 1), 9, documents=(0, 4, 9)),
    Case("gather", HALVES, Mask(prefix=10**30), 9, documents=(0, 4, 9)),
    Case("gather", HALVES, Mask(False, chunk=10**30), 9, keys=HALVES, m=9),
    # A scale that is not positive, where torch's kernel hides keys before it scales.
    Case("ulysses", HALVES, Mask(), 9, scale=-0.6, value_dim=4, few=True),
    Case("ring", HALVES, Mask(), 9, scale=0.0, value_dim=4, few=True),
    # Windows per head: what heads 2 and 3 see was once found by their window, (0, 2), which were
    # also the numbers of the first two heads.
    Case("ulysses", (((0, 9),),), PAIRS_OF_WINDOWS, 9, groups=4, head_chunks=2),
    Case("ulysses", HALVES, replace(PAIRS_OF_WINDOWS, window=[*APART, *[(0, 2)] * 4]), 9, 6, 3),
    # An empty batch: backward could not tell the shape of its gradients.
    Case("ulysses", HALVES, Mask(), 9, batch=0),
    Case("ring", HALVES, Mask(), 9, batch=0, softcap=2.0),
    Case("halo", HALVES, Mask(window=3), 9, batch=0, dropout=xdist.Dropout(0.5, seed=1)),
]


def refused_or_results(case: Case) -> Answer | None:
    """On one rank: out and every gradient, or the refusal; None where the rank has no part."""
    if mesh_of(len(case.layout), case.ulysses) is None:
        return None
    try:
        with xdist.comm.ledger() as moved, blocks_of_few_tokens(case.few):
            return results(case)
    except StrategyError as error:
        return str(error), moved.sent_bytes
    except Exception as error:
        error.add_note(repr(case))
        raise


@contextmanager
def blocks_of_few_tokens(on: bool) -> Iterator[None]:
    """Inside, kernels cut even tiny calls into several blocks, and into pieces of every form."""
    sizes = [(blockwise, "_KEY_TOKENS", 4), (pieces, "MIN_KEYS", 1)]
    sizes += [(module, "MIN_ROWS", 2) for module in (pieces, band)]
    sizes += [(flash, "_CHUNK_ELEMENTS", 0)]  # ulysses then works head by head
    with ExitStack() as held:
        for module, name, size in sizes if on else []:
            held.enter_context(mock.patch.object(module, name, size))
        yield


def run_draws(drawn: list[Case]) -> list[Answer | None]:
    return [refused_or_results(case) for case in drawn]


def must_refuse(case: Case) -> bool:
    """A forced halo serves masks of finite reach over keys that lie as the queries do."""
    return case.strategy == "halo" and (case.keys is not None or not finite(case.mask))


def fault(case: Case, answers: list[Answer]) -> str:
    """What is wrong with the ranks' answers; empty if nothing is."""
    refusals = [a for a in answers if isinstance(a, tuple)]
    if refusals or must_refuse(case):
        alike = len(refusals) == len(answers) and len(set(refusals)) == 1
        if must_refuse(case) and alike and refusals[0][1] == 0:
            return ""
        return f"refused: {refusals}, must refuse: {must_refuse(case)}"
    ours = errors(case, [a for a in answers if isinstance(a, dict)])
    limits = dict.fromkeys(ours, 1e-10)
    if case.dtype != torch.float64:
        alone = replace(case.on_one_rank(), strategy="gather", head_chunks=1)
        one = errors(alone, [results(alone)])
        limits = {name: max(FLOOR[case.dtype], 4 * one[name]) for name in ours}
    found = [f"{n}: {ours[n]:.3g} > {limits[n]:.3g}" for n in ours if not ours[n] <= limits[n]]
    return ", ".join(found)


def errors(case: Case, ranks: list[dict[str, Tensor]]) -> dict[str, float]:
    """max|a - b| of each tensor over the size of what is added up in it."""
    want = reference(
        replace(case.on_one_rank(), strategy="", strided=False, head_chunks=1, few=False)
    )
    found = {}
    for name, a in joined(case, ranks).items():
        b = want[name]
        assert a.shape == b.shape, (name, a.shape, b.shape)
        if not a.numel():
            found[name] = 0.0
            continue
        size = b.abs().max()
        if name == "dsinks":
            size = want["scale_dsinks"].max()
        elif name in ("dk", "dv") and case.keys == "replicated":
            # Each rank's part is rounded by itself.
            size = torch.stack([rank[name].double().abs() for rank in ranks]).sum(0).max()
        # Inputs are of order 1: where terms cancel to nothing, what is left is their rounding.
        gap = float((a - b).abs().max() / size.clamp(min=1e-3))
        found[name] = gap if a.isfinite().all() else float("inf")
    return found


class Pools:
    """Runs cases on as many ranks as each asks for."""

    def __init__(self, *pools: RankPool) -> None:
        self.pools = sorted(pools, key=lambda pool: pool.world_size)

    def faults(self, drawn: list[Case]) -> list[str]:
        """What is wrong with each case."""
        found = dict.fromkeys(range(len(drawn)), "")
        of_pool: dict[RankPool | None, list[int]] = {}
        for number, case in enumerate(drawn):
            of_pool.setdefault(self._pool(len(case.layout)), []).append(number)
        batches = [
            (pool, numbers[start : start + BATCH])
            for pool, numbers in of_pool.items()
            for start in range(0, len(numbers), BATCH)
        ]

        def judge(batch: list[int], answers: list[list[Answer | None]]) -> None:
            for place, number in enumerate(batch):
                given = [a[place] for a in answers if a[place] is not None]
                found[number] = fault(drawn[number], given)

        def cases_of(batch: list[int]) -> list[Case]:
            return [drawn[number] for number in batch]

        # While answers are judged here, the ranks go on with the next batch.
        with ThreadPoolExecutor(1) as ahead:
            running = [
                (batch, ahead.submit(pool.run, run_draws, cases_of(batch)))
                for pool, batch in batches
                if pool
            ]
            for pool, batch in batches:
                if pool is None:
                    judge(batch, [run_draws(cases_of(batch))])
            for batch, run in running:
                judge(batch, run.result())
        return list(found.values())

    def _pool(self, parts: int) -> RankPool | None:
        """The least pool that has the ranks; None is this process."""
        if parts == 1:
            return None
        return next(pool for pool in self.pools if pool.world_size >= parts)


def draw(number: int, degrees: tuple[int, ...], use: Callable[[Case], None], phases: Any) -> None:
    """Calls `use` with the simplest case, then draw `number`; shrinking calls it with more."""
    parts, turn = degrees[number % len(degrees)], number // len(degrees)

    @hypothesis.seed(SEED * 1_000_000 + number)
    @settings(
        max_examples=2, phases=phases, database=None, deadline=None, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases(parts, STRATEGIES[turn % len(STRATEGIES)]))
    def met(case: Case) -> None:
        use(case)

    met()


def draws(count: int, degrees: tuple[int, ...]) -> list[Case]:
    """`count` draws, degrees and strategies in turn."""
    found = []
    for number in range(count):
        both: list[Case] = []
        draw(number, degrees, both.append, [Phase.generate])
        found.append(both[-1])
    return found


def smaller(number: int, degrees: tuple[int, ...], wrong: Case, pools: Pools) -> Case:
    """Draw `number`, which is `wrong`, as small as hypothesis makes it while it stays wrong."""
    best, runs = wrong, 0

    def use(case: Case) -> None:
        nonlocal best, runs
        runs += 1
        if runs <= SHRINK_RUNS and pools.faults([case])[0]:
            best = case
            raise AssertionError

    # Beyond the limit nothing fails any more, which hypothesis calls flaky.
    with suppress(AssertionError, hypothesis.errors.HypothesisException):
        draw(number, degrees, use, [Phase.generate, Phase.shrink])
    return best


def check_draws(count: int, degrees: tuple[int, ...], pools: Pools) -> None:
    drawn = draws(count, degrees)
    faults = pools.faults(drawn)
    wrong = [number for number in range(count) if faults[number]]
    if not wrong:
        return
    first = wrong[0]
    small = smaller(first, degrees, drawn[first], pools)
    pytest.fail(
        f"draws {wrong} of {count} of seed {SEED} are wrong. The first, made small:\n"
        f"{small!r}\n  {pools.faults([small])[0]}\nas drawn:\n{drawn[first]!r}\n  {faults[first]}"
    )


def test_drawn_calls_equal_the_dense_reference(
    pool2: RankPool, pool3: RankPool, pool4: RankPool
) -> None:
    check_draws(40, (1, 2, 3, 4), Pools(pool2, pool3, pool4))


@pytest.mark.slow
def test_500_drawn_calls_on_up_to_8_ranks_equal_the_dense_reference(
    pool2: RankPool, pool3: RankPool, pool4: RankPool, pool8: RankPool
) -> None:
    count = int(os.environ.get("XDIST_DRAWS", "500"))
    check_draws(count, tuple(range(1, 9)), Pools(pool2, pool3, pool4, pool8))


@pytest.mark.slow
def test_a_fault_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks that are a token too long, draws fail, and few tokens are left of the first."""
    spans = Mask.spans

    def too_long(mask: Mask, *arguments: Any) -> Spans:
        chunk = None if mask.chunk is None else mask.chunk + 1
        return spans(replace(mask, chunk=chunk), *arguments)

    monkeypatch.setattr(Mask, "spans", too_long)
    with pytest.raises(pytest.fail.Exception, match=r"small:\nCase\(.* n=\d, ") as failed:
        check_draws(40, (1,), Pools())
    assert "as drawn" in str(failed.value)


def test_draws_that_were_once_wrong(pool2: RankPool, pool3: RankPool, pool4: RankPool) -> None:
    found = Pools(pool2, pool3, pool4).faults(ONCE_WRONG)
    assert not any(found), found
