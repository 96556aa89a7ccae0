"""Law 1, bytes and overlap of xdist.conv_nd: grids sharded along each dim in turn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import xdist
from xdist.cost.conv_nd import ConvNdProblem, conv_dims, conv_nd_bytes
from xdist.errors import ShapeError
from xdist.parallel import conv_nd as parallel
from xdist.testing import RankPool, count_c10d_bytes, relative_error
from xdist_kernels.conv_nd.reference import conv_nd_reference


class Case(NamedTuple):
    sizes: tuple[int, ...]
    channels: tuple[int, int]
    groups: int
    kernel: tuple[int, ...]
    options: dict[str, Any]
    bias: bool = True
    dtype: torch.dtype = torch.float64


# Fewer positions than ranks, odd ones, kernels wider than a share and than the grid, outputs that
# read zeros alone or what their rank holds nothing of.
CASES = (
    Case((11,), (4, 4), 4, (5,), {}),
    Case((7,), (2, 4), 2, (4,), {"stride": 3, "padding": 2}),
    Case((4,), (2, 2), 1, (2,), {"padding": 8}),
    Case((9, 2), (1, 2), 1, (1, 2), {"stride": (4, 1), "padding": "valid"}),
    Case((7, 3), (3, 2), 1, (3, 3), {"dilation": (2, 1)}, bias=False),
    Case((9, 5), (2, 2), 2, (2, 4), {"stride": (2, 1), "padding": "valid"}),
    Case((5, 4, 3), (4, 4), 4, (3, 3, 3), {}),
    Case((5, 3, 2), (2, 4), 2, (9, 3, 2), {"padding": (4, 1, 1)}),
    Case((6, 7, 2), (3, 3), 3, (3, 2, 1), {"stride": 2, "dilation": (1, 3, 1)}),
    Case((3, 4, 2, 3), (2, 2), 1, (3, 2, 2, 1), {"stride": (1, 2, 1, 1)}),
    Case((5, 4, 3), (4, 4), 4, (3, 3, 3), {}, dtype=torch.float32),
    Case((5, 4, 3), (4, 2), 1, (3, 2, 3), {"stride": 2}, dtype=torch.bfloat16),
)  # fmt: skip


def draw(case: Case) -> dict[str, Tensor]:
    """Whole tensors in float64 with values that the case's dtype holds; dout last."""
    generator = torch.Generator().manual_seed(len(case.sizes))
    channels, outs = case.channels
    out_sizes = xdist.conv_sizes(case.sizes, case.kernel, **case.options)
    shapes = {
        "x": (2, *case.sizes, channels),
        "weight": (outs, channels // case.groups, *case.kernel),
        "bias": (outs,),
        "dout": (2, *out_sizes, outs),
    }
    if not case.bias:
        del shapes["bias"]
    return {
        name: torch.randn(shape, generator=generator).to(case.dtype).double()
        for name, shape in shapes.items()
    }


def gradients(out: Tensor, dout: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    found = torch.autograd.grad((out * dout).sum(), list(leaves.values()))
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(leaves, found, strict=True)}


def run_cases(cases: list[Case]) -> list[list[dict[str, Tensor]]]:
    """On one rank, of every case and sharded dim: output and gradients; bytes against formula and
    a second count."""
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    found = []
    for case in cases:
        found.append([])
        along = conv_dims(case.sizes, case.kernel, **case.options)
        for dim in range(len(case.sizes)):
            gshard = xdist.GridShard(mesh, case.sizes, dim)
            drawn = {name: x.to(case.dtype) for name, x in draw(case).items()}
            target = gshard.resized([one.outputs for one in along])
            dout = target.scatter(drawn.pop("dout"))
            drawn["x"] = gshard.scatter(drawn["x"])
            leaves = {name: t.requires_grad_() for name, t in drawn.items()}
            bytes_of = leaves["x"].element_size()
            problem = ConvNdProblem(along, dim, gshard.size, 2, case.channels[0], bytes_of)
            with xdist.comm.ledger() as moved, count_c10d_bytes() as counted:
                out = xdist.conv_nd(
                    leaves["x"], leaves["weight"], leaves.get("bias"), gshard,
                    groups=case.groups, **case.options,
                )  # fmt: skip
            with xdist.comm.ledger() as back, count_c10d_bytes() as counted_back:
                one = gradients(out, dout, leaves)
            for backward, ledger, second in ((False, moved, counted), (True, back, counted_back)):
                want = conv_nd_bytes(problem, gshard.rank, backward=backward)
                assert ledger.sent_bytes == want.sent_bytes == second.sent_bytes, (case, dim)
                assert ledger.received_bytes == want.received_bytes, (case, dim)
                assert second.received_bytes == want.received_bytes, (case, dim)
            target.check(out)
            found[-1].append(one)
    return found


@cache
def reference(number: int) -> dict[str, Tensor]:
    case = CASES[number]
    leaves = draw(case)
    dout = leaves.pop("dout")
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    along = conv_dims(case.sizes, case.kernel, **case.options)
    dilation = case.options.get("dilation", 1)
    out = conv_nd_reference(
        **leaves,
        before=[one.front for one in along],
        sizes=[one.outputs for one in along],
        stride=[one.stride for one in along],
        dilation=[dilation] * len(along) if isinstance(dilation, int) else dilation,
        groups=case.groups,
    )
    return gradients(out, dout, leaves)


def _bound(case: Case, name: str, one_rank: float) -> float:
    """DESIGN's law 1; of what each rank holds a part, bfloat16 rounds each part."""
    if case.dtype == torch.float64:
        return 1e-10
    rounded = case.dtype == torch.bfloat16 and name not in ("out", "dx")
    return 1e-2 if rounded else max(2e-6, 1.5 * one_rank)


def errors(found: list[list[list[dict[str, Tensor]]]]) -> dict[tuple[int, int, str], float]:
    """By case, dim and tensor, from what the ranks found."""
    errors = {}
    for number, case in enumerate(CASES):
        for name, want in reference(number).items():
            for dim in range(len(case.sizes)):
                parts = [one[number][dim][name].double() for one in found]
                apart = name in ("out", "dx")
                got = torch.cat(parts, dim + 1) if apart else torch.stack(parts).sum(0)
                assert got.shape == want.shape, (case, dim, name)
                errors[number, dim, name] = relative_error(got, want)
    return errors


@cache
def one_rank() -> dict[tuple[int, int, str], float]:
    return errors([run_cases(list(CASES))])


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_law_1_and_bytes(ranks: int, request: pytest.FixtureRequest) -> None:
    """One to four ranks, one to four dims, each sharded in turn; full, grouped and depthwise;
    strides, dilations and paddings; ledger = formula = bytes counted by a dispatch mode."""
    found = one_rank()
    if ranks > 1:
        pool: RankPool = request.getfixturevalue(f"pool{ranks}")
        found = errors(pool.run(run_cases, list(CASES)))
    for (number, dim, name), error in found.items():
        case = CASES[number]
        bound = _bound(case, name, one_rank()[number, dim, name] if ranks > 1 else 1e-2)
        assert error <= bound, f"{name} is off by {error:.1e}: {case}, dim {dim}"


def bytes_at(lengths: list[int]) -> list[list[tuple[int, int]]]:
    """Sent and received by this rank, forward and backward, along each dim of that length."""
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    found = []
    for dim in range(3):
        found.append([])
        for length in lengths:
            sizes = [4, 3, 5]
            sizes[dim] = length
            gshard = xdist.GridShard(mesh, sizes, dim)
            x = torch.ones(1, *gshard.local_sizes, 2, requires_grad=True)
            weight = torch.ones(2, 1, 3, 5, 3)
            with xdist.comm.ledger() as moved:
                xdist.conv_nd(x, weight, None, gshard, groups=2).sum().backward()
            found[-1].append((moved.sent_bytes, moved.received_bytes))
    return found


def test_bytes_do_not_grow_with_the_length(pool3: RankPool) -> None:
    """Ten times as long along the sharded dim: the same bytes on every rank."""
    for found in pool3.run(bytes_at, [9, 90]):
        for short, long in found:
            assert short == long
            assert short[0] > 0


def shorter_in_turn() -> list[bool]:
    """Whether outputs do not change with inputs they must not see: those of another half."""
    mesh = xdist.init_mesh(ring=2)
    gshard = xdist.GridShard(mesh, (8, 3), 0)
    weight = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = torch.randn(1, 8, 3, 2, generator=torch.Generator().manual_seed(1))
    changed = whole.clone()
    changed[:, 4] += 100.0
    a, b = (gshard.gather(xdist.conv_nd(gshard.scatter(x), weight, None, gshard))
            for x in (whole, changed))  # fmt: skip
    return [torch.equal(a[:, row], b[:, row]) for row in range(8)]


def test_an_input_reaches_its_neighbours_and_no_further(pool2: RankPool) -> None:
    assert pool2.run(shorter_in_turn) == [[True] * 3 + [False] * 3 + [True] * 2] * 2


@contextmanager
def events() -> Iterator[list[str]]:
    """What a call does, in order: starts and waits of moves, and runs of the kernel."""
    seen: list[str] = []
    names = ("start_edges", "start_edges_adjoint")
    kept = {name: getattr(parallel, name) for name in names}
    form = parallel.kernel.kernels("torch")
    kernels = {n: getattr(form, n) for n in ("conv_forward", "conv_backward")}

    def moving(start: Any) -> Any:
        def started(*args: Any, **options: Any) -> Any:
            seen.append("start")
            return start(*args, **options).then(lambda got: (seen.append("wait"), got)[1])

        return started

    def running(run: Any) -> Any:
        def ran(x: Tensor, *args: Any, **options: Any) -> Any:
            seen.append(f"run {x.shape[1]}")
            return run(x, *args, **options)

        return ran

    for name, start in kept.items():
        setattr(parallel, name, moving(start))
    for name, run in kernels.items():
        setattr(form, name, running(run))
    try:
        yield seen
    finally:
        for name, start in kept.items():
            setattr(parallel, name, start)
        for name, run in kernels.items():
            setattr(form, name, run)


def order() -> tuple[list[str], list[str], int]:
    gshard = xdist.GridShard(xdist.init_mesh(ring=3), (18, 2, 2), 0)
    x = torch.randn(1, *gshard.local_sizes, 2, requires_grad=True)
    with events() as forward:
        out = xdist.conv_nd(x, torch.randn(2, 2, 3, 3, 3), None, gshard)
    with events() as backward:
        out.sum().backward()
    return forward, backward, gshard.rank


def test_inner_outputs_are_computed_while_edges_travel(pool3: RankPool) -> None:
    for forward, backward, rank in pool3.run(order):
        edges = ["run 3"] * (2 if rank == 1 else 1)  # one output each: its three inputs
        assert forward == ["start", "run 6", "wait", *edges]
        assert backward == [*edges, "start", "run 6", "wait"]


def saved(gshard: xdist.GridShard | None) -> list[tuple[int, ...]]:
    sizes = (6, 2, 2) if gshard is None else gshard.local_sizes
    x = torch.randn(1, *sizes, 2, requires_grad=True)
    kept: list[Tensor] = []
    weight = torch.randn(2, 1, 3, 3, 3)

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        xdist.conv_nd(x, weight, None, gshard, groups=2)
    assert kept[0].data_ptr() == x.data_ptr(), "the input itself is kept, not a copy"
    return [tuple(t.shape) for t in kept if t is not weight and t.numel()]


def saved_by_ranks() -> list[tuple[int, ...]]:
    return saved(xdist.GridShard(xdist.init_mesh(ring=3), (18, 2, 2), 0))


def test_saved_are_the_input_and_what_was_received(pool3: RankPool) -> None:
    x, edge = (1, 6, 2, 2, 2), (1, 1, 2, 2, 2)
    assert saved(None) == [x]
    assert pool3.run(saved_by_ranks) == [[x, *[edge] * count] for count in (1, 2, 1)]


def test_no_gradient_is_made_that_nobody_wants() -> None:
    x, weight = torch.randn(1, 4, 4, 2), torch.randn(2, 2, 3, 3, requires_grad=True)
    xdist.conv_nd(x, weight).sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    x.requires_grad_()
    xdist.conv_nd(x, weight.detach()).sum().backward()
    assert x.grad is not None


def test_autocast_and_second_derivatives() -> None:
    x = torch.randn(1, 4, 4, 2, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3)
    plain = xdist.conv_nd(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, xdist.conv_nd(x, weight))
    with pytest.raises(xdist.errors.StrategyError, match="second derivative"):
        torch.autograd.grad(plain.sum(), x, create_graph=True)


def refused() -> list[str]:
    """What each rank says of the same wrong calls; nothing was sent."""
    gshard = xdist.GridShard(xdist.init_mesh(ring=2), (4, 5), 0)
    x, weight = torch.zeros(1, *gshard.local_sizes, 2), torch.zeros(2, 2, 3, 3)
    said = []
    for given, options in (
        ((x, torch.zeros(2, 2, 3, 7), None, gshard), {"padding": "valid"}),
        ((x, weight, None, gshard), {"stride": (1, 2, 1)}),
        ((x, weight, None, gshard), {"padding": "SAME"}),
        ((x, weight, None, gshard), {"dilation": 0}),
        ((x, weight, None, gshard), {"groups": 2}),
        ((torch.zeros(1, 4, 5, 2), weight, None, gshard), {}),
        ((torch.zeros(1, 3, 2), torch.zeros(2, 2, 3), None, gshard), {}),
    ):
        try:
            xdist.conv_nd(*given, **options)
        except ShapeError as error:
            said.append(str(error))
        else:
            said.append("")
    return said


def test_wrong_calls_are_refused_on_all_ranks_with_the_numbers(pool2: RankPool) -> None:
    first, second = pool2.run(refused)
    words = (
        "dim 1 of the grid is too small", "one for each of 2 dims", "got 'SAME'", "dilation",
        "2 groups", "sharded along dim 0", "the grid shard has 2 dims",
    )  # fmt: skip
    for one in (first, second):
        for word, text in zip(words, one, strict=True):
            assert word in text
    assert "5 positions and 0 zeros" in first[0]
    assert "reach over 7" in first[0]
