"""What every recurrence is tested on over ranks: law 1, bytes, leaks, states, order of events.

A test module describes its operation by an `Op`, builds cases with `grid` and hands many of them
to one call of a pool. Draw and reference functions stand at module level, so that ranks find them.

    OP = Op("ssd", draw, reference, state=(2, 4, 3, 2), whole=("A", "D"), variants=("", "grouped"))

    def test_law_1_on_two_ranks(pool2):
        check_law_1(OP, grid(OP, 2, torch.float64), pool2)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count, cycle, product
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

import xdist
from xdist.comm.pending import Pending
from xdist.cost.recurrent import recurrent_bytes
from xdist.layout import Layout
from xdist.parallel import recurrent, recurrent_scan, recurrent_work
from xdist.parallel.recurrence import Recurrence
from xdist.testing import RankPool, count_c10d_bytes, layouts, relative_error

N = 37
PACKED = (0, 0, 3, 4, 4, 17, 30, N)
# scan by each algorithm, auto, and switch
WAYS = (
    ("scan", "auto"),
    ("scan", "gather"),
    ("scan", "chain"),
    ("scan", "pipelined"),
    ("switch", "auto"),
)
Segments = tuple[tuple[tuple[int, int], ...], ...]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """An operation of `xdist`.

    draw: (variant, generator) -> inputs by parameter name, whole, float64, N tokens in dim 1 of
    those not in `whole`. reference: (inputs, initial_state or None, cu_seqlens) -> out and final
    states [B, documents, ...], a token loop in float64; initial states have documents too. state:
    [B, ...]. whole: inputs that every rank holds, beside those of one dim. like: the input that has
    the outputs' shape. states: whether the operation takes and gives states.
    """

    name: str
    draw: Callable[[str, torch.Generator], Inputs]
    reference: Callable[[Inputs, Tensor | None, tuple[int, ...]], tuple[Tensor, Tensor]]
    state: tuple[int, ...]
    whole: tuple[str, ...] = ()
    variants: tuple[str, ...] = ("",)
    like: str = "v"
    states: bool = True

    def is_whole(self, name: str, x: Tensor) -> bool:
        """Whether every rank holds this input, or its gradient."""
        return x.dim() == 1 or name in (*self.whole, "initial_state", "dfinal")


@dataclass(frozen=True)
class Case:
    """One call. `states`: an initial state is given and the final one used in the loss; tile:
    tokens of a tile, so that a rank has several."""

    layout: Segments
    variant: str = ""
    strategy: str = "scan"
    algorithm: str = "auto"
    packed: bool = False
    states: bool = False
    reverse: bool = False
    tile: int = 8
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @property
    def documents(self) -> tuple[int, ...] | None:
        return PACKED if self.packed else None

    @property
    def problem(self) -> Case:
        """What decides the result: the case on one rank."""
        return replace(self, layout=(((0, N),),), strategy="scan", algorithm="auto", tile=8)


def grid(op: Op, parts: int, dtype: torch.dtype, *, seeds: int = 1, each: int = 0) -> list[Case]:
    """Every kind of layout x way x variant; documents, states, direction and tile take turns.

    each: only so many variants for each layout and way, in turn; 0 is all of them.
    """
    kinds = [
        tuple(tuple(layout.segments(r)) for r in range(parts))
        for seed in range(seeds)
        for layout in layouts(N, parts, seed).values()
    ]
    cases, turn, variant = [], count(parts), cycle(op.variants)
    for segments, (strategy, algorithm) in product(kinds, WAYS):
        for _ in range(each or len(op.variants)):
            number = next(turn)
            case = Case(
                segments,
                next(variant),
                strategy,
                algorithm,
                packed=number % 2 == 1,
                states=op.states and number % 3 != 0,
                reverse=number % 7 in (2, 5),
                tile=(64, 8, 5)[number // 2 % 3],
                dtype=dtype,
            )
            cases.append(case)
    return cases


def drawn(op: Op, case: Case) -> Inputs:
    """Whole inputs, states and gradients of outputs in float64, as the case's dtype holds them."""
    generator = torch.Generator().manual_seed(case.seed)
    found = dict(op.draw(case.variant, generator))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    documents = (len(PACKED) - 1,) if case.packed else ()
    if case.states:
        found["initial_state"] = normal(op.state[0], *documents, *op.state[1:])
    found["dout"] = normal(*found[op.like].shape)
    if op.states:
        found["dfinal"] = normal(op.state[0], *documents, *op.state[1:])
    return {name: x.to(case.dtype).double() for name, x in found.items()}


@contextmanager
def tiles_of(tokens: int) -> Iterator[None]:
    """Tiles of at most so many tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recurrence, "tile_tokens", lambda op, inputs: tokens)
        yield


def shard_of(case: Case) -> xdist.SequenceShard:
    mesh = xdist.init_mesh(ring=len(case.layout))
    return xdist.SequenceShard(mesh, Layout.from_segments(N, case.layout), case.documents)


def own_inputs(op: Op, case: Case, shard: xdist.SequenceShard) -> Inputs:
    """`drawn` of this rank, in the case's dtype."""
    return {
        name: (x if op.is_whole(name, x) else x[:, shard.positions]).to(case.dtype)
        for name, x in drawn(op, case).items()
    }


def call(op: Op, case: Case, shard: xdist.SequenceShard, inputs: Inputs) -> Any:
    options: dict[str, Any] = {"strategy": case.strategy, "algorithm": case.algorithm}
    if case.states:
        options["output_final_state"] = True
    if case.reverse:
        options["reverse"] = True
    with tiles_of(case.tile):
        return getattr(xdist, op.name)(**inputs, shard=shard, **options)


def results(op: Op, case: Case, shard: xdist.SequenceShard) -> Inputs:
    """Outputs and gradients of this rank for the loss <out, dout> + <final, dfinal> / ranks."""
    own = own_inputs(op, case, shard)
    dout, dfinal = own.pop("dout"), own.pop("dfinal", None)
    leaves = {name: x.requires_grad_() for name, x in own.items()}
    out, final = call(op, case, shard, leaves), None
    if case.states:
        out, final = out
    loss = (out * dout).sum()
    if final is not None:
        loss = loss + (final * dfinal).sum() / len(case.layout)
    with tiles_of(case.tile):
        grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {"out": out.detach(), **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}}
    if final is not None:
        found["final"] = final.detach()
    return found


def run_cases(op: Op, cases: list[Case]) -> list[Inputs]:
    """On one rank: every case in turn."""
    return [results(op, case, shard_of(case)) for case in cases]


def _mirrored(op: Op, inputs: Inputs) -> Inputs:
    return {name: x if op.is_whole(name, x) else x.flip(1) for name, x in inputs.items()}


def reference_call(
    op: Op, case: Case, inputs: Inputs, initial: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Outputs, and final states as the case shapes them; backwards as forwards on mirrored rows."""
    cuts = case.documents or (0, N)
    if initial is not None and not case.packed:
        initial = initial[:, None]
    if case.reverse:
        inputs, cuts = _mirrored(op, inputs), tuple(N - cut for cut in reversed(cuts))
        initial = None if initial is None else initial.flip(1)
    out, final = op.reference(inputs, initial, cuts)
    if case.reverse:
        out, final = out.flip(1), None if final is None else final.flip(1)
    if final is not None and not case.packed:
        final = final[:, 0]
    return out, final


@lru_cache(maxsize=512)
def wanted(op: Op, case: Case) -> Inputs:
    """The token loop's results in float64, of `case.problem`."""
    inputs = drawn(op, case)
    dout, dfinal = inputs.pop("dout"), inputs.pop("dfinal", None)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    given = dict(leaves)
    initial = given.pop("initial_state", None)
    out, final = reference_call(op, case, given, initial)
    loss = (out * dout).sum()
    if case.states:
        assert final is not None
        loss = loss + (final * dfinal).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {"out": out.detach(), **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}}
    if case.states:
        assert final is not None
        found["final"] = final.detach()
    return found


def errors(op: Op, case: Case, ranks: list[Inputs]) -> dict[str, float]:
    """Relative errors of the ranks' results: tokens put back in place, parts added.

    Tensors that every rank holds are measured against the sum of the parts' sizes.
    """
    layout = Layout.from_segments(N, case.layout)
    found = {}
    for name, want in wanted(op, case.problem).items():
        if name == "final":
            for one in ranks[1:]:
                assert torch.equal(one["final"], ranks[0]["final"]), f"final differs in {case}"
            found[name] = relative_error(ranks[0]["final"], want)
        elif op.is_whole(name[1:], want):
            parts = torch.stack([one[name].double() for one in ranks])
            size = float(parts.abs().sum(0).max())
            found[name] = float((parts.sum(0) - want).abs().max()) / size if size else 0.0
        else:
            whole = torch.full(want.shape, torch.nan, dtype=torch.float64)
            for rank, one in enumerate(ranks):
                whole[:, layout.positions(rank)] = one[name].double()
            found[name] = relative_error(whole, want)
    return found


@lru_cache(maxsize=512)
def one_rank_errors(op: Op, case: Case) -> dict[str, float]:
    """The same kernels on one rank, against the reference; of `case.problem`."""
    return errors(op, case, [results(op, case, shard_of(case))])


def _bound(op: Op, case: Case, name: str) -> float:
    if case.dtype == torch.float64:
        return 1e-10
    return max(2e-6, 1.5 * one_rank_errors(op, case.problem)[name])


def check_law_1(op: Op, cases: list[Case], pool: RankPool | None) -> None:
    """Every case equals one device: DESIGN law 1."""
    ranks = [run_cases(op, cases)] if pool is None else pool.run(run_cases, op, cases)
    for number, case in enumerate(cases):
        for name, error in errors(op, case, [one[number] for one in ranks]).items():
            bound = _bound(op, case, name)
            assert error <= bound, f"{name} is off by {error:.1e} > {bound:.1e} in {case}"


def check_law_1_in_bfloat16(op: Op, pool: RankPool, parts: int, ways: Any = WAYS) -> None:
    """Zigzag, documents and states: medians over five seeds within 1.5 times those of one rank."""
    layout = layouts(N, parts)["zigzag"]
    segments = tuple(tuple(layout.segments(r)) for r in range(parts))
    cases = [
        Case(segments, variant, *way, True, op.states, False, 8, torch.bfloat16, seed)
        for variant, way in product(op.variants, ways)
        for seed in range(5)
    ]
    ranks = pool.run(run_cases, op, cases)
    for first in range(0, len(cases), 5):
        five = range(first, first + 5)
        many = [errors(op, cases[i], [one[i] for one in ranks]) for i in five]
        alone = [one_rank_errors(op, cases[i].problem) for i in five]
        for name in many[0]:
            bound = max(2e-6, 1.5 * median(x[name] for x in alone))
            found = median(x[name] for x in many)
            assert found <= bound, f"{name}: {found:.1e} > {bound:.1e} in {cases[first]}"


# --- bytes ------------------------------------------------------------------------------------


def count_bytes(op: Op, cases: list[Case]) -> None:
    """On one rank: ledger = formula = bytes counted by a dispatch mode, in both directions."""
    for case in cases:
        shard = shard_of(case)
        own = own_inputs(op, case, shard)
        dout, dfinal = own.pop("dout"), own.pop("dfinal", None)
        leaves = {name: x.requires_grad_() for name, x in own.items()}
        requests: list[recurrent.Request] = []
        together = recurrent.run_together

        def noting(asked: Any, *args: Any, _together: Any = together, **options: Any) -> Any:
            requests.extend(asked)  # noqa: B023
            return _together(asked, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recurrent, "run_together", noting)
            with xdist.comm.ledger() as moved, count_c10d_bytes() as counted:
                found = call(op, case, shard, leaves)
        out, final = found if case.states else (found, None)
        loss = (out * dout).sum()
        if final is not None:
            loss = loss + (final * dfinal).sum()
        with tiles_of(case.tile), xdist.comm.ledger() as back, count_c10d_bytes() as counted_back:
            loss.backward()
        (request,) = requests
        problem = recurrent.problem_of(request, shard, case.algorithm)
        for backward, ledger, second in ((False, moved, counted), (True, back, counted_back)):
            want = recurrent_bytes(problem, case.strategy, shard.rank, backward=backward)
            sent = (ledger.sent_bytes, want.sent_bytes, second.sent_bytes)
            received = (ledger.received_bytes, want.received_bytes, second.received_bytes)
            assert len(set(sent)) == len(set(received)) == 1, (backward, sent, received, case)


# --- what crosses, and what must not ------------------------------------------------------------


def state_matters(op: Op, case: Case) -> float:
    """How much this rank's outputs change when the states that enter its segments are lost."""
    shard = shard_of(case)
    own = own_inputs(op, case, shard)
    inputs = {name: x for name, x in own.items() if name not in ("dout", "dfinal")}
    complete = recurrent_work.Work.complete

    def forgetting(work: Any, segment: Any, state: Tensor) -> None:
        complete(work, segment, work.identity)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        true = call(op, case, shard, inputs)
        patch.setattr(recurrent_work.Work, "complete", forgetting)
        lost = call(op, case, shard, inputs)
    return relative_error(lost[0], true[0]) if case.states else relative_error(lost, true)


def leaks(op: Op, case: Case, changed: int) -> tuple[bool, bool]:
    """Whether earlier tokens, and tokens of other documents, keep their bits when all inputs of
    one token change."""
    shard = shard_of(case)
    at = torch.from_numpy(shard.layout.positions(shard.rank))

    def outputs(one: xdist.SequenceShard, touched: int) -> Tensor:
        own = own_inputs(op, case, shard)
        inputs = {k: x.clone() for k, x in own.items() if k not in ("dout", "dfinal")}
        for name, x in inputs.items():
            if not op.is_whole(name, x):
                x[:, at == touched] *= 3.0
        with torch.no_grad():
            found = call(op, case, one, inputs)
        return found[0] if case.states else found

    mesh = xdist.init_mesh(ring=len(case.layout))
    one = xdist.SequenceShard(mesh, shard.layout)
    before = at < changed
    later = torch.equal(outputs(one, N)[:, before], outputs(one, changed)[:, before])
    packed = xdist.SequenceShard(mesh, shard.layout, PACKED)
    inside = packed.documents.index(changed)
    outside = torch.from_numpy(packed.documents.index(at.numpy()) != inside)
    others = torch.equal(outputs(packed, N)[:, outside], outputs(packed, changed)[:, outside])
    return later, others


# --- order of events ----------------------------------------------------------------------------


LOCAL_WORK = ("ahead", "run", "backward_ahead", "backward")


def _kinds(kind: type[Recurrence] = Recurrence) -> list[type[Recurrence]]:
    """Every subclass there is."""
    return [one for sub in kind.__subclasses__() for one in (sub, *_kinds(sub))]


def order_of_events(op: Op, case: Case) -> tuple[list[str], list[str]]:
    """What happens forward and backward, in order: "start" of the exchange, a tile's "ahead",
    "run", "backward_ahead" or "backward" as the operation's own class has them, and "wait"."""
    shard = shard_of(case)
    own = own_inputs(op, case, shard)
    dout = own.pop("dout")
    own.pop("dfinal", None)
    leaves = {name: x.requires_grad_() for name, x in own.items()}
    events: list[str] = []

    def noting(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            events.append(name)
            return inner(*args, **options)

        return noted

    getattr(xdist, op.name)  # loads its recurrence
    own_methods = [
        (kind, name, name) for kind in _kinds() for name in LOCAL_WORK if name in vars(kind)
    ]
    with pytest.MonkeyPatch.context() as patch, tiles_of(case.tile):
        for owner, attribute, name in (
            (recurrent_scan, "start_together", "start"),
            (recurrent_scan, "start_adjoint_together", "start"),
            (Pending, "wait", "wait"),
            *own_methods,
        ):
            patch.setattr(owner, attribute, noting(name, getattr(owner, attribute)))
        out = call(op, case, shard, leaves)
        forward, events[:] = list(events), []
        (out * dout).sum().backward()
    return forward, events


def check_overlap(op: Op, pool: RankPool, algorithm: str) -> None:
    """Two ranks: while states travel, each computes what needs none of them."""
    segments = (((0, 19),), ((19, N),))
    case = Case(segments, op.variants[-1], "scan", algorithm)
    first, second = pool.run(order_of_events, op, case)
    for rank, direction in product((0, 1), (0, 1)):
        events = (first, second)[rank][direction]
        start, wait = events.index("start"), events.index("wait")
        between = set(events[start + 1 : wait])
        # The rank that knows its state runs its tiles; the other makes what needs no state.
        knows = rank == direction
        made = ("run", "ahead") if direction == 0 else ("backward", "backward_ahead")
        assert between == {made[0] if knows else made[1]}, (rank, direction, events)
        assert (made[0] in events[wait:]) == (not knows), (rank, direction, events)
