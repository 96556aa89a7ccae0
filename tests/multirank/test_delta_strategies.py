"""Strategies of the delta rule are what they say: bytes, no transition on the wire, memory, leaks,
states and transitions that matter, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import xdist
from tests.multirank.delta_cases import BATCH, HEADS, KEY_DIM, OP, WIDTH, draw
from tests.multirank.recurrence_cases import (
    WAYS,
    Case,
    N,
    call,
    check_overlap,
    count_bytes,
    leaks,
    own_inputs,
    shard_of,
    state_matters,
    tiles_of,
)
from tests.multirank.test_linear_strategies import PeakBytes
from xdist.errors import NumericsError, ShapeError, StrategyError, XdistError
from xdist.parallel import recurrent_work
from xdist.parallel.recurrences.delta import DeltaRule
from xdist.testing import RankPool, layouts, relative_error

STATE_BYTES = BATCH * HEADS * KEY_DIM * WIDTH * 4
TRANSITION_BYTES = BATCH * HEADS * KEY_DIM * KEY_DIM * 4


def contiguous(parts: int, n: int = N) -> tuple:
    layout = xdist.Layout.contiguous(n, parts)
    return tuple(tuple(layout.segments(r)) for r in range(parts))


def test_ledger_is_the_formula_is_the_second_count(pool2: RankPool, pool3: RankPool) -> None:
    """Every algorithm and switch, in both directions, on every kind of layout."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    for parts, pool in ((2, pool2), (3, pool3)):
        cases = []
        for number, layout in enumerate(layouts(N, parts).values()):
            segments = tuple(tuple(layout.segments(r)) for r in range(parts))
            for turn, (strategy, algorithm) in enumerate(WAYS):
                at = number + turn
                cases.append(
                    Case(
                        segments,
                        OP.variants[at % len(OP.variants)],
                        strategy,
                        algorithm,
                        packed=at % 2 == 1,
                        states=at % 3 == 0,
                        reverse=at % 4 == 3,
                        dtype=dtypes[number % 3],
                    )
                )
        pool.run(count_bytes, OP, cases)


def sent(case: Case) -> tuple[int, int]:
    """Bytes that this rank sends forward and backward."""
    shard = shard_of(case)
    own = own_inputs(OP, case, shard)
    dout = own.pop("dout")
    del own["dfinal"]
    leaves = {name: x.requires_grad_() for name, x in own.items()}
    with xdist.comm.ledger() as moved:
        out = call(OP, case, shard, leaves)
    with xdist.comm.ledger() as back, tiles_of(case.tile):
        torch.autograd.grad((out * dout).sum(), list(leaves.values()))
    return moved.sent_bytes, back.sent_bytes


@pytest.mark.parametrize("algorithm", ["chain", "pipelined"])
def test_a_chain_sends_one_state_a_hop_and_never_a_transition(
    algorithm: str, pool2: RankPool, pool4: RankPool
) -> None:
    """K x V elements a rank and direction, whatever the number of ranks; M would be five times
    that."""
    for parts, pool in ((2, pool2), (4, pool4)):
        found = pool.run(
            sent, Case(contiguous(parts), "scalar/1", "scan", algorithm, dtype=torch.float32)
        )
        forward, backward = zip(*found, strict=True)
        assert forward == (STATE_BYTES,) * (parts - 1) + (0,)
        assert backward == (0,) + (STATE_BYTES,) * (parts - 1)


def test_backward_sends_no_transition(pool3: RankPool) -> None:
    """Gathered summaries: forward each rank's state to all later ranks, and the middle one's
    transition to both others, for this direction and the other; backward states alone."""
    case = Case(contiguous(3), "diagonal/2", "scan", "gather", dtype=torch.float32)
    forward, backward = zip(*pool3.run(sent, case), strict=True)
    assert forward == (2 * STATE_BYTES, STATE_BYTES + 2 * TRANSITION_BYTES, 0)
    assert backward == (0, STATE_BYTES, 2 * STATE_BYTES)


def longer(n: int, algorithm: str) -> int:
    """Bytes that this rank sends forward for a sequence of n tokens."""
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.zigzag(n, 2))
    x = torch.randn(1, shard.local_length, 2, 8)
    with xdist.comm.ledger() as moved, torch.no_grad():
        xdist.delta_rule(x, x, x, x[..., 0].sigmoid(), shard, strategy="scan", algorithm=algorithm)
    return moved.sent_bytes


def test_scan_bytes_do_not_grow_with_the_sequence(pool2: RankPool) -> None:
    for algorithm in ("gather", "chain", "pipelined"):
        assert pool2.run(longer, 64, algorithm) == pool2.run(longer, 1024, algorithm)


def without_transitions(case: Case) -> float:
    """How much this rank's outputs change when transitions are taken for zero."""
    shard = shard_of(case)
    own = own_inputs(OP, case, shard)
    inputs = {name: x for name, x in own.items() if name not in ("dout", "dfinal")}
    own_transition = DeltaRule.transition_of

    def none(op: DeltaRule, tile: Any) -> Tensor:
        return 0 * own_transition(op, tile)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        true = call(OP, case, shard, inputs)
        patch.setattr(DeltaRule, "transition_of", none)
        lost = call(OP, case, shard, inputs)
    return relative_error(lost, true)


def test_states_and_transitions_that_cross_matter(pool3: RankPool) -> None:
    """On the inputs of the law-1 tests: without the states that enter, or with transitions of
    zero, outputs of the last rank change by more than 1e-2."""
    for variant in OP.variants:
        for algorithm in ("gather", "chain", "pipelined"):
            case = Case(contiguous(3), variant, "scan", algorithm, dtype=torch.float32)
            first, *later = pool3.run(state_matters, OP, case)
            assert first == 0
            assert min(later) > 1e-2, (variant, later)
            first, second, last = pool3.run(without_transitions, case)
            assert first == second == 0
            assert last > 1e-2, (variant, algorithm, last)


def test_nothing_leaks_from_later_tokens_or_other_documents(pool3: RankPool) -> None:
    layout = layouts(N, 3, seed=1)["drawn"]
    segments = tuple(tuple(layout.segments(r)) for r in range(3))
    for strategy, algorithm in WAYS:
        case = Case(segments, "diagonal/2", strategy, algorithm, tile=64)
        for found in pool3.run(leaks, OP, case, 21):
            assert found == (True, True), (strategy, algorithm)


@pytest.mark.parametrize("algorithm", ["gather", "chain", "pipelined"])
def test_local_work_is_done_while_states_travel(algorithm: str, pool2: RankPool) -> None:
    check_overlap(OP, pool2, algorithm)


def peak_of(n: int, algorithm: str) -> tuple[int, int]:
    """(bytes of this rank's inputs, most bytes made and held in forward and backward)."""
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(n, 2))
    q, k, v = ((0.1 * torch.randn(1, n // 2, 2, 32)).requires_grad_() for _ in range(3))
    beta = torch.rand(1, n // 2, 2).requires_grad_()
    with pytest.MonkeyPatch.context() as patch, tiles_of(1024), PeakBytes() as peak:
        patch.setattr(recurrent_work, "KEPT_BYTES", 4 << 20)
        out = xdist.delta_rule(q, k, v, beta, shard, strategy="scan", algorithm=algorithm)
        torch.autograd.grad(out, [q, k, v, beta], out.detach())
    return sum(x.nbytes for x in (q, k, v, beta)), peak.peak


def test_scan_never_holds_the_sequence(pool2: RankPool) -> None:
    """Beyond one output, one gradient an input, and a state a tile, memory is that of one tile: a
    scan that gathered the sequence would hold twice this rank's inputs more."""
    for algorithm in ("gather", "pipelined"):
        beyond = {}
        for n in (16_384, 32_768):
            for held, peak in pool2.run(peak_of, n, algorithm):
                beyond[n] = max(beyond.get(n, 0), peak - held - held // 3)
                assert peak - held - held // 3 < 20 * 2**20
        # Inputs grow by 4 MiB a rank here; states by 64 KiB.
        assert beyond[32_768] < beyond[16_384] + 2**20


def chained(strategy: str) -> float:
    """Error of two calls, the first's final state handed to the second, against one call."""
    mesh = xdist.init_mesh(ring=3)
    cut = 18
    whole = draw("diagonal/2", torch.Generator().manual_seed(3))
    leaves = {name: x.requires_grad_() for name, x in whole.items()}
    want = xdist.delta_rule(**leaves)
    wanted = torch.autograd.grad(want.square().sum(), list(leaves.values()))
    state, loss, found, parts = None, torch.zeros(()), [], []
    for start, stop in ((0, cut), (cut, N)):
        shard = xdist.SequenceShard(mesh, xdist.Layout.zigzag(stop - start, 3))
        at = shard.positions + start
        own = {name: x.detach()[:, at].requires_grad_() for name, x in whole.items()}
        out, state = xdist.delta_rule(
            **own, shard=shard, initial_state=state, output_final_state=True, strategy=strategy
        )
        loss = loss + out.square().sum()
        found.append(relative_error(out, want[:, at]))
        parts += [(x, g[:, at]) for x, g in zip(own.values(), wanted, strict=True)]
    grads = torch.autograd.grad(loss, [x for x, _ in parts])
    pairs = zip(grads, parts, strict=True)
    return max(*found, *(relative_error(grad, right) for grad, (_, right) in pairs))


def test_a_state_handed_on_chains_exactly(pool3: RankPool) -> None:
    """Outputs and every gradient, through the state, across calls and ranks, in float64."""
    for strategy in ("scan", "switch"):
        assert max(pool3.run(chained, strategy)) < 1e-10


def refuse(changes: dict[str, Any], checks: bool) -> str:
    """The message of the error that a call with these changes raises; `bad` names an input of
    which rank 1 holds a value that is refused."""
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(8, 2))
    given: dict[str, Any] = {
        "q": torch.zeros(1, 4, 2, 3),
        "k": torch.zeros(1, 4, 2, 3),
        "v": torch.zeros(1, 4, 4, 5),
        "beta": torch.ones(1, 4, 4),
        "log_decay": torch.zeros(1, 4, 4),
    }
    changes = dict(changes)
    bad = changes.pop("bad", None)
    given.update({name: torch.zeros(x) if isinstance(x, tuple) else x
                  for name, x in changes.items()})  # fmt: skip
    if bad is not None and mesh.sequence_rank == 1:
        given[bad[0]].view(-1)[5] = bad[1]
    with pytest.MonkeyPatch.context(), xdist.comm.ledger() as moved:
        if checks:
            with xdist.checks(), pytest.raises(NumericsError) as caught:
                xdist.delta_rule(**given, shard=shard)
        else:
            with pytest.raises(XdistError) as caught:
                xdist.delta_rule(**given, shard=shard)
            assert isinstance(caught.value, (ShapeError, StrategyError))
    assert moved.sent_bytes == 0
    return str(caught.value)


def test_bad_input_is_refused_on_every_rank_with_the_numbers(pool2: RankPool) -> None:
    cases: list[tuple[dict[str, Any], bool, tuple[str, ...]]] = [
        ({"strategy": "ring"}, False, ("no strategy 'ring'",)),
        ({"algorithm": "tree"}, False, ("no scan algorithm 'tree'",)),
        ({"v": (1, 4, 3, 5)}, False, ("multiple of key heads", "(1, 4, 3, 5)")),
        ({"beta": (1, 4, 2)}, False, ("beta must be [B,n,H] = [1, 4, 4]", "[1, 4, 2]")),
        ({"beta": (1, 4, 4, 1)}, False, ("[1, 4, 4, 1]",)),
        ({"log_decay": (1, 4, 4, 5)}, False, ("log_decay", "(1, 4, 4, 5)")),
        ({"log_decay": (3,)}, False, ("log_decay", "(3,)")),
        ({"initial_state": (1, 4, 5, 3)}, False, ("[1, 4, 3, 5]", "[1, 4, 5, 3]")),
        ({"q": (1, 3, 2, 3), "k": (1, 3, 2, 3), "v": (1, 3, 4, 5), "beta": (1, 3, 4),
          "log_decay": (1, 3, 4)}, False, ("3 tokens", "the shard has 4")),
        ({"bad": ("beta", 2.5)}, True, ("0 <= beta <= 2", "ranks [1]")),
        ({"bad": ("beta", -0.1)}, True, ("0 <= beta <= 2", "ranks [1]")),
        ({"bad": ("log_decay", 0.5)}, True, ("log_decay at most 0", "ranks [1]")),
        ({"bad": ("k", float("nan"))}, True, ("finite", "ranks [1]")),
        ({"bad": ("beta", float("nan"))}, True, ("finite", "ranks [1]")),
    ]  # fmt: skip
    for changes, checks, parts in cases:
        messages = pool2.run(refuse, changes, checks)
        for message in messages:
            assert all(part in message for part in parts), (changes, message)
    assert "highest_beta 2.5" in pool2.run(refuse, {"bad": ("beta", 2.5)}, True)[1]
