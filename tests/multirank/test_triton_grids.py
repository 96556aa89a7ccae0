"""Law 1 of grids with the Triton kernels, and what of grids has none: float32, the interpreter."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import xdist
from tests.multirank import grid_attention_cases as attention
from tests.multirank import grid_scan_cases as scans
from tests.multirank.test_triton_backend import OnTriton, on_triton
from xdist.errors import StrategyError
from xdist.parallel.recurrences.linear import LinearAttention
from xdist.testing import RankPool, relative_error

LIMIT = 2e-6

# --- scans --------------------------------------------------------------------------------------


def scanned(case: scans.Case, mesh: xdist.Mesh) -> dict[str, Tensor]:
    """This rank's part of outputs and gradients, from inputs in float32."""
    shard = xdist.GridShard(mesh, case.sizes, case.dim)
    sides = [scans.draw(case, seed) for seed in ((1, 2) if case.pair else (1,))]
    for side in sides:
        for name, x in side.items():
            own = x if scans.is_whole(case.op, name) else shard.scatter(x)
            side[name] = own.detach().float().requires_grad_()
    with scans.few_rows_at_a_time(64, 99):
        outs = scans.call(case, sides, shard)
        whole = torch.zeros(scans.BATCH, *case.sizes, *outs[0].shape[len(case.sizes) + 1 :])
        weights = [shard.scatter(scans.weight_of(whole, n)) for n in range(len(outs))]
        named = {f"d{name}{i}": x for i, side in enumerate(sides) for name, x in side.items()}
        grads = torch.autograd.grad(scans.loss_of(outs, weights), list(named.values()))
    found = {f"out{n}": out.detach() for n, out in enumerate(outs)}
    return found | dict(zip(named, grads, strict=True))


def scan_all(cases: list[scans.Case], ranks: int) -> list[dict[str, Tensor]]:
    mesh = xdist.init_mesh(ring=ranks)
    return [scanned(case, mesh) for case in cases]


def scan_errors(case: scans.Case, parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """Of all ranks together; what every rank holds is measured against the sum of the parts'
    sizes."""
    found = {}
    for name, want in scans.alone(case).items():
        own = [part[name].double() for part in parts]
        if name.startswith("d") and scans.is_whole(case.op, name[1:-1]):
            sizes = torch.stack(own).abs().sum(0).max()
            found[name] = float((torch.stack(own).sum(0) - want).abs().max() / sizes)
        else:
            found[name] = relative_error(torch.cat(own, case.dim + 1), want)
    return found


def check_scans(pool: RankPool, ranks: int, *cases: scans.Case) -> None:
    """Each tensor within max(2e-6, 1.5 times the error of the same kernels on one rank)."""
    parts = OnTriton(pool).run(scan_all, list(cases), ranks)
    for number, case in enumerate(cases):
        for name, error in scan_errors(case, [part[number] for part in parts]).items():
            limit = LIMIT
            if error > limit:
                with on_triton():
                    limit = 1.5 * scan_errors(case, scan_all([case], 1))[name]
            assert error <= limit, (name, error, limit, case)


@pytest.mark.slow
def test_grid_scan_on_two_ranks(pool2: RankPool) -> None:
    """States cross ranks, both directions in one exchange; shares are uneven."""
    check_scans(
        pool2,
        2,
        scans.Case("linear_attention", (3, 2), 0, (0, 1), "both", ways=(("strategy", "scan"),)),
    )


@pytest.mark.slow
def test_grid_scan_on_three_ranks(pool3: RankPool) -> None:
    """Each operation that has kernels; rows of the sharded dim, tokens switched to another dim and
    to heads, states along it, an empty share."""
    case = scans.Case
    check_scans(
        pool3, 3,
        case("delta_rule", (2, 3), 0, (0, 1), True),
        case("ssd", (4, 3), 0, (1,), "both"),
        case("selective_scan", (3, 3), 1, (0, 1), "both", True),
        case("linear_attention", (3, 4), 0, (0,), ways=(("strategy", "switch"),)),
    )  # fmt: skip


# --- attention ----------------------------------------------------------------------------------


def axial(dim: int, strategy: str = "auto", causal: bool = False) -> attention.Problem:
    return attention.Problem(
        "axial", (4, 3), (dim,), heads=(2, 1), causal=causal, strategy=strategy
    )


def check_axial(pool: RankPool, *cases: attention.Case) -> None:
    """As `check_scans`; bytes are those of the formula."""
    by_rank = OnTriton(pool).run(attention.run_cases, list(cases))
    for case, results in zip(cases, zip(*by_rank, strict=True), strict=True):
        assert not any(wrong for _, wrong in results), (case, results)
        wanted = attention.reference(case.problem, case.dtype, case.seed)
        found = attention.joined(case, [part for part, _ in results])
        for name, want in wanted.items():
            error, limit = relative_error(found[name], want), LIMIT
            if error > limit:
                with on_triton():
                    one, _ = attention.run(case, None)
                limit = 1.5 * relative_error(one[name], want)
            assert error <= limit, (name, error, limit, case)


@pytest.mark.slow
def test_axial_attention_on_two_ranks(pool2: RankPool) -> None:
    """Along the sharded dim, where keys travel, and along the other one, where nothing does."""
    check_axial(
        pool2,
        attention.Case(axial(0, "ring", causal=True), 0, torch.float32),
        attention.Case(axial(1), 0, torch.float32),
    )


@pytest.mark.slow
def test_axial_attention_on_three_ranks(pool3: RankPool) -> None:
    """Every strategy; shares are uneven."""
    check_axial(
        pool3,
        *(
            attention.Case(axial(0, strategy, causal), 0, torch.float32)
            for strategy, causal in (("switch", True), ("ulysses", False), ("auto", False))
        ),
    )


# --- refusals -----------------------------------------------------------------------------------


def refused() -> dict[str, str]:
    """What each rank is told where there is no kernel, asked for by a call or by the default, and
    the bytes moved until then."""
    mesh = xdist.init_mesh(ring=2)
    gshard = xdist.GridShard(mesh, (4, 3), 0)
    x = torch.ones(1, 2, 3, 2, 4)
    row = {"q": x[0, 0, 0], "k": x, "v": x}
    own: Any = partial(xdist.grid_scan, LinearAttention(1.0, "none"), [x, x, x, None])
    calls: dict[str, Any] = {
        "neighborhood_attention": partial(xdist.neighborhood_attention, x, x, x, window=3),
        "window_attention": partial(xdist.window_attention, x, x, x, window=2),
        "grid_attention": partial(xdist.grid_attention, x, x, x, grid=2),
        "conv_nd": partial(xdist.conv_nd, x[..., 0], torch.ones(4, 2, 3, 3)),
        "prefix_attention": partial(xdist.grid_scan, xdist.prefix_attention, row, order=(0, 1)),
    }
    said = {}
    with xdist.comm.ledger() as moved:
        for name, call in calls.items():
            with pytest.raises(StrategyError) as error:
                call(gshard=gshard, backend="triton")
            said[name] = error.value.why
            with on_triton(), pytest.raises(StrategyError) as error:
                call(gshard=gshard)
            assert error.value.why == said[name]
        with pytest.raises(StrategyError) as error:
            own(gshard=gshard, order=(0, 1), backend="triton")
        said["own"] = error.value.why
        wide = x.double()
        for name, call in (
            ("axial", partial(xdist.axial_attention, wide, wide, wide, dim=0)),
            ("linear", partial(xdist.grid_scan, xdist.linear_attention,
                               {"q": wide, "k": wide, "v": wide}, order=(0, 1))),
        ):  # fmt: skip
            with pytest.raises(StrategyError) as error:
                call(gshard=gshard, backend="triton")
            said[name] = error.value.why
    assert moved.sent_bytes == 0
    return said


def test_grids_without_a_kernel_refuse_triton_on_every_rank(pool2: RankPool) -> None:
    """Before anything is sent: sets of a grid, its convolution, prefix attention; float64."""
    first, second = pool2.run(refused)
    assert first == second
    wide = [first.pop(name) for name in ("axial", "linear")]
    assert all("float64" in why for why in wide)
    assert "its methods" in first.pop("own")
    assert set(first.values()) == {"there is no Triton kernel for it"}
