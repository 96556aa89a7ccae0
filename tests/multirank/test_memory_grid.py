"""checkpoint_grid under a shard: law 1, bytes moved, bytes kept."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import xdist
from tests.multirank.grid_cases import (
    BATCH,
    DIM,
    GRIDS,
    KINDS,
    Case,
    N,
    Weighted,
    build,
    draw,
    expected,
    kept_beside,
    plain,
    run_cases,
    worst,
)
from xdist.cost import scan as scan_cost
from xdist.cost.moves import Moved, halo_bytes
from xdist.layout import Layout
from xdist.memory.grid import checkpoint_grid, explain
from xdist.memory.grid_layers import describe
from xdist.testing import RankPool, layouts


@cache
def reference(stack: str, packed: bool) -> list[Tensor]:
    return expected(Case(stack, None, None, packed))


def segments(layout: Layout) -> tuple[Any, ...]:
    return tuple(tuple(layout.segments(rank)) for rank in range(layout.parts))


def check(pool: RankPool, parts: int, stacks: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Every stack with every layout, in turn with each grid, with and without documents."""
    held = {name: layouts(N, parts)[name] for name in names}
    grids = itertools.cycle(GRIDS)
    cases = [
        Case(stack, *next(grids), packed, segments(layout))
        for stack, packed, layout in itertools.product(stacks, (False, True), held.values())
    ]
    for case, results in zip(cases, zip(*pool.run(run_cases, cases), strict=True), strict=True):
        assert case.layout is not None
        layout = Layout.from_segments(N, case.layout)
        wanted = reference(case.stack, case.packed)
        for rank, found in enumerate(results):
            at = torch.from_numpy(layout.positions(rank))
            own = [tensor[:, at] for tensor in wanted[:2]]
            if len(at):
                assert worst(found[:2], own) <= 1e-10, (case, rank)
        parts_of = [
            torch.stack(found).sum(0) for found in zip(*(r[2:] for r in results), strict=True)
        ]
        assert worst(parts_of, wanted[2:]) <= 1e-10, case


def test_law_1_on_two_ranks(pool2: RankPool) -> None:
    check(pool2, 2, tuple(f"{kind}+{kind}" for kind in KINDS), ("zigzag",))


def test_law_1_on_three_ranks(pool3: RankPool) -> None:
    check(pool3, 3, ("gla+attention+gated_deltanet", "twice+mamba2"), ("drawn", "empty"))


@pytest.mark.slow
def test_law_1_everywhere(pool3: RankPool) -> None:
    names = ("contiguous", "zigzag", "drawn", "uneven", "empty")
    check(pool3, 3, (*KINDS, "kda+attention+mamba+mamba2", "twice+twice"), names)


STACK = "gated_linear+deltanet+mamba2"


def traffic(lengths: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """(length, grid, forward, backward, moves) of a stack on this rank."""
    results = []
    mesh = xdist.init_mesh(ring=3)
    for n, grid in itertools.product(lengths, ((8, 1), (64, 3))):
        shard = xdist.SequenceShard(mesh, Layout.zigzag(n, 3))
        layers = build(STACK)
        x = torch.randn(BATCH, shard.local_length, DIM, dtype=torch.float64).requires_grad_()
        counted = []
        y = None
        for _ in ("forward", "backward"):
            with xdist.comm.ledger() as moved:
                if y is None:
                    y = checkpoint_grid(
                        layers, x, shard, chunk_tokens=grid[0], group_layers=grid[1]
                    )
                else:
                    y.sum().backward()
            calls = {name: t.calls for name, t in moved.by_move.items()}
            counted.append((moved.sent_bytes, moved.received_bytes, calls))
        results.append((n, *counted))
    return results


def formula(n: int, rank: int, *, backward: bool) -> tuple[int, int]:
    """A halo of each layer's input as wide as its convolutions look back; a scan of its state."""
    layout = Layout.zigzag(n, 3)
    total = [0, 0]
    found = describe(build(STACK), draw()[0], ordered=True)
    for layer in found:
        reach = sum(call.reach for call in layer.calls)
        moves: list[Moved] = []
        if reach:
            there = halo_bytes(layout, rank, reach, 0, BATCH * DIM, 8)
            moves.append(Moved(*reversed(there)) if backward else there)
        for call in layer.calls:
            if call.journey is None:
                continue
            shape, kind = tuple(call.journey.identity.shape), call.journey.transition
            rates = call.journey.rates is not None
            chosen = scan_cost.choose_algorithm(layout, (0, n), shape, kind, 8, rates=rates)
            moves.append(
                scan_cost.scan_bytes(
                    layout,
                    (0, n),
                    rank,
                    shape,
                    kind,
                    8,
                    algorithm=chosen.algorithm,
                    rates=rates,
                    backward=backward,
                )
            )
        total = [total[0] + sum(m[0] for m in moves), total[1] + sum(m[1] for m in moves)]
    return total[0], total[1]


def test_bytes_moved_equal_the_formula_whatever_the_grid_and_length(pool3: RankPool) -> None:
    for rank, results in enumerate(pool3.run(traffic, (60, 120))):
        for n, forward, backward in results:
            assert forward[:2] == formula(n, rank, backward=False), (rank, n)
            assert backward[:2] == formula(n, rank, backward=True), (rank, n)
            # A recompute sends nothing: one halo and one scan a layer each way.
            assert forward[2] == backward[2] == {"halo": 3, "scan": 3}
        assert len({(forward[:2], backward[:2]) for _, forward, backward in results}) == 1


def kept_of(cases: tuple[tuple[str, int, int], ...]) -> list[tuple[int, int, int]]:
    """(measured, predicted, received in forward) on this rank."""
    results = []
    mesh = xdist.init_mesh(ring=2)
    for stack, chunk, group in cases:
        layers = build(stack, 32, torch.float32)
        shard = xdist.SequenceShard(mesh, Layout.zigzag(2050, 2))
        x = torch.randn(1, shard.local_length, 32)
        grid = {"chunk_tokens": chunk, "group_layers": group}
        predicted = explain(layers, x, shard, **grid).kept_bytes
        with xdist.comm.ledger() as moved:
            kept = kept_beside(layers, x, shard, **grid)
        results.append((kept, predicted, moved.received_bytes))
    return results


def test_kept_bytes_equal_the_formula_under_a_shard(pool2: RankPool) -> None:
    """Within 5 %, beside what the exchanges brought, which does not grow with the sequence."""
    cases = (("gla+gla+gla", 64, 1), ("gated_linear+mamba2+mamba", 100, 2), ("kda+deltanet", 64, 1))
    for results in pool2.run(kept_of, cases):
        for kept, predicted, received in results:
            assert 0.95 * predicted <= kept <= 1.05 * predicted + received, (kept, predicted)
            assert received < 0.2 * predicted


def head_sums() -> list[list[Tensor]]:
    """This rank's part of the head's sum, and gradients of x and of the head's weight."""
    results = []
    mesh = xdist.init_mesh(ring=2)
    for stack in ("gla+mamba2", "gla+attention"):
        layers, (x, dy) = build(stack), draw()
        shard = xdist.SequenceShard(mesh, Layout.zigzag(N, 2))
        x, dy = shard.scatter(x).requires_grad_(), shard.scatter(dy)
        torch.manual_seed(2)
        head = Weighted(DIM, dy).double()
        loss = checkpoint_grid(layers, x, shard, chunk_tokens=4, group_layers=2, head=head)
        dx, dw = torch.autograd.grad(loss, [x, head.projection.weight])
        results.append([loss.detach(), shard.gather(dx), dw])
    return results


def test_a_head_under_a_shard(pool2: RankPool) -> None:
    first, second = pool2.run(head_sums)
    for stack, one, other in zip(("gla+mamba2", "gla+attention"), first, second, strict=True):
        layers, (x, dy) = build(stack), draw()
        torch.manual_seed(2)
        head = Weighted(DIM, dy).double()
        loss = head(plain(layers, x.requires_grad_(), None), slice(None))
        wanted = torch.autograd.grad(loss, [x, head.projection.weight])
        found = [one[0] + other[0], one[1], one[2] + other[2]]
        assert worst(found, [loss.detach(), *wanted]) <= 1e-10
