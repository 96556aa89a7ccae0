"""Models of HuggingFace Transformers under a shard equal the unmodified models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from statistics import median

import pytest
import torch

from tests.multirank.transformers_cases import (
    FAMILIES,
    MORE,
    PACKED,
    TOKENS,
    VARIANTS,
    Case,
    bad_call,
    errors,
    leaks,
    on_rank,
    reference,
    sent_bytes,
)
from xdist.testing import RankPool, layouts

pytest.importorskip("transformers")

LAYOUTS = ("contiguous", "zigzag", "drawn")
STRATEGIES = ("auto", "ulysses", "ring", "gather")


def family_cases(parts: int, families: Iterable[str] = FAMILIES) -> list[Case]:
    """Every family dense and packed; layouts and strategies take turns."""
    return [
        Case(family, LAYOUTS[(i + packed) % 3], PACKED if packed else None, STRATEGIES[turn % 4])
        for i, family in enumerate(families)
        for packed in (0, 1)
        for turn in [i + 2 * packed + parts]
    ]


def check(pool: RankPool, cases: list[Case], degrees: tuple[int, int]) -> None:
    answers = pool.run(on_rank, cases, degrees)
    for number, case in enumerate(cases):
        want = reference(case)
        for name, error in errors(case, [answer[number] for answer in answers], want).items():
            assert error <= 1e-10, (name, error, case)


def test_two_ranks_equal_the_unmodified_models(pool2: RankPool) -> None:
    check(pool2, family_cases(2), (2, 1))


def test_three_ranks_equal_the_unmodified_models(pool3: RankPool) -> None:
    check(pool3, family_cases(3), (3, 1))


@pytest.mark.slow
def test_four_ranks_equal_the_unmodified_models(pool4: RankPool) -> None:
    cases = family_cases(4)
    check(pool4, cases, (4, 1))
    check(pool4, [replace(case, strategy="2d") for case in cases[:4]], (2, 2))


@pytest.mark.slow
def test_more_families_equal_the_unmodified_models(pool2: RankPool, pool3: RankPool) -> None:
    """Experts, latent keys, chunks, fused projections."""
    check(pool2, family_cases(2, MORE), (2, 1))
    check(pool3, family_cases(3, MORE), (3, 1))


def test_embeddings_shares_and_long_rotary(pool2: RankPool) -> None:
    """inputs_embeds; uneven shares; rotary frequencies that follow the length."""
    cases = [
        Case("gemma2", "drawn", PACKED, "ring", embeds=True),
        Case("mistral", "uneven", PACKED),
        *(Case(name, layout) for name in VARIANTS for layout in ("zigzag", "contiguous")),
    ]
    check(pool2, cases, (2, 1))


def test_recompute_keeps_the_shard_of_its_forward(pool2: RankPool) -> None:
    """The next batch's shard is set before backward: the same bits as without recompute."""
    plain = [
        Case("llama", "zigzag", PACKED, dtype=torch.float32),
        Case("gemma2", "drawn", PACKED, "ring", dtype=torch.float32),
    ]
    again = [replace(case, recompute=True) for case in plain]
    for answer in pool2.run(on_rank, plain + again, (2, 1)):
        for once, twice in zip(answer[:2], answer[2:], strict=True):
            assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.slow
def test_float32_as_exact_as_the_unmodified_model(pool2: RankPool) -> None:
    """The worst tensor of each model, median over 5 seeds."""
    cases = [
        Case(family, "zigzag", PACKED, dtype=torch.float32, seed=seed)
        for family in FAMILIES
        for seed in range(5)
    ]
    answers = pool2.run(on_rank, cases, (2, 1))
    ours, theirs = defaultdict(list), defaultdict(list)
    for number, case in enumerate(cases):
        exact = reference(replace(case, dtype=torch.float64))
        one = errors(replace(case, layout="contiguous"), [reference(case)], exact)
        two = errors(case, [answer[number] for answer in answers], exact)
        theirs[case.family].append(max(one.values()))
        ours[case.family].append(max(two.values()))
    for family, found in ours.items():
        assert median(found) <= max(2e-6, 1.5 * median(theirs[family])), (found, theirs[family])


def test_dropout_does_not_depend_on_the_ranks(pool2: RankPool, pool3: RankPool) -> None:
    cases = [
        Case("llama", "zigzag", PACKED, dropout=0.3),
        Case("qwen2", "drawn", None, "ring", 0.3),
    ]
    two, three = pool2.run(on_rank, cases, (2, 1)), pool3.run(on_rank, cases, (3, 1))
    one = on_rank([replace(case, layout="contiguous") for case in cases], (1, 1))
    for number, case in enumerate(cases):
        assert float((one[number]["logits"] - reference(case)["logits"]).abs().max()) > 1e-3
        for answers in (two, three):
            found = errors(case, [answer[number] for answer in answers], one[number])
            assert max(found.values()) <= 1e-10, (found, case)


def test_no_token_sees_another_document(pool2: RankPool) -> None:
    documents = (0, 5, 14, TOKENS)
    ranks = pool2.run(leaks, list(FAMILIES), documents)
    layout = layouts(TOKENS, 2)["zigzag"]
    for number, family in enumerate(FAMILIES):
        changed = torch.zeros(TOKENS, dtype=torch.bool)
        for rank, answer in enumerate(ranks):
            changed[torch.from_numpy(layout.positions(rank))] = answer[number]
        # The token before a cut is changed: its own document's earlier tokens do not see it.
        assert changed.nonzero().flatten().tolist() == [documents[2] - 1], family


@pytest.mark.parametrize("strategy", ["ulysses", "ring"])
def test_nothing_is_sent_but_what_attention_sends(pool2: RankPool, strategy: str) -> None:
    for whole, alone in pool2.run(sent_bytes, Case("llama", "zigzag", PACKED, strategy)):
        assert whole == alone > 0


def test_a_rank_without_tokens_is_refused_on_all(pool2: RankPool) -> None:
    said = pool2.run(bad_call, "empty", (2, 1))
    assert said[0] == said[1]
    assert "needs a token on every rank\nthe ranks hold [23, 0] of 23" in said[0]


@pytest.mark.parametrize("name", ["position_ids", "attention_mask"])
def test_what_one_rank_gets_wrong_is_refused_on_all(pool2: RankPool, name: str) -> None:
    said = pool2.run(bad_call, name, (2, 1))
    assert said[0] == said[1]
    assert "sequence ranks [1]" in said[0]
