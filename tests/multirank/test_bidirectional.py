"""Both directions of a recurrence with one exchange: the values of two calls, half the messages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import xdist
from xdist.errors import ShapeError, StrategyError
from xdist.testing import RankPool, count_c10d_bytes, layouts, relative_error

N = 53
CUTS = (0, 7, 7, 30, N)


def draw(name: str, seed: int) -> dict[str, Tensor]:
    """Whole inputs of one direction, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    heads = (2, N, 4)
    made: dict[str, Any] = {
        "linear_attention": lambda: {
            "q": normal(2, N, 2, 3),
            "k": normal(2, N, 2, 3),
            "v": normal(*heads, 5),
            "log_decay": -0.05 * uniform(*heads, 3),
        },
        "delta_rule": lambda: {
            "q": normal(*heads, 3),
            "k": 0.5 * normal(*heads, 3),
            "v": normal(*heads, 5),
            "beta": 0.2 * uniform(*heads),
            "log_decay": -0.05 * uniform(*heads),
        },
        "ssd": lambda: {
            "x": normal(*heads, 5),
            "dt": uniform(*heads),
            "A": -0.1 * uniform(4),
            "B": normal(2, N, 2, 3),
            "C": normal(2, N, 2, 3),
        },
        "selective_scan": lambda: {
            "u": normal(*heads),
            "delta": uniform(*heads),
            "A": -0.1 * uniform(4, 3),
            "B": normal(2, N, 3),
            "C": normal(2, N, 3),
        },
        "prefix_attention": lambda: {
            "q": normal(4, 5),
            "k": normal(*heads, 5),
            "v": normal(*heads, 5),
        },
    }
    return made[name]()


def is_whole(op: str, name: str) -> bool:
    return name == "A" or (op, name) == ("prefix_attention", "q")


def on_a_rank(op: str, cases: list[tuple]) -> list[dict[str, Tensor]]:
    """Outputs and gradients of both directions on this rank; bytes and messages are checked."""
    function = getattr(xdist, op)
    results = []
    for segments, packed, strategy, algorithm in cases:
        mesh = xdist.init_mesh(ring=len(segments))
        layout = xdist.Layout.from_segments(N, segments)
        shard = xdist.SequenceShard(mesh, layout, CUTS if packed else None)
        sides = []
        for seed in (1, 2):
            drawn = draw(op, seed)
            for name in drawn:
                if not is_whole(op, name):
                    drawn[name] = drawn[name][:, shard.positions]
            sides.append({name: x.requires_grad_() for name, x in drawn.items()})
        ways: dict[str, Any] = {"strategy": strategy, "algorithm": algorithm}
        with xdist.comm.ledger() as apart, torch.no_grad():
            function(**sides[0], shard=shard, **ways)
            function(**sides[1], shard=shard, reverse=True, **ways)
        with xdist.comm.ledger() as moved, count_c10d_bytes() as counted:
            outs = xdist.bidirectional(function, sides[0], sides[1], shard, **ways)
        assert moved.sent_bytes == apart.sent_bytes == counted.sent_bytes
        assert moved.received_bytes == apart.received_bytes == counted.received_bytes
        if strategy == "switch" or algorithm == "gather":
            assert 2 * moved.calls == apart.calls, (moved.calls, apart.calls)
        leaves = [(n, f"{k}{n}", x) for n, own in enumerate(sides) for k, x in own.items()]
        weight = torch.linspace(0.5, 1.5, N, dtype=torch.float64)[shard.positions]
        shape = (1, -1, *(1,) * (outs[0].dim() - 2))
        loss = (outs[0] * weight.view(shape)).sum() + (outs[1].sin() * weight.view(shape)).sum()
        grads = torch.autograd.grad(loss, [x for _, _, x in leaves])
        found = {"out0": outs[0].detach(), "out1": outs[1].detach()}
        found |= {f"d{label}": g for (_, label, _), g in zip(leaves, grads, strict=True)}
        results.append(found)
    return results


def alone(op: str, packed: bool) -> dict[str, Tensor]:
    """Two calls on one device."""
    function = getattr(xdist, op)
    layout = xdist.Layout.contiguous(N, 1)
    shard = xdist.SequenceShard(xdist.init_mesh(), layout, CUTS if packed else None)
    sides = [{k: x.requires_grad_() for k, x in draw(op, seed).items()} for seed in (1, 2)]
    outs = [function(**own, shard=shard, reverse=bool(n)) for n, own in enumerate(sides)]
    weight = torch.linspace(0.5, 1.5, N, dtype=torch.float64)
    shape = (1, -1, *(1,) * (outs[0].dim() - 2))
    loss = (outs[0] * weight.view(shape)).sum() + (outs[1].sin() * weight.view(shape)).sum()
    leaves = [(f"{k}{n}", x) for n, own in enumerate(sides) for k, x in own.items()]
    grads = torch.autograd.grad(loss, [x for _, x in leaves])
    found = {"out0": outs[0].detach(), "out1": outs[1].detach()}
    return found | {f"d{k}": g for (k, _), g in zip(leaves, grads, strict=True)}


@pytest.mark.parametrize(
    "op", ["linear_attention", "delta_rule", "ssd", "selective_scan", "prefix_attention"]
)
def test_both_directions_share_one_exchange(op: str, pool2: RankPool, pool3: RankPool) -> None:
    """The same bytes as two calls, in half the messages, and the same values and gradients."""
    for parts, pool in ((2, pool2), (3, pool3)):
        kinds = [
            [layout.segments(r) for r in range(parts)]
            for name, layout in layouts(N, parts).items()
            if name in ("contiguous", "zigzag", "drawn")
        ]
        cases = []
        for number, kind in enumerate(kinds):
            for packed in (False, True):
                cases += [
                    (kind, packed, "scan", "gather"),
                    (kind, packed, "scan", ("chain", "auto")[number % 2]),
                    (kind, packed, "switch", "auto"),
                ]
        ranks = pool.run(on_a_rank, op, cases)
        for number, (segments, packed, *_) in enumerate(cases):
            layout = xdist.Layout.from_segments(N, segments)
            for name, want in alone(op, packed).items():
                own = [one[number][name] for one in ranks]
                if name.startswith("d") and is_whole(op, name[1:-1]):
                    found = sum(own)
                else:
                    found = torch.full_like(want, torch.nan)
                    for rank, part in enumerate(own):
                        found[:, layout.positions(rank)] = part
                assert relative_error(found, want) < 1e-10, (name, cases[number])


def test_what_has_no_directions_is_refused() -> None:
    with pytest.raises(StrategyError, match="needs a recurrence"):
        xdist.bidirectional(xdist.attention, {}, {})
    x = torch.randn(1, 4, 2, 3)
    with pytest.raises(ShapeError, match="missing a required argument: 'v'"):
        xdist.bidirectional(xdist.linear_attention, {"q": x, "k": x})
    with pytest.raises(ShapeError, match="belong to the call of both"):
        xdist.bidirectional(xdist.linear_attention, {"q": x, "k": x, "v": x, "reverse": True})


def test_states_that_cannot_be_are_refused() -> None:
    x = torch.randn(1, 4, 2, 3)
    state = torch.zeros(1, 2, 3, 3, dtype=torch.int64)
    with pytest.raises(ShapeError, match="floating dtype"):
        xdist.linear_attention(x, x, x, initial_state=state)
    with pytest.raises(ShapeError, match="do not fit"):
        xdist.delta_rule(x[..., :0], x[..., :0], x, x[..., 0])


def test_an_algorithm_that_cannot_be_is_refused_on_one_rank_too() -> None:
    q, kv = torch.randn(2, 3), torch.randn(1, 5, 2, 3)
    with pytest.raises(StrategyError, match="cannot be pipelined"):
        xdist.prefix_attention(q, kv, kv, algorithm="pipelined")
    with pytest.raises(StrategyError, match="one of strategy scan"):
        xdist.linear_attention(kv, kv, kv, strategy="switch", algorithm="chain")


def test_an_empty_batch_of_a_selective_scan_is_refused() -> None:
    u, b = torch.randn(0, 5, 4), torch.randn(0, 5, 3)
    with pytest.raises(ShapeError, match="batch of at least 1"):
        xdist.selective_scan(u, u, -torch.rand(4, 3), b, b)
