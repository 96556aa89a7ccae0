"""Cases of the scan move's algorithms that run on every rank, against a dense fold in float64.

Every rank draws the same summaries, so it knows the entering states and all gradients of the whole
sequence. Bytes are asserted three ways: ledger, dispatch mode, formula.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tests.multirank.comm_cases import bytes_are, close, draw, mesh_of
from xdist import comm
from xdist.comm.keep import recording, replaying
from xdist.comm.recorder import RECORDER
from xdist.comm.scan import Scan, Transition, scan, start_adjoint_together, start_together
from xdist.cost import moves
from xdist.cost.scan import choose_algorithm, scan_bytes
from xdist.documents import Documents
from xdist.errors import XdistError
from xdist.layout import Layout
from xdist.mesh import Mesh
from xdist.testing import count_c10d_bytes, layouts

KINDS: tuple[Transition, ...] = ("none", "scalar", "diagonal", "matrix", "logsumexp")
K, V = 2, 3


def algorithms_of(kind: str) -> tuple[str, ...]:
    return ("gather", "chain") if kind == "logsumexp" else ("gather", "chain", "pipelined")


def cuts_of(n: int) -> list[tuple[int, ...]]:
    """One document; several with an empty one; one for each token."""
    return [(0, n), (0, n // 3, n // 3, n // 2, n), tuple(range(n + 1))]


def summaries(kind: str, count: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """States, transitions and upstream gradients of `count` segments, batch of 2."""
    if kind == "logsumexp":
        E = draw(count, 2, 1, 2 + V, seed=7)
        E[..., 0] *= 20
        E[..., 1] = E[..., 1].exp()
        # A segment without any score, in one of the two rows.
        E[1::3, 0, :, 0] = -torch.inf
        E[1::3, 0, :, 1:] = 0
        return E, None, draw(count, 2, 1, 1 + V, seed=9)
    shape = {"none": None, "scalar": (2,), "diagonal": (2, K), "matrix": (2, K, K)}[kind]
    M = None if shape is None else draw(count, *shape, seed=8)
    if M is not None and kind != "matrix":
        M = -M.abs()
    return draw(count, 2, K, V, seed=7), M, draw(count, 2, K, V, seed=9)


def fold(layout: Layout, cuts: tuple[int, ...], kind: str, E: Tensor, M: Tensor | None) -> Tensor:
    """What enters each segment, by the definition. For logsumexp: (log-sum-exp, mean)."""
    held: list[int] = []  # the segments that this one sees, for log-sum-exp
    state = torch.zeros_like(E[0])
    entering = []
    for i, piece in enumerate(layout.pieces):
        if piece.start in cuts:
            held, state = [], torch.zeros_like(E[0])
        entering.append(normalised(E[held]) if kind == "logsumexp" else state)
        if any(piece.start < cut < piece.stop for cut in cuts):
            held, state = [i], E[i]
            continue
        held = [*held, i]
        if kind == "scalar":
            assert M is not None
            state = M[i].exp()[:, None, None] * state
        elif kind == "diagonal":
            assert M is not None
            state = M[i].exp()[..., None] * state
        elif kind == "matrix":
            assert M is not None
            state = M[i] @ state
        state = state + E[i]
    return torch.stack(entering)


def normalised(E: Tensor) -> Tensor:
    """(log-sum-exp, mean of values) of the states E [n, 2, 1, 2+V] together; zeros without any."""
    m, u, w = E[..., :1], E[..., 1:2], E[..., 2:]
    if not len(E):
        return E.new_zeros(*E.shape[1:-1], 1 + V)
    top = m.detach().amax(0)
    base = top.where(top > -torch.inf, 0.0)
    scale = (m - base).exp()
    total = (scale * u).sum(0)
    some = total > 0
    safe = total.where(some, 1.0)
    found = torch.cat((base + safe.log(), (scale * w).sum(0) / safe), -1)
    return found.where(some, 0.0)


def normalised_state(state: Tensor) -> Tensor:
    """The same of one packed state [..., 2+V]."""
    some = state[..., 1:2] > 0
    safe = state[..., 1:2].where(some, 1.0)
    base = state[..., :1].where(some, 0.0)
    return torch.cat((base + safe.log(), state[..., 2:] / safe), -1).where(some, 0.0)


def one_scan(
    mesh: Mesh, where: str, layout: Layout, cuts: tuple[int, ...], kind: Transition, algorithm: str
) -> None:
    """Entering states, gradients and bytes of one call against the dense fold."""
    me, group = mesh.sequence_rank, mesh.sequence_group
    pieces = layout.pieces
    E, M, G = summaries(kind, len(pieces))
    mine = [i for _, i in sorted((p.number, i) for i, p in enumerate(pieces) if p.rank == me)]
    x = E[mine].clone().requires_grad_()
    m = None if M is None else M[mine].clone().requires_grad_()
    sizes = tuple(E.shape[1:]), kind, 8
    there = scan_bytes(layout, cuts, me, *sizes, algorithm=algorithm)
    back = scan_bytes(layout, cuts, me, *sizes, algorithm=algorithm, backward=True)
    with bytes_are(there, "scan", where):
        found = scan(x, m, layout, group, transition=kind, cu_seqlens=cuts, algorithm=algorithm)
    shown = normalised_state(found) if kind == "logsumexp" else found
    with bytes_are(back, "scan", where):
        shown.backward(G[mine])
    assert x.grad is not None
    if not pieces:
        return
    want, want_dE, want_dM = reference(layout, cuts, kind)
    close(shown, want[mine], where)
    # No gradient is defined at -inf.
    held = E[mine].isfinite().all(-1, keepdim=True)
    close(x.grad.where(held, 0.0), want_dE[mine].where(held, 0.0), f"{where} dE")
    if m is not None:
        assert m.grad is not None
        assert want_dM is not None
        close(m.grad, want_dM[mine], f"{where} dM")


@lru_cache(maxsize=4)
def reference(
    layout: Layout, cuts: tuple[int, ...], kind: Transition
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Entering states of all segments, and the gradients of states and transitions."""
    E, M, G = summaries(kind, len(layout.pieces))
    E.requires_grad_()
    if M is not None:
        M.requires_grad_()
    want = fold(layout, cuts, kind, E, M)
    # Zero times a sum, so that nothing is detached.
    torch.autograd.backward(want + 0 * E[..., 1:2].sum(), G)
    assert E.grad is not None
    if M is None:
        return want.detach(), E.grad, None
    return want.detach(), E.grad, torch.zeros_like(M) if M.grad is None else M.grad


def grid(parts: int) -> bool:
    mesh = mesh_of(parts)
    for name, layout in layouts(13, parts, seed=parts).items():
        if name == "uneven":
            continue
        for cuts in cuts_of(13):
            for kind in KINDS:
                for algorithm in algorithms_of(kind):
                    where = f"{algorithm} {kind} {name} {cuts}"
                    one_scan(mesh, where, layout, cuts, kind, algorithm)
    return True


def odd_layouts(parts: int) -> Iterator[tuple[str, Layout]]:
    """Many one-token segments dealt in turn, one rank that holds all, gaps, nothing at all."""
    n = 4 * parts + 1
    dealt = [[(p, p + 1) for p in range(n) if p % parts == r] for r in range(parts)]
    yield "one token each, in turn", Layout.from_segments(n, dealt)
    backwards = [list(reversed(runs)) for runs in dealt]
    yield "the same, last first", Layout.from_segments(n, backwards)
    owners = [*range(parts), *reversed(range(parts))] * 2
    held = [[(p, p + 1) for p, owner in enumerate(owners) if owner == r] for r in range(parts)]
    yield "there and back twice", Layout.from_segments(len(owners), held)
    ends: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
    ends[0] = [(0, 1), (1, 3)]
    ends[-1] = [*(ends[-1] if parts == 1 else []), (3, 5)]
    yield "nothing between", Layout.from_segments(5, ends)
    yield "no tokens", Layout.contiguous(0, parts)


def odd(parts: int) -> bool:
    mesh = mesh_of(parts)
    for name, layout in odd_layouts(parts):
        n = layout.length
        for cuts in ((0, n), (0, n // 2, n), tuple(range(n + 1))):
            if len(cuts) < 2:
                continue
            for kind in KINDS[2:]:
                for algorithm in algorithms_of(kind):
                    where = f"{algorithm} {kind} {name} {cuts}"
                    one_scan(mesh, where, layout, cuts, kind, algorithm)
    return True


def _plain(mesh: Mesh, layout: Layout, kind: str) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """This rank's states and transitions, and a tensor like a state."""
    E, M, _ = summaries(kind, len(layout.pieces))
    numbered = sorted(
        (p.number, i) for i, p in enumerate(layout.pieces) if p.rank == mesh.sequence_rank
    )
    mine = [i for _, i in numbered]
    assert M is not None
    return list(E[mine]), list(M[mine]), torch.empty(2, K, V, dtype=torch.float64)


def any_number_of_blocks(parts: int) -> bool:
    """1 to more blocks than columns: the same states, and the same bytes in more messages."""
    mesh = mesh_of(parts)
    layout = Layout.zigzag(4 * parts, parts)
    states, transitions, like = _plain(mesh, layout, "matrix")
    args = layout, mesh.sequence_group
    want = Scan(*args, transition="matrix").start(states, transitions, like).wait()
    back = Scan(*args, transition="matrix")
    back.start(states, transitions, like).wait()
    want_back = back.start_adjoint(states, like).wait()
    for blocks in (1, 2, V, 10):
        one = Scan(*args, transition="matrix", algorithm="pipelined", blocks=blocks)
        here = mesh.sequence_rank
        bytes_ = scan_bytes(
            layout, (0, layout.length), here, (2, K, V), "matrix", 8, algorithm="pipelined"
        )
        with bytes_are(bytes_, "scan", f"{blocks} blocks"):
            found = one.start(states, transitions, like).wait()
        for got, wanted in zip(found, want, strict=True):
            close(got, wanted, f"{blocks} blocks")
        for got, wanted in zip(one.start_adjoint(states, like).wait(), want_back, strict=True):
            close(got, wanted, f"{blocks} blocks back")
    return True


def two_directions(parts: int) -> bool:
    """A scan and its mirror image in one exchange: one message a pair of ranks in each round."""
    mesh = mesh_of(parts)
    me, group = mesh.sequence_rank, mesh.sequence_group
    for name, layout in layouts(13, parts, seed=1).items():
        for cuts in cuts_of(13):
            mirror = layout.mirrored()
            assert mirror.mirrored() == layout
            other = Documents(cuts).mirrored().cu_seqlens
            states, transitions, like = _plain(mesh, layout, "diagonal")
            for algorithm in ("gather", "chain", "pipelined"):
                where = f"{algorithm} {name} {cuts}"
                pairs = [
                    Scan(
                        one, group, transition="diagonal", cu_seqlens=documents, algorithm=algorithm
                    )
                    for one, documents in ((layout, cuts), (mirror, other))
                ]
                alone = [plan.start(states, transitions, like).wait() for plan in pairs]
                alone_back = [plan.start_adjoint(states, like).wait() for plan in pairs]
                sizes = me, (2, K, V), "diagonal", 8
                for backward in (False, True):
                    expected = moves.Moved()
                    for one, documents in ((layout, cuts), (mirror, other)):
                        expected += scan_bytes(
                            one, documents, *sizes, algorithm=algorithm, backward=backward
                        )
                    with bytes_are(expected, "scan", where), comm.ledger() as moved:
                        if backward:
                            found = start_adjoint_together([(p, states, like) for p in pairs])
                        else:
                            found = start_together([(p, states, transitions, like) for p in pairs])
                        results = found.wait()
                    if algorithm == "gather":
                        assert moved.calls <= 1, where
                    for got, wanted in zip(results, alone_back if backward else alone, strict=True):
                        for a, b in zip(got, wanted, strict=True):
                            close(a, b, where)
    return True


def one_log_number_a_state(parts: int) -> bool:
    """With rates a state's transition travels as one number: Mamba-1's sum of steps."""
    mesh = mesh_of(parts)
    me, group = mesh.sequence_rank, mesh.sequence_group
    layout, cuts = Layout.zigzag(13, parts), (0, 3, 13)
    states, _, like = _plain(mesh, layout, "diagonal")
    numbers = [draw(2, seed=40 + i).abs() for i in range(len(layout.pieces))]
    numbered = sorted((p.number, i) for i, p in enumerate(layout.pieces) if p.rank == me)
    mine = [numbers[i] for _, i in numbered]
    rates = -draw(2, K, seed=50).abs()
    for algorithm in ("gather", "chain", "pipelined", "auto"):
        full = Scan(layout, group, transition="diagonal", cu_seqlens=cuts)
        short = Scan(
            layout, group, transition="diagonal", cu_seqlens=cuts, algorithm=algorithm, rates=rates
        )
        spelled = [number[:, None] * rates for number in mine]
        want = full.start(states, spelled, like).wait()
        chosen = short.choice(like).algorithm
        sizes = me, (2, K, V), "diagonal", 8
        there = scan_bytes(layout, cuts, *sizes, algorithm=chosen, rates=True)
        with bytes_are(there, "scan", algorithm):
            found = short.start(states, mine, like).wait()
        back = scan_bytes(layout, cuts, *sizes, algorithm=chosen, rates=True, backward=True)
        with bytes_are(back, "scan", algorithm):
            found_back = short.start_adjoint(states, like).wait()
        for a, b in zip(found, want, strict=True):
            close(a, b, algorithm)
        for a, b in zip(found_back, full.start_adjoint(states, like).wait(), strict=True):
            close(a, b, algorithm)
    return True


def kept_and_replayed(parts: int) -> bool:
    """A recompute takes the chain's messages from the tape, and nothing travels."""
    mesh = mesh_of(parts)
    layout = Layout.zigzag(13, parts)
    states, transitions, like = _plain(mesh, layout, "matrix")
    for algorithm in ("gather", "chain", "pipelined"):
        plan = Scan(layout, mesh.sequence_group, transition="matrix", algorithm=algorithm)
        with recording() as tape, comm.ledger() as moved:
            first = plan.start(states, transitions, like).wait()
        assert tape.nbytes == moved.received_bytes
        with replaying(tape), comm.ledger() as moved, count_c10d_bytes() as counted:
            again = plan.start(states, transitions, like).wait()
        assert (moved.sent_bytes, moved.received_bytes, counted.sent_bytes) == (0, 0, 0)
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a, b)
        # The adjoint afterwards still has its transitions.
        plan.start_adjoint(states, like).wait()
    return True


def local_work_in_between(folder: str) -> list[tuple[str, list[str], bool]]:
    """`start` returns, and local work is done, before the rank before has sent anything."""
    mesh = mesh_of(2)
    layout = Layout.contiguous(8, 2)
    states, transitions, like = _plain(mesh, layout, "matrix")
    seen = []
    for algorithm in ("gather", "chain", "pipelined"):
        marker = Path(folder) / algorithm
        order: list[str] = []
        plan = Scan(layout, mesh.sequence_group, transition="matrix", algorithm=algorithm)
        if mesh.sequence_rank == 0:
            # The other rank has started and done its work by now; nothing was sent to it.
            deadline = time.monotonic() + 60
            while not marker.exists():
                assert time.monotonic() < deadline
                time.sleep(0.002)
        pending = plan.start(states, transitions, like)
        order.append("start")
        torch.ones(8, 8) @ torch.ones(8, 8)
        order.append("local work")
        if mesh.sequence_rank == 1:
            marker.touch()
        in_flight = not RECORDER.moves()[-1].waits_s
        entering = pending.wait()
        order.append("wait")
        if mesh.sequence_rank == 1:
            close(entering[0], summaries("matrix", 2)[0][0], algorithm)
        seen.append((algorithm, order, in_flight))
    return seen


def moves_in_between() -> str:
    """Another move on the group while the middle rank's chain has a round left."""
    mesh = mesh_of(3)
    layout = Layout.contiguous(9, 3)
    states, transitions, like = _plain(mesh, layout, "matrix")
    gathering = Scan(layout, mesh.sequence_group, transition="matrix")
    pending = gathering.start(states, transitions, like)
    comm.start_reduce(torch.ones(3), mesh.sequence_group).wait()
    pending.wait()
    chain = Scan(layout, mesh.sequence_group, transition="matrix", algorithm="chain")
    pending = chain.start(states, transitions, like)
    told = ""
    if mesh.sequence_rank == 1:
        try:
            comm.start_reduce(torch.ones(3), mesh.sequence_group)
        except RuntimeError as error:
            told = str(error)
    pending.wait()
    comm.start_reduce(torch.ones(3), mesh.sequence_group).wait()
    return told


def auto_moves_what_it_says(parts: int) -> list[str]:
    """Small states gather, large ones go in blocks; bytes are those of the algorithm chosen."""
    mesh = mesh_of(parts)
    me, group = mesh.sequence_rank, mesh.sequence_group
    layout, chosen = Layout.contiguous(12, parts), []
    for heads, width in ((1, 4), (16, 128)):
        like = torch.ones(1, heads, width, width)
        states, transitions = [like], [torch.eye(width).expand(1, heads, width, width)]
        plan = Scan(layout, group, transition="matrix", algorithm="auto")
        choice = choose_algorithm(layout, (0, 12), tuple(like.shape), "matrix", 4)
        assert plan.choice(like) == choice
        sizes = layout, (0, 12), me, tuple(like.shape), "matrix", 4
        there = scan_bytes(*sizes, algorithm=choice.algorithm)
        with bytes_are(there, "scan", str(choice)):
            entering = plan.start(states, transitions, like).wait()
        assert torch.equal(entering[0], me * like)
        back = scan_bytes(*sizes, algorithm=choice.algorithm, backward=True)
        with bytes_are(back, "scan", str(choice)):
            leaving = plan.start_adjoint(states, like).wait()
        assert torch.equal(leaving[0], (parts - 1 - me) * like)
        chosen.append(choice.algorithm)
    return chosen


def refused() -> list[str]:
    """What does not fit, on one of two ranks' side each alike."""
    mesh = mesh_of(2)
    group, layout = mesh.sequence_group, Layout.contiguous(8, 2)
    like = torch.zeros(1, 1, K, V)
    one = Scan(layout, group, transition="none")
    rates = torch.zeros(1, 1, K)
    tried = (
        lambda: Scan(Layout.contiguous(8, 3), group, transition="none"),
        lambda: Scan(layout, group, transition="scalar", rates=rates),
        lambda: Scan(layout, group, transition="logsumexp", algorithm="pipelined"),
        lambda: one.start([like, like], None, like),
        lambda: start_together([(one, [like], None, like), (one, [like], None, like.double())]),
    )
    told = []
    for call in tried:
        try:
            call()
        except XdistError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told
