"""Strategies of linear attention are what they say: bytes, memory, no leaks, state that matters."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import xdist
from xdist.cost.recurrent import choose, linear_problem, recurrent_bytes
from xdist.documents import Documents
from xdist.errors import NumericsError, ShapeError, StrategyError
from xdist.parallel import recurrent_work
from xdist.testing import RankPool, count_c10d_bytes, layouts, relative_error

N = 41
CUTS = (0, 5, 5, 20, 33, N)


def inputs(
    layout: xdist.Layout, rank: int, decay: int, shared: int, dtype: torch.dtype, key_dim: int = 6
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, v, log_decay of one rank; decay: elements a head, 0, 1 or key_dim."""
    generator = torch.Generator().manual_seed(3)
    n, heads = layout.length, 4
    at = torch.from_numpy(layout.positions(rank))

    def part(*shape: int) -> Tensor:
        return torch.randn(2, n, *shape, generator=generator)[:, at].to(dtype).requires_grad_()

    q, k, v = part(heads // shared, key_dim), part(heads // shared, key_dim), part(heads, 3)
    shape = {0: None, 1: (heads,), key_dim: (heads, key_dim)}[decay]
    if shape is None:
        return q, k, v, None
    log_decay = -0.02 * torch.rand(2, n, *shape, generator=generator)[:, at]
    return q, k, v, log_decay.to(dtype).requires_grad_()


def count_cases(cases: list[tuple]) -> None:
    """On one rank: ledger = formula = bytes counted by a dispatch mode, in both directions."""
    for parts, segments, packed, strategy, decay, shared, final, dtype in cases:
        mesh = xdist.init_mesh(ring=parts)
        layout = xdist.Layout.from_segments(N, segments)
        shard = xdist.SequenceShard(mesh, layout, CUTS if packed else None)
        rank = mesh.sequence_rank
        q, k, v, log_decay = inputs(layout, rank, decay, shared, dtype)
        problem = linear_problem(
            layout,
            Documents.of(CUTS if packed else None, N),
            batch=2,
            value_heads=4,
            key_heads=4 // shared,
            key_dim=6,
            value_dim=3,
            transition={0: "none", 1: "scalar", 6: "diagonal"}[decay],
            element_bytes=v.element_size(),
            want_final=final,
        )
        with xdist.comm.ledger() as moved, count_c10d_bytes() as counted:
            found = xdist.linear_attention(
                q,
                k,
                v,
                shard,
                log_decay=log_decay,
                strategy=strategy,
                output_final_state=final,
            )
        loss = sum(x.float().sum() for x in found) if final else found.float().sum()
        with xdist.comm.ledger() as back, count_c10d_bytes() as counted_back:
            loss.backward()
        for backward, ledger, second in ((False, moved, counted), (True, back, counted_back)):
            want = recurrent_bytes(problem, strategy, rank, backward=backward)
            case = (rank, backward, segments, packed, strategy, decay, shared, final, dtype)
            assert ledger.sent_bytes == want.sent_bytes == second.sent_bytes, case
            assert ledger.received_bytes == want.received_bytes == second.received_bytes, case


def test_ledger_is_the_formula_is_the_second_count(pool2: RankPool, pool3: RankPool) -> None:
    for parts, pool in ((2, pool2), (3, pool3)):
        cases = []
        for number, layout in enumerate(layouts(N, parts).values()):
            segments = [layout.segments(r) for r in range(parts)]
            for strategy in ("scan", "switch"):
                for packed in (False, True):
                    decay, final = (0, 1, 6)[(number + packed) % 3], bool((number + packed) % 2)
                    dtype = (torch.float32, torch.bfloat16, torch.float64)[number % 3]
                    shared = 1 + (number // 2) % 2 * 3
                    case = (parts, segments, packed, strategy, decay, shared, final, dtype)
                    cases.append(case)
        pool.run(count_cases, cases)


def test_scan_bytes_do_not_grow_with_the_sequence() -> None:
    def sent(n: int) -> int:
        layout, documents = xdist.Layout.zigzag(n, 4), Documents.of(None, n)
        problem = linear_problem(layout, documents, 1, 8, 8, 64, 64, "scalar", 2)
        return recurrent_bytes(problem, "scan", 1, backward=False).sent_bytes

    # Rank 1 holds the second and the last but one of eight segments: 3 and 1 other ranks follow,
    # and both transitions go to all 3.
    assert sent(1 << 20) == sent(1 << 10) == 4 * 8 * (4 * 64 * 64 + 6)


def test_auto_takes_fewer_bytes_and_says_so() -> None:
    """Long sequences scan; few tokens beside a large state switch; equal to the argmin."""
    seen = set()
    for n in (8, 64, 512, 1 << 16):
        documents = Documents.of(None, n)
        problem = linear_problem(
            xdist.Layout.contiguous(n, 4), documents, 1, 8, 8, 64, 64, "scalar", 2
        )
        choice = choose(problem)
        sums = {
            strategy: sum(
                recurrent_bytes(problem, strategy, rank, backward=b).sent_bytes
                for rank in range(4)
                for b in (False, True)
            )
            for strategy in ("scan", "switch")
        }
        assert choice.strategy == min(sums, key=lambda name: sums[name])
        assert choice.strategy in str(choice)
        seen.add(choice.strategy)
    assert seen == {"scan", "switch"}


class PeakBytes(TorchDispatchMode):
    """The largest sum of bytes of storages that ops made while the mode was on and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if is_tensor(x)}
        for x in tree_leaves(found):
            if is_tensor(x) and x.untyped_storage().data_ptr() not in known:
                self._add(x)
        return found

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if storage._cdata in self.live:
            return
        self.live[storage._cdata] = storage.nbytes()
        weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))


def is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def peak_of(strategy: str, n: int) -> tuple[int, int]:
    """(bytes of this rank's inputs, most bytes made and held in forward and backward)."""
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(n, 2))
    q, k, v = (torch.randn(1, n // 2, 2, 32).requires_grad_() for _ in range(3))
    # What is made ahead is bounded; less of it here, so that the sequence can be short.
    with pytest.MonkeyPatch.context() as patch, PeakBytes() as peak:
        patch.setattr(recurrent_work, "KEPT_BYTES", 4 << 20)
        out = xdist.linear_attention(q, k, v, shard, strategy=strategy)
        torch.autograd.grad(out, [q, k, v], out.detach())
    return sum(x.nbytes for x in (q, k, v)), peak.peak


def test_scan_never_holds_the_sequence(pool2: RankPool) -> None:
    """Beyond one output and one gradient an input, memory does not grow with the sequence: a
    scan that gathered the sequence would hold twice this rank's inputs more."""
    beyond = {}
    for n in (65_536, 131_072):
        for held, peak in pool2.run(peak_of, "scan", n):
            own = held // 3 + held  # the output and three gradients
            beyond[n] = max(beyond.get(n, 0), peak - own)
            assert peak - own < 48 * 2**20
    assert beyond[131_072] < beyond[65_536] + 2**20


def test_switch_holds_its_heads_and_no_more(pool2: RankPool) -> None:
    """Sent, received, placed and saved copies of as many bytes as this rank's inputs: at most 6
    at once, where every head of the whole sequence would be 2 for each of them."""
    for held, peak in pool2.run(peak_of, "switch", 65_536):
        assert peak < 6 * held


def leak(strategy: str) -> tuple[bool, bool]:
    """Whether a later token, or another document's token, changes what it must not."""
    mesh = xdist.init_mesh(ring=3)
    layout = layouts(N, 3, seed=1)["drawn"]
    rank, at = mesh.sequence_rank, torch.from_numpy(layout.positions(mesh.sequence_rank))

    def outputs(cuts: tuple[int, ...] | None, changed: int) -> Tensor:
        q, k, v, log_decay = inputs(layout, rank, 1, 1, torch.float64)
        with torch.no_grad():
            for x in (q, k, v):
                x[:, at == changed] += 100.0
            shard = xdist.SequenceShard(mesh, layout, cuts)
            return xdist.linear_attention(q, k, v, shard, log_decay=log_decay, strategy=strategy)

    later = outputs(None, N)[:, at < 22], outputs(None, 22)[:, at < 22]
    # Token 21 is of the document [20, 33): every other document is untouched.
    outside = (at < 20) | (at >= 33)
    others = outputs(CUTS, N)[:, outside], outputs(CUTS, 21)[:, outside]
    return torch.equal(*later), torch.equal(*others)


def test_nothing_leaks_from_later_tokens_or_other_documents(pool3: RankPool) -> None:
    for strategy in ("scan", "switch"):
        for found in pool3.run(leak, strategy):
            assert found == (True, True), strategy


def state_matters() -> float:
    """How much the outputs change when this rank's segment starts from zero."""
    mesh = xdist.init_mesh(ring=2)
    layout = xdist.Layout.contiguous(N, 2)
    x = inputs(layout, mesh.sequence_rank, 1, 1, torch.float32)
    shard = xdist.SequenceShard(mesh, layout)
    whole = xdist.linear_attention(*x[:3], shard, log_decay=x[3], strategy="scan")
    alone = xdist.linear_attention(*x[:3], log_decay=x[3])
    return relative_error(alone, whole)


def test_the_state_that_crosses_matters(pool2: RankPool) -> None:
    """With gates near 1, as in the law-1 grid: zeroing it changes outputs by more than 1e-2."""
    first, second = pool2.run(state_matters)
    assert first < 1e-6
    assert second > 1e-2


def chained(strategy: str) -> float:
    """Error of two calls, the first's final state handed to the second, against one call."""
    mesh = xdist.init_mesh(ring=3)
    cut = 18
    whole = xdist.Layout.contiguous(N, 1)
    q, k, v, log_decay = inputs(whole, 0, 6, 2, torch.float64)
    want = xdist.linear_attention(q, k, v, log_decay=log_decay)
    wanted = torch.autograd.grad(want.square().sum(), [q, k, v, log_decay])

    state, loss, found, leaves = None, torch.zeros(()), [], []
    for start, stop in ((0, cut), (cut, N)):
        shard = xdist.SequenceShard(mesh, xdist.Layout.zigzag(stop - start, 3))
        at = shard.positions + start
        own = [x.detach()[:, at].requires_grad_() for x in (q, k, v, log_decay)]
        out, state = xdist.linear_attention(
            *own[:3],
            shard,
            log_decay=own[3],
            initial_state=state,
            output_final_state=True,
            strategy=strategy,
        )
        loss = loss + out.square().sum()
        found.append(relative_error(out, want[:, at]))
        leaves += [(leaf, gradient[:, at]) for leaf, gradient in zip(own, wanted, strict=True)]
    grads = torch.autograd.grad(loss, [leaf for leaf, _ in leaves])
    pairs = zip(grads, leaves, strict=True)
    return max(*found, *(relative_error(grad, want) for grad, (_, want) in pairs))


def test_a_state_handed_on_chains_exactly(pool3: RankPool) -> None:
    """Outputs and every gradient, through the state, across calls and ranks, in float64."""
    for strategy in ("scan", "switch"):
        assert max(pool3.run(chained, strategy)) < 1e-10


def refuse(strategy: str, tokens: int) -> str:
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(N, 2))
    x = torch.zeros(1, tokens or shard.local_length, 2, 4)
    with pytest.raises((StrategyError, ShapeError)) as caught:
        xdist.linear_attention(x, x, x, shard, strategy=strategy)
    return str(caught.value)


def refuse_values() -> str:
    mesh = xdist.init_mesh(ring=2)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(N, 2))
    x = torch.zeros(1, shard.local_length, 2, 4)
    log_decay = torch.zeros(1, shard.local_length, 2)
    if mesh.sequence_rank == 1:
        log_decay[0, 3, 1] = 0.5
    with xdist.checks(), pytest.raises(NumericsError) as caught:
        xdist.linear_attention(x, x, x, shard, log_decay=log_decay)
    return str(caught.value)


def test_errors_are_the_same_on_every_rank_and_hold_the_numbers(pool2: RankPool) -> None:
    for message in pool2.run(refuse, "ring", 0):
        assert "no strategy 'ring'" in message
        assert "'scan', 'switch'" in message
    for message in pool2.run(refuse, "scan", 7):
        assert "the tensors have 7 tokens" in message
    for message in pool2.run(refuse_values):
        assert "sequence ranks [1]" in message


def refused_input() -> tuple[list[str], str]:
    """What wrong shapes say, and a NaN in the state that only rank 1 was given."""
    mesh = xdist.init_mesh(ring=2)
    layout = xdist.Layout.contiguous(N, 2)
    shard, packed = xdist.SequenceShard(mesh, layout), xdist.SequenceShard(mesh, layout, CUTS)
    n = shard.local_length
    q, v = torch.zeros(1, n, 2, 4), torch.zeros(1, n, 6, 3)
    state = torch.zeros(1, 6, 4, 3)
    wrong: list[tuple[Any, ...]] = [
        (q, torch.zeros(1, n, 5, 3), shard, {}),
        (q, v, shard, {"initial_state": state.mT}),
        (q, v, packed, {"initial_state": state}),
        (q, v, shard, {"log_decay": torch.zeros(1, n, 2)}),
        (q, v.bfloat16(), shard, {}),
    ]
    messages = []
    for one, values, where, options in wrong:
        with pytest.raises(ShapeError) as caught:
            xdist.linear_attention(one, one, values, where, **options)
        messages.append(str(caught.value))
    if mesh.sequence_rank == 1:
        state[0, 3, 2, 1] = float("nan")
    with xdist.checks(), pytest.raises(NumericsError) as numbers:
        xdist.linear_attention(q, q, v, shard, initial_state=state)
    return messages, str(numbers.value)


def test_heads_states_and_decays_that_do_not_fit_are_refused_alike(pool2: RankPool) -> None:
    for (heads, flipped, document, decay, dtype), not_finite in pool2.run(refused_input):
        assert "multiple of key heads" in heads
        assert "[B, H, K, V] = [1, 6, 4, 3]" in flipped
        assert "got [1, 6, 3, 4]" in flipped
        assert "[B, documents, H, K, V] = [1, 5, 6, 4, 3]" in document
        assert "log_decay must be [H], [B,n,H] or [B,n,H,K]" in decay
        assert "torch.bfloat16" in dtype
        assert "sequence ranks [1]" in not_finite
