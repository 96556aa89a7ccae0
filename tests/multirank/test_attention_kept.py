"""What layers of one shard share: counted once, and never mistaken for another call's."""

from __future__ import annotations

from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import xdist
from xdist import Dropout, Mask
from xdist.cost import attention_choice, attention_keys
from xdist.cost.attention_keys import Problem
from xdist.documents import Documents
from xdist.parallel.attention_call import Call
from xdist.shard import MOST_KEPT, SequenceShard
from xdist.testing.pool import RankPool
from xdist_kernels.attention.triton_plan import Plans

N = 26
CUTS = [0, 5, 19, N]
MASKS = (
    Mask(),
    Mask(causal=False),
    Mask(window=4),
    Mask(window=[2, 2, None, 0]),
    Mask(prefix=3, window=2),
    Mask(chunk=4),
)
STRATEGIES = ("auto", "ring", "ulysses", "gather", "halo", "2d")


def shard_of(mesh: xdist.Mesh) -> SequenceShard:
    layout = xdist.Layout.balanced(CUTS, mesh.sequence_size)
    return SequenceShard(mesh, layout, CUTS)


def layer(
    shard: SequenceShard, mask: Mask, strategy: str, heads: int = 4, dropout: Dropout | None = None
) -> list[Tensor]:
    """Output and gradients of one call."""
    draw = torch.Generator().manual_seed(3 + shard.rank)
    sizes = ((heads, 6), (heads // 2, 6), (heads // 2, 5))
    q, k, v = (
        torch.randn(1, shard.local_length, *size, generator=draw, dtype=torch.float64)
        for size in sizes
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = xdist.attention(q, k, v, shard, mask=mask, strategy=strategy, dropout=dropout)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


def shared_and_alone() -> list[str]:
    """Calls on one shard that differ from the same calls on shards of their own."""
    mesh = xdist.init_mesh(ring=2)
    shard = shard_of(mesh)
    wrong = []
    drops = (None, Dropout(0.4, seed=1), Dropout(0.4, seed=1, step=1))
    varied = [*product(MASKS, STRATEGIES, (4,), (None,))]
    varied += product(MASKS[:1], ("ring", "ulysses"), (2, 4), drops)
    for mask, strategy, heads, dropout in varied:
        if strategy == "halo" and None in mask.reach:
            continue
        shared = layer(shard, mask, strategy, heads, dropout)
        alone = layer(shard_of(mesh), mask, strategy, heads, dropout)
        if not all(torch.equal(a, b) for a, b in zip(shared, alone, strict=True)):
            wrong.append(f"{mask} {strategy} {heads} {dropout}")
    return wrong


def test_calls_on_one_shard_equal_calls_on_shards_of_their_own(pool2: RankPool) -> None:
    """Bit for bit, masks, strategies, heads and dropout mixed."""
    assert pool2.run(shared_and_alone) == [[], []]


def counted() -> dict[str, int]:
    """How often needs, choices and spans are computed by six layers, forward and backward."""
    counts = dict.fromkeys(("needs", "choice", "spans"), 0)
    before = attention_keys.needs_of, attention_choice.choose, Call._spans

    def counting(name: str, real):  # type: ignore[no-untyped-def]
        def wrapper(*args):  # type: ignore[no-untyped-def]
            counts[name] += 1
            return real(*args)

        return wrapper

    try:
        attention_keys.needs_of = counting("needs", before[0])
        attention_choice.choose = counting("choice", before[1])
        Call._spans = counting("spans", before[2])  # type: ignore[method-assign]
        shard = shard_of(xdist.init_mesh(ring=2))
        for _ in range(6):
            layer(shard, Mask(), "auto")
    finally:
        attention_keys.needs_of, attention_choice.choose, Call._spans = before  # type: ignore[method-assign]
    return counts


def test_needs_choice_and_spans_are_computed_once_a_shard(pool2: RankPool) -> None:
    for counts in pool2.run(counted):
        assert counts == {"needs": 1, "choice": 1, "spans": 1}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A card that is not there: the stream work goes to, and whether it goes into a graph."""
    card = SimpleNamespace(stream=1, capturing=False)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=card.stream)
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: card.capturing)
    return card


def test_a_stream_reads_what_it_made_and_a_graph_leaves_nothing(card: SimpleNamespace) -> None:
    layout, documents = xdist.Layout.contiguous(4, 1), Documents.of(None, 4)
    sizes = (1, 2, 2, 8, 8, 4)
    problem = Problem(layout, documents, Mask(), layout, documents, False, *sizes)

    def once(name: str) -> object:
        return Call(problem, 0, None, 1.0, None, torch.device("cuda")).once(name, object)

    card.capturing = True
    assert once("plan") is not once("plan")
    card.capturing = False
    first = once("plan")
    assert once("plan") is first
    card.stream = 2
    second = once("plan")
    assert second is not first
    assert once("plan") is second
    # A graph begins when all streams have ended their work: it reads what one of them made.
    card.stream, card.capturing = 3, True
    assert once("plan") is first
    assert once("another") is not once("another")


def test_a_plan_made_in_a_graph_is_not_kept(card: SimpleNamespace) -> None:
    plans = Plans(tuple(torch.zeros(4, 3, dtype=torch.int64)), torch.arange(3))
    plans.at = SimpleNamespace(is_cuda=True)
    card.capturing = True
    assert plans.prefixed is not plans.prefixed
    card.capturing = False
    assert plans.prefixed is plans.prefixed


def test_a_shard_keeps_a_few_calls() -> None:
    shard = SequenceShard(xdist.Mesh.one_rank(), xdist.Layout.contiguous(4, 1))
    for size in range(MOST_KEPT + 5):
        assert shard.once(("call", size), partial(int, size)) == size
    assert shard.once(("call", MOST_KEPT + 4), lambda: -1) == MOST_KEPT + 4
    assert shard.once(("call", 0), lambda: -1) == -1
    assert len(shard._kept) == MOST_KEPT
