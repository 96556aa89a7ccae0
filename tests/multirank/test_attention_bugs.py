"""Ways in which sequence-parallel attention has gone wrong elsewhere: docs/attention_bugs.md.

Each test is one case of that page, by its number; the page names the tests of the other cases.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import xdist
from tests.multirank.attention_cases import (
    Case,
    call,
    draw,
    errors,
    joined,
    mesh_of,
    reference,
    results,
    run_cases,
    segments,
    shards,
    visible,
)
from tests.multirank.attention_dense import dense
from tests.multirank.attention_draws import finite
from xdist.comm.reduce import start_reduce
from xdist.layout import Layout
from xdist.mask import Mask
from xdist.testing import RankPool, relative_error

EVERY = ("ulysses", "ring", "gather", "2d")
DOCUMENTS = (0, 3, 3, 10, 11, 24)
LIMIT = 1e-10
ROOT = Path(__file__).resolve().parents[2]


def zigzag(n: int = 24, parts: int = 4) -> Any:
    return segments(Layout.zigzag(n, parts))


def contiguous(n: int = 24, parts: int = 4) -> Any:
    return segments(Layout.contiguous(n, parts))


def of_each_strategy(case: Case) -> list[Case]:
    able = [*EVERY, "halo"] if finite(case.mask) and case.keys is None else EVERY
    return [replace(case, strategy=strategy) for strategy in able]


def exact(cases: Sequence[Case], pool: RankPool) -> list[list[dict[str, Tensor]]]:
    """Holds each case to the dense reference; the ranks' results of each."""
    cases = list(cases)
    answers = pool.run(run_cases, cases)
    found = [[answer[number][0] for answer in answers] for number in range(len(cases))]
    for case, ranks in zip(cases, found, strict=True):
        for name, error in errors(case, ranks).items():
            assert error <= LIMIT, (name, error, case)
    return found


def test_the_page_of_cases_names_tests_that_exist() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)$", (ROOT / "docs/attention_bugs.md").read_text(), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 18))
    for number, row in rows:
        named = re.findall(r"`([a-z_/]*(?:\.py)?)::(\w+)`", row)
        assert named, number
        for file, test in named:
            text = (ROOT / "tests" / (file or "multirank/test_attention_bugs.py")).read_text()
            assert f"def {test}(" in text, (number, file, test)


def test_case_01_packed_documents_do_not_see_each_other(pool4: RankPool) -> None:
    """Cut anywhere, empty, of one token; fewer key heads than ranks."""
    for layout in (contiguous(), zigzag()):
        case = Case("", layout, Mask(), 24, 4, 1, documents=DOCUMENTS, ulysses=2)
        found = exact(of_each_strategy(case), pool4)
        whole = reference(replace(case.on_one_rank(), documents=None))["out"]
        for ranks in found:
            assert relative_error(joined(case, ranks)["out"], whole) > 0.1


def test_case_02_a_window_is_not_dropped(pool4: RankPool) -> None:
    case = Case("", zigzag(), Mask(window=4), 24, ulysses=2)
    causal = reference(replace(case.on_one_rank(), mask=Mask()))["out"]
    for ranks in exact(of_each_strategy(case), pool4):
        assert relative_error(joined(case, ranks)["out"], causal) > 0.1


def test_case_03_lengths_that_do_not_divide_by_the_ranks(pool3: RankPool, pool4: RankPool) -> None:
    for parts, pool in ((3, pool3), (4, pool4)):
        cases = [
            Case("", layout(n, parts), Mask(), n, 3, 1, ulysses=2 if parts == 4 else 1)
            for n, layout in product((1, 2, 5, 7, 23), (contiguous, zigzag))
        ]
        exact([c for case in cases for c in of_each_strategy(case)], pool)


def two_models() -> list[tuple[float, float]]:
    """Errors of two models of different heads that take turns in one process, on this rank."""
    mesh = mesh_of(4, 2)
    assert mesh is not None
    shard = xdist.SequenceShard(mesh, Layout.zigzag(24, 4))
    found = []
    for strategy in EVERY:
        cases = [Case(strategy, zigzag(), Mask(), 24, h, g, ulysses=2) for h, g in ((6, 2), (5, 5))]
        for case in (*cases, *reversed(cases)):
            want, own = reference(case.on_one_rank()), results(case)
            at = shard.positions
            found.append(
                (relative_error(own["out"], want["out"][:, at]),
                 relative_error(own["dk"], want["dk"][:, at]))
            )  # fmt: skip
    return found


def test_case_05_head_counts_come_from_the_tensors(pool4: RankPool) -> None:
    """Two models of different heads in one process, on one mesh, in turn."""
    for found in pool4.run(two_models):
        assert max(max(pair) for pair in found) <= LIMIT


def test_case_06_rows_that_see_nothing_of_a_block(pool4: RankPool) -> None:
    """Most blocks of a ring hide whole rows, and some rows see nothing at all: never a NaN."""
    alone = Case("", zigzag(), Mask(window=0), 24, documents=DOCUMENTS, ulysses=2)
    backwards = tuple(reversed(contiguous()))
    masks = [Case("", backwards, mask, 24, ulysses=2) for mask in (Mask(), Mask(chunk=5))]
    exact([c for case in (alone, *masks) for c in of_each_strategy(case)], pool4)
    # Document 1 of the keys is empty: queries 3 to 9 see nothing.
    case = Case("", contiguous(), Mask(causal=False), 24, documents=(0, 3, 10, 24), m=9,
                keys=contiguous(9), key_documents=(0, 4, 4, 9), ulysses=2)  # fmt: skip
    for with_sinks in (False, True):
        cases = of_each_strategy(replace(case, sinks=with_sinks))
        for ranks in exact(cases, pool4):
            whole = joined(case, ranks)
            assert not visible(case)[:, 3:10].any()
            assert not whole["out"][:, 3:10].any()
            assert not whole["dq"][:, 3:10].any()


def test_case_07_a_ring_of_packed_documents_sends_what_is_seen(pool4: RankPool) -> None:
    case = Case("ring", contiguous(), Mask(), 24, documents=(0, 6, 12, 18, 24))
    exact([case, replace(case, strategy="2d", ulysses=2)], pool4)
    # Documents that end with the shares: nothing crosses. One cut moved by a token: one key does.
    assert pool4.run(received, case) == [0, 0, 0, 0]
    key_bytes = case.batch * case.groups * (case.dim + case.value_dim) * 8
    moved = replace(case, documents=(0, 5, 12, 18, 24))
    assert pool4.run(received, moved) == [0, key_bytes, 0, 0]


def received(case: Case) -> int:
    """Bytes this rank receives in forward."""
    shards(case)
    with xdist.comm.ledger() as moved:
        call(case)
    return int(moved.received_bytes)


def test_case_08_masks_follow_positions_not_places(pool4: RankPool) -> None:
    """Segments of a rank out of order, on ranks out of order."""
    dealt = (((20, 24), (0, 2)), ((9, 13), (4, 9)), ((2, 4), (15, 20)), ((13, 15),))
    masks = (Mask(), Mask(window=5), Mask(prefix=3, window=2), Mask(causal=False, chunk=7))
    cases = [
        Case("", layout, mask, 24, documents=documents, ulysses=2)
        for mask, documents in product(masks, (None, DOCUMENTS))
        for layout in (dealt, zigzag())
    ]
    exact([c for case in cases for c in of_each_strategy(case)], pool4)


def test_case_09_no_strategy_drops_a_mask(pool3: RankPool) -> None:
    """Windows, chunks, prefixes, windows a head, soft-cap and sinks: none is as plain causal."""
    plain = Case("", zigzag(24, 3), Mask(), 24)
    changed = [
        replace(plain, mask=mask)
        for mask in (
            Mask(window=3), Mask(chunk=5), Mask(prefix=9), Mask(causal=False),
            Mask(causal=False, window=(3, 2)), Mask(window=[2, None, 5, (0, 0)]),
        )
    ]  # fmt: skip
    changed += [replace(plain, softcap=0.5), replace(plain, sinks=True)]
    cases = [c for case in changed for c in of_each_strategy(case)]
    causal = reference(plain.on_one_rank())["out"]
    for case, ranks in zip(cases, exact(cases, pool3), strict=True):
        assert relative_error(joined(case, ranks)["out"], causal) > 0.02, case


def packed_loss(parts: int) -> tuple[float, float]:
    """Errors of loss and of the head's gradient on this rank, against documents one by one."""
    made = torch.Generator().manual_seed(4)
    x = torch.randn(1, 24, 8, generator=made, dtype=torch.float64)
    head = torch.randn(13, 8, generator=made, dtype=torch.float64).requires_grad_()
    labels = torch.randint(13, (1, 24), generator=made)
    for last in (2, 9, 10, 23):  # the last token of a document has no next one
        labels[:, last] = -100
    mesh = xdist.init_mesh(ring=parts)
    shard = xdist.SequenceShard(mesh, Layout.zigzag(24, parts), DOCUMENTS)
    own = shard.scatter(x).unflatten(2, (2, 4))
    hidden = xdist.attention(own, own, own, shard, mask=Mask()).flatten(2)
    loss = xdist.cross_entropy(hidden, head, shard.scatter(labels), shard)
    (part,) = torch.autograd.grad(loss, head)
    gradient = start_reduce(part, mesh.sequence_group).wait()
    terms, count = head.new_zeros(()), 0
    for start, stop in ((0, 3), (3, 10), (10, 11), (11, 24)):
        q = x[:, start:stop].unflatten(2, (2, 4))
        seen = torch.ones(stop - start, stop - start).tril().bool()[None]
        out, _ = dense(q, q, q, None, seen=seen, scale=0.5, softcap=None, factors=None)
        logits, target = out.flatten(2) @ head.T, labels[:, start:stop]
        terms = terms + F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
        count += int((target != -100).sum())
    (want,) = torch.autograd.grad(terms / count, head)
    return abs(float(loss - terms / count)), relative_error(gradient, want)


def test_case_11_packing_does_not_change_the_loss(pool3: RankPool) -> None:
    """One row of packed documents on three ranks: loss and gradient of the documents one by one."""
    for loss, gradient in pool3.run(packed_loss, 3):
        assert loss <= 1e-12
        assert gradient <= LIMIT


def two_layers(strategy: str) -> dict[str, Tensor]:
    """Gradients on this rank of two calls in a row, the second of other keys."""
    mesh = mesh_of(4, 2)
    assert mesh is not None
    shard = xdist.SequenceShard(mesh, Layout.zigzag(24, 4))
    leaves = {name: x[:, shard.positions].clone().requires_grad_() for name, x in layers().items()}
    first = xdist.attention(
        leaves["q"], leaves["k"], leaves["v"], shard, mask=Mask(), strategy=strategy
    )
    # Heads first in memory, as attention without a shard takes them.
    k, v = (leaves[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("k2", "v2"))
    out = xdist.attention(first, k, v, shard, mask=Mask(), strategy=strategy)
    grads = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def layers() -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(5)
    shapes = {"q": 4, "k": 2, "v": 2, "k2": 2, "v2": 2}
    return {
        name: torch.randn(1, 24, heads, 4, generator=made, dtype=torch.float64)
        for name, heads in shapes.items()
    }


def test_case_12_backward_of_each_layer_meets_its_own_keys(pool4: RankPool) -> None:
    leaves = {name: x.requires_grad_() for name, x in layers().items()}
    seen = torch.ones(24, 24).tril().bool().expand(4, 24, 24)
    options: Any = {"seen": seen, "scale": 0.5, "softcap": None, "factors": None}
    first, _ = dense(leaves["q"], leaves["k"], leaves["v"], None, **options)
    out, _ = dense(first, leaves["k2"], leaves["v2"], None, **options)
    grads = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    layout = Layout.zigzag(24, 4)
    for strategy in EVERY:
        ranks = pool4.run(two_layers, strategy)
        for name, want in zip(leaves, grads, strict=True):
            for rank, answer in enumerate(ranks):
                assert relative_error(answer[name], want[:, layout.positions(rank)]) <= LIMIT


def test_case_12_keys_changed_before_backward_raise() -> None:
    q, k = (torch.randn(1, 6, 2, 4, requires_grad=True) for _ in range(2))
    held = k * 1
    out = xdist.attention(q, held, held, mask=Mask())
    with torch.no_grad():
        held.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_case_13_backward_takes_the_log_sum_exp_of_all_blocks(pool4: RankPool) -> None:
    """Scores whose sum differs much from block to block, all of them seen by every query."""
    case = Case("", contiguous(), Mask(causal=False), 24, 4, 2, scale=2.5, ulysses=2, sinks=True)
    exact(of_each_strategy(case), pool4)
    exact(of_each_strategy(replace(case, softcap=5.0, layout=zigzag())), pool4)


def test_case_17_padding_is_not_part_of_a_document(pool3: RankPool) -> None:
    """Padding as documents of one token each, or as one document: real tokens see none of it."""
    alone = Case("", contiguous(15, 1), Mask(), 15, documents=(0, 6, 15))
    drawn = {name: x[:, :15] for name, x in draw(replace(alone, n=24)).items()}
    want, _ = dense(
        drawn["q"], drawn["k"], drawn["v"], None,
        seen=visible(alone), scale=0.5, softcap=None, factors=None,
    )  # fmt: skip
    for padded in ((0, 6, 15, *range(16, 25)), (0, 6, 15, 24)):
        case = Case("", zigzag(24, 3), Mask(), 24, documents=padded)
        for ranks in exact(of_each_strategy(case), pool3):
            assert relative_error(joined(case, ranks)["out"][:, :15], want) <= LIMIT
