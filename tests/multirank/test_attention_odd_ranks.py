"""xdist.attention on ranks, given what users give it by accident: the plain result, or one error
on all ranks before anything is sent."""

from __future__ import annotations

import copy
from itertools import product

import torch
from torch import Tensor, nn

import xdist
from tests.multirank.attention_cases import mesh_of
from xdist import Mask
from xdist.errors import StrategyError
from xdist.shard import SequenceShard
from xdist.testing import RankPool

N, PARTS = 21, 4
STRATEGIES = ("ulysses", "ring", "gather", "halo", "2d")
MASK = Mask(window=6)


def shard_of() -> SequenceShard:
    mesh = mesh_of(PARTS, 2)
    assert mesh is not None
    return SequenceShard(mesh, xdist.Layout.zigzag(N, PARTS), [0, 8, N])


def inputs(shard: SequenceShard) -> dict[str, Tensor]:
    """This rank's q, k and v, and the sinks, float64."""
    made = torch.Generator().manual_seed(1)
    whole = {name: torch.randn(1, N, heads, 4, generator=made, dtype=torch.float64)
             for name, heads in (("q", 4), ("k", 2), ("v", 2))}  # fmt: skip
    found = {name: shard.scatter(x) for name, x in whole.items()}
    return found | {"sinks": torch.arange(4, dtype=torch.float64)}


def gradients(shard: SequenceShard, strategy: str, some: set[str]) -> dict[str, Tensor]:
    """Of the mean over tokens, whose gradient is one row of memory for all tokens."""
    x = {name: t.requires_grad_(name in some) for name, t in inputs(shard).items()}
    out = xdist.attention(**x, shard=shard, mask=MASK, strategy=strategy)
    weight = torch.arange(16, dtype=torch.float64).view(4, 4)
    (out.mean(1) * weight).sum().backward()
    return {name: t.grad for name, t in x.items() if t.grad is not None}


def differing() -> list[str]:
    """On one rank, the calls whose gradients are not those of all inputs."""
    shard, wrong = shard_of(), []
    every = {strategy: gradients(shard, strategy, {*inputs(shard)}) for strategy in STRATEGIES}
    for strategy, some in product(
        STRATEGIES, ({"q"}, {"k"}, {"v", "sinks"}, {"sinks"}, {"q", "v"})
    ):
        wanted, found = every[strategy], gradients(shard, strategy, some)
        alike = found.keys() == some and all(
            torch.allclose(found[name], wanted[name], rtol=1e-10, atol=1e-12) for name in found
        )
        wrong += [] if alike else [f"{strategy} {sorted(some)}"]
    return wrong


def test_gradients_of_some_inputs_are_those_of_all(pool4: RankPool) -> None:
    assert pool4.run(differing) == [[]] * PARTS


def evaluated_then_trained() -> list[str]:
    """On one rank, strategies that give other bits in training on a shard that was first used in
    inference mode, beside a shard that was not; without a backward to come and with one."""
    wrong = []
    for strategy in STRATEGIES:
        used, fresh = shard_of(), shard_of()
        with torch.inference_mode():
            before = xdist.attention(**inputs(used), shard=used, mask=MASK, strategy=strategy)
        some = {"q", "k", "v", "sinks"}
        with torch.no_grad():
            plain = xdist.attention(**inputs(fresh), shard=fresh, mask=MASK, strategy=strategy)
        a, b = gradients(used, strategy, some), gradients(fresh, strategy, some)
        if not (torch.equal(before, plain) and all(torch.equal(a[n], b[n]) for n in some)):
            wrong.append(strategy)
    return wrong


def test_a_shard_used_in_inference_mode_trains_afterwards(pool4: RankPool) -> None:
    assert pool4.run(evaluated_then_trained) == [[]] * PARTS


def second_order() -> list[tuple[str, int]]:
    """On one rank, of each strategy: what a second derivative is refused with, and bytes sent."""
    shard, found = shard_of(), []
    for strategy in STRATEGIES:
        x = {name: t.requires_grad_() for name, t in inputs(shard).items()}
        out = xdist.attention(**x, shard=shard, mask=MASK, strategy=strategy)
        with xdist.comm.ledger() as moved:
            try:
                torch.autograd.grad(out.square().sum(), x["q"], create_graph=True)
            except StrategyError as error:
                found.append((str(error), moved.sent_bytes))
    return found


def test_a_second_derivative_is_refused_before_anything_is_sent(pool4: RankPool) -> None:
    for found in pool4.run(second_order):
        assert [sent for _, sent in found] == [0] * len(STRATEGIES)
        assert all("no second derivative" in said for said, _ in found)


def again() -> list[str]:
    """On one rank, strategies whose second backward over a kept graph gives other bits."""
    shard, wrong = shard_of(), []
    for strategy in STRATEGIES:
        x = {name: t.requires_grad_() for name, t in inputs(shard).items()}
        leaves = [*x.values()]
        out = xdist.attention(**x, shard=shard, mask=MASK, strategy=strategy).square().sum()
        first = torch.autograd.grad(out, leaves, retain_graph=True)
        second = torch.autograd.grad(out, leaves)
        if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            wrong.append(strategy)
    return wrong


def test_backward_over_a_kept_graph_gives_the_same_again(pool4: RankPool) -> None:
    assert pool4.run(again) == [[]] * PARTS


class Layer(nn.Module):
    """Holds its shard, as a model that is trained on one layout may."""

    def __init__(self, shard: SequenceShard) -> None:
        super().__init__()
        self.shard = shard
        self.weight = nn.Parameter(torch.eye(4, dtype=torch.float64))

    def forward(self, x: dict[str, Tensor]) -> Tensor:
        q = x["q"] @ self.weight
        return xdist.attention(q, x["k"], x["v"], self.shard, mask=MASK)


def copied() -> bool:
    """Whether, on one rank, a copy of a module gives what the module gives."""
    shard = shard_of()
    layer, x = Layer(shard), inputs(shard)
    twin = copy.deepcopy(layer)
    return twin.shard is shard and torch.equal(twin(x), layer(x))


def test_a_module_that_holds_a_shard_can_be_copied(pool4: RankPool) -> None:
    """Process groups cannot: the copy stands on the same ranks."""
    assert pool4.run(copied) == [True] * PARTS
