"""Scans of grids against loops over tokens, on real ranks: what the tests of grid_scan share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

import xdist
from xdist.comm import ledger
from xdist.cost import grid_scan as cost
from xdist.parallel.recurrences.linear import LinearAttention
from xdist.testing import count_c10d_bytes, relative_error
from xdist_kernels.delta.reference import delta_rule_reference
from xdist_kernels.linear.reference import linear_attention_reference
from xdist_kernels.linear.ssd_reference import ssd_reference
from xdist_kernels.prefix.reference import prefix_attention_reference
from xdist_kernels.selective_scan.reference import selective_scan_reference

Inputs = dict[str, Any]
WHOLE = {"A", "D"}
BATCH = 2


@dataclass(frozen=True)
class Case:
    """One call. pair: other inputs for the backward direction; ways: strategy and algorithm."""

    op: str
    sizes: tuple[int, ...]
    dim: int
    order: tuple[int, ...]
    reverse: bool | str = False
    pair: bool = False
    ways: tuple[tuple[str, str], ...] = ()

    @property
    def directions(self) -> tuple[bool, ...]:
        """Reverse of each output."""
        return (False, True) if self.reverse == "both" else (bool(self.reverse),)


def draw(case: Case, seed: int) -> Inputs:
    """Whole inputs of one direction, float64."""
    generator = torch.Generator().manual_seed(seed)
    grid = (BATCH, *case.sizes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    made: dict[str, Callable[[], Inputs]] = {
        "linear_attention": lambda: {
            "q": normal(*grid, 1, 3),
            "k": normal(*grid, 1, 3),
            "v": normal(*grid, 2, 2),
            "log_decay": -0.2 * uniform(*grid, 2, 3),
        },
        "own": lambda: {name: normal(*grid, 2, 3) for name in ("q", "k", "v")},
        "delta_rule": lambda: {
            "q": normal(*grid, 2, 3),
            "k": 0.5 * normal(*grid, 2, 3),
            "v": normal(*grid, 2, 2),
            "beta": 0.3 * uniform(*grid, 2),
        },
        "ssd": lambda: {
            "x": normal(*grid, 2, 2),
            "dt": uniform(*grid, 2),
            "A": -0.3 * uniform(2),
            "B": normal(*grid, 1, 3),
            "C": normal(*grid, 1, 3),
            "D": normal(2),
        },
        "selective_scan": lambda: {
            "u": normal(*grid, 3),
            "delta": uniform(*grid, 3),
            "A": -0.3 * uniform(3, 2),
            "B": normal(*grid, 2),
            "C": normal(*grid, 2),
            "D": normal(3),
        },
        "prefix_attention": lambda: {
            "q": normal(2, 3),
            "k": normal(*grid, 2, 3),
            "v": normal(*grid, 2, 2),
        },
    }
    return made[case.op]()


def is_whole(op: str, name: str) -> bool:
    return name in WHOLE or (op, name) == ("prefix_attention", "q")


def call(case: Case, sides: Sequence[Inputs], gshard: xdist.GridShard | None) -> list[Tensor]:
    """The outputs of each direction."""
    op: Any = LinearAttention(1.0, "none") if case.op == "own" else getattr(xdist, case.op)
    given: list[Any] = list(sides)
    if case.op == "own":
        given = [[one["q"], one["k"], one["v"], None] for one in given]
    if case.ways:
        op = partial(op, **dict(case.ways))
    inputs = tuple(given) if len(given) == 2 else given[0]
    found = xdist.grid_scan(op, inputs, gshard, order=case.order, reverse=case.reverse)
    return list(found) if case.reverse == "both" else [found]


def loop(op: str, inputs: Inputs) -> Tensor:
    """Outputs of rows [R, n, ...] by a loop over tokens."""
    if op == "own":
        return linear_attention_reference(**inputs, scale=1.0)[0]
    if op == "prefix_attention":
        return prefix_attention_reference(**inputs, scale=3**-0.5)
    if op == "selective_scan":
        skip = inputs["D"] * inputs["u"]
        rest = {name: x for name, x in inputs.items() if name != "D"}
        return selective_scan_reference(**rest)[0] + skip
    references: dict[str, Any] = {
        "linear_attention": linear_attention_reference,
        "delta_rule": delta_rule_reference,
        "ssd": ssd_reference,
    }
    return references[op](**inputs)[0]


def reference(case: Case, inputs: Inputs, reverse: bool) -> Tensor:
    """The definition: tokens put in the order of the scan, a loop over them, and back."""
    dims = len(case.sizes)
    rows = [d for d in range(dims) if d not in case.order]
    ahead = [0, *(d + 1 for d in rows), *(d + 1 for d in case.order)]
    tokens = 1
    for d in case.order:
        tokens *= case.sizes[d]

    def put(x: Tensor) -> Tensor:
        rest = range(dims + 1, x.dim())
        found = x.permute(*ahead, *rest).reshape(-1, tokens, *x.shape[dims + 1 :])
        return found.flip(1) if reverse else found

    given = {n: x if is_whole(case.op, n) else put(x) for n, x in inputs.items()}
    out = loop(case.op, given)
    out = out.flip(1) if reverse else out
    shape = [BATCH, *(case.sizes[d - 1] for d in ahead[1:]), *out.shape[2:]]
    places = [ahead.index(i) for i in range(dims + 1)]
    return out.reshape(shape).permute(*places, *range(dims + 1, len(shape)))


def loss_of(outs: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """A different weight for every token and direction, and one nonlinearity."""
    return sum(
        ((w * out.sin()).sum() for out, w in zip(outs, weights, strict=True)), torch.zeros(())
    )


def weight_of(like: Tensor, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(50 + number)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64)


@lru_cache(maxsize=64)
def alone(case: Case) -> dict[str, Tensor]:
    """Outputs and gradients of the definition."""
    sides = [draw(case, seed) for seed in ((1, 2) if case.pair else (1,))]
    for side in sides:
        for x in side.values():
            x.requires_grad_()
    outs = [reference(case, sides[-1 if number else 0], way)
            for number, way in enumerate(case.directions)]  # fmt: skip
    weights = [weight_of(out, number) for number, out in enumerate(outs)]
    loss = loss_of(outs, weights)
    named = {f"d{name}{i}": x for i, side in enumerate(sides) for name, x in side.items()}
    grads = torch.autograd.grad(loss, list(named.values()))
    found = {f"out{number}": out.detach() for number, out in enumerate(outs)}
    return found | dict(zip(named, grads, strict=True))


@contextmanager
def few_rows_at_a_time(tokens: int, tile: int) -> Iterator[None]:
    """Groups of rows of some tokens, and tiles of some tokens, so that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xdist.parallel.grid_rows.GROUP_TOKENS", tokens)
        patch.setattr(
            "xdist.parallel.recurrence.Recurrence.row_tile_tokens", lambda op, inputs: tile
        )
        yield


def on_a_rank(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """This rank's part of outputs and gradients; its bytes are held against the formula."""
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    results = []
    for number, case in enumerate(cases):
        shard = xdist.GridShard(mesh, case.sizes, case.dim)
        sides = [draw(case, seed) for seed in ((1, 2) if case.pair else (1,))]
        for side in sides:
            for name, x in side.items():
                own = x if is_whole(case.op, name) else shard.scatter(x)
                side[name] = own.detach().clone().requires_grad_()
        problems: list[cost.GridScanProblem] = []
        choose = cost.choose_route

        def noted(
            problem: cost.GridScanProblem,
            into: list[cost.GridScanProblem] = problems,
            choose: Any = choose,
        ) -> cost.GridRoute:
            into.append(problem)
            return choose(problem)

        with (
            pytest.MonkeyPatch.context() as patch,
            few_rows_at_a_time(*((16, 7), (64, 99))[number % 2]),
        ):
            patch.setattr(cost, "choose_route", noted)
            with ledger() as moved, count_c10d_bytes() as counted:
                outs = call(case, sides, shard)
            whole = torch.zeros(BATCH, *case.sizes, *outs[0].shape[len(case.sizes) + 1 :])
            weights = [shard.scatter(weight_of(whole, n)) for n in range(len(outs))]
            named = {f"d{name}{i}": x for i, side in enumerate(sides) for name, x in side.items()}
            loss = loss_of(outs, weights)
            with ledger() as back, count_c10d_bytes() as counted_back:
                grads = torch.autograd.grad(loss, list(named.values()))
        found: dict[str, Any] = {f"out{n}": out.detach() for n, out in enumerate(outs)}
        found |= dict(zip(named, grads, strict=True))
        route = choose(problems[0])
        for way, one, two in ((False, moved, counted), (True, back, counted_back)):
            said = cost.grid_scan_bytes(problems[0], shard.rank, backward=way)
            assert one.sent_bytes == two.sent_bytes == said.sent_bytes, (case, way, said, one)
            assert one.received_bytes == two.received_bytes == said.received_bytes, (case, way)
        found |= {"route": (route.dim, route.strategy), "calls": moved.calls,
                  "sent": moved.sent_bytes + back.sent_bytes}  # fmt: skip
        results.append(found)
    return results


def compare(case: Case, parts: Sequence[dict[str, Any]], want: dict[str, Tensor]) -> None:
    """Raises where the ranks together differ from the definition."""
    for name, expected in want.items():
        own = [part[name] for part in parts]
        if name.startswith("d") and is_whole(case.op, name[1:-1]):
            found = sum(own)
        else:
            found = torch.cat(own, case.dim + 1)
        error = relative_error(found, expected)
        assert error < 1e-10, f"{case}: {name} differs by {error:.1e}"
