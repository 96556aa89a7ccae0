"""grid_scan: every order of a grid's dims, sharded along any of them, equals a loop over tokens."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

import xdist
from tests.multirank.grid_scan_cases import BATCH, Case, alone, call, compare, draw, on_a_rank
from xdist.errors import ShapeError, StrategyError
from xdist.testing import RankPool

OPS = ("selective_scan", "linear_attention", "ssd", "delta_rule", "prefix_attention", "own")
ORDERS = ((0, 1, 2), (2, 0, 1), (1,), (0,), (2,), (2, 1))
SIZES = (5, 4, 3)  # over four ranks: uneven, even, one empty


def cases() -> list[Case]:
    """Every order x sharded dim; operations and directions take turns."""
    found = []
    for number, (order, dim) in enumerate(itertools.product(ORDERS, range(3))):
        turn = number + number // 6
        reverse = ("both", False, "both", True)[turn % 4]
        found.append(Case(OPS[turn % 6], SIZES, dim, order, reverse, turn % 4 == 2))
    found.append(Case("linear_attention", (3, 7), 0, (0, 1), "both", True))
    found.append(Case("selective_scan", (2, 3, 2, 3), 2, (2, 0), "both"))
    found.append(Case("ssd", (9,), 0, (0,), "both"))
    ways = (("strategy", "switch"), ("algorithm", "chain"), ("algorithm", "pipelined"))
    forced = [Case("linear_attention", SIZES, 1, (1, 2), "both", True, (one,)) for one in ways]
    return found + forced


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_order_equals_a_loop_over_tokens(ranks: int, request: pytest.FixtureRequest) -> None:
    """Outputs, every gradient, and bytes: ledger = formula = count over c10d operations. Two and
    four ranks take turns: every order and every sharded dim on each."""
    drawn = {2: cases()[::2], 4: cases()[1::2]}.get(ranks, cases())
    if ranks == 1:
        parts = [on_a_rank(drawn)]
    else:
        pool: RankPool = request.getfixturevalue(f"pool{ranks}")
        parts = pool.run(on_a_rank, drawn)
    for number, case in enumerate(drawn):
        own = [part[number] for part in parts]
        compare(case, own, alone(case))
        if ranks == 1 or case.dim not in case.order:
            assert {one["sent"] for one in own} == {0}, case


def test_both_directions_take_one_exchange(pool3: RankPool) -> None:
    """As many messages as one direction, whether states or tokens travel, however many groups of
    rows there are."""
    for order, strategy in (((0, 1, 2), "scan"), ((0,), "switch"), ((1, 0), "switch")):
        ways = (("strategy", "scan"), ("algorithm", "gather")) if strategy == "scan" else ()
        drawn = [Case("selective_scan", (6, 4, 5), 0, order, way, ways=ways)
                 for way in (False, "both")]  # fmt: skip
        for one, both in pool3.run(on_a_rank, drawn):
            assert one["calls"] == both["calls"] > 0, (order, one["route"])


def test_routes_are_those_of_counted_bytes(pool3: RankPool) -> None:
    """Inside the order: to rows where they are wide enough, else to the outermost dim; outermost:
    states, until they are more bytes than tokens."""
    wanted = [
        (Case("ssd", (6, 4, 5), 1, (0, 1)), (2, "local")),
        (Case("ssd", (6, 40, 2), 1, (0, 1)), (0, "scan")),
        (Case("ssd", (6, 40, 2), 0, (0, 1)), (0, "scan")),
        (Case("ssd", (3, 4, 5), 0, (0,)), (1, "local")),
        (Case("ssd", (6, 4, 5), 2, (0, 1)), (2, "local")),
    ]
    for parts in pool3.run(on_a_rank, [case for case, _ in wanted]):
        assert [part["route"] for part in parts] == [route for _, route in wanted]


def states_only(length: int) -> list[int]:
    case = Case("ssd", (length, 3), 0, (0, 1), "both", ways=(("strategy", "scan"),))
    return [one["sent"] for one in on_a_rank([case])]


def test_bytes_of_states_do_not_depend_on_the_length(pool3: RankPool) -> None:
    assert pool3.run(states_only, 9) == pool3.run(states_only, 60)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nothing_is_kept_but_the_inputs(dtype: torch.dtype) -> None:
    """No permuted copies, no wider ones: what autograd keeps of a scan across the grid is the
    inputs as given."""
    case = Case("own", (6, 7, 8), 0, (2, 0, 1), "both")
    inputs = {name: x.to(dtype).requires_grad_() for name, x in draw(case, 1).items()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outs = call(case, [inputs], None)
    assert outs[0].shape == (BATCH, *case.sizes, 2, 3)
    assert outs[0].dtype == dtype
    assert sum(kept.values()) == sum(x.nbytes for x in inputs.values())


def test_what_cannot_be_scanned_is_refused() -> None:
    inputs = draw(Case("linear_attention", (3, 4), 0, (0,)), 1)
    scan = partial(xdist.grid_scan, xdist.linear_attention)
    for order in ((), (0, 0), (2,), (-1,)):
        with pytest.raises(ShapeError, match="some of the grid's 2 dims once each"):
            scan(inputs, order=order)
    with pytest.raises(ShapeError, match="initial_state"):
        scan({**inputs, "initial_state": None}, order=(0,))
    with pytest.raises(ShapeError, match="reverse is 'all'"):
        scan(inputs, order=(0,), reverse="all")
    with pytest.raises(ShapeError, match="several sets"):
        scan((inputs, inputs), order=(0,))
    with pytest.raises(ShapeError, match="v is NoneType"):
        scan({"q": inputs["q"]}, order=(0,))
    with pytest.raises(ShapeError, match="1 positional"):
        xdist.grid_scan(partial(xdist.linear_attention, inputs["q"]), inputs, order=(0,))
    with pytest.raises(StrategyError, match="needs a recurrence"):
        xdist.grid_scan(xdist.attention, inputs, order=(0,))
    with pytest.raises(StrategyError, match="no strategy 'ring'"):
        xdist.grid_scan(partial(xdist.linear_attention, strategy="ring"), inputs, order=(0,))
    with pytest.raises(StrategyError, match="no scan algorithm"):
        xdist.grid_scan(partial(xdist.linear_attention, algorithm="tree"), inputs, order=(0,))
    gshard = xdist.GridShard(xdist.init_mesh(), (4, 3))
    with pytest.raises(ShapeError, match=r"\(4, 3\)"):
        scan(inputs, gshard, order=(0,))
