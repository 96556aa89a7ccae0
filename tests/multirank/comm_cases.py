"""Cases of the moves that run on every rank: each against what one device would do.

Every rank draws the same global data, so it knows what each move must give it, forward and
backward, without asking. Bytes are asserted three ways: ledger, dispatch mode, formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import xdist
from xdist import comm
from xdist.comm.switch import Switch
from xdist.cost import moves as cost
from xdist.layout import Layout, even_sizes
from xdist.mesh import Mesh
from xdist.testing import count_c10d_bytes, layouts

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@contextmanager
def bytes_are(expected: cost.Moved, move: str | None, where: str) -> Iterator[None]:
    """Inside, ledger, dispatch mode and formula must agree."""
    with comm.ledger() as moved, count_c10d_bytes() as counted:
        yield
    ledger = (moved.sent_bytes, moved.received_bytes)
    assert ledger == (counted.sent_bytes, counted.received_bytes), f"{where}: dispatch {counted}"
    assert ledger == tuple(expected), f"{where}: ledger {ledger}, formula {expected}"
    assert moved.control_bytes == 0
    assert set(moved.by_move) <= {move}, where


def close(got: Tensor, want: Tensor, where: str) -> None:
    assert got.shape == want.shape, f"{where}: {got.shape} {want.shape}"
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[got.dtype]
    torch.testing.assert_close(
        got.double(), want.double(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{where}: {m}"
    )


def exact(got: Tensor, want: Tensor, where: str) -> None:
    assert torch.equal(got, want), where


def mesh_of(parts: int) -> Mesh:
    return xdist.init_mesh(ring=parts, device="cpu")


def share(x: Tensor, sizes: list[int], rank: int, dim: int) -> Tensor:
    return x.split(sizes, dim)[rank]


def share_cases(parts: int) -> list[list[int]]:
    """Even, uneven (tensor_split), very uneven and empty shares."""
    return [
        [2] * parts,
        even_sizes(2 * parts + 1, parts),
        [r + 1 for r in range(parts)],
        [0] * (parts - 1) + [3],
        [3] + [0] * (parts - 1),
        [0] * parts,
    ]


def switch_case(parts: int) -> None:
    mesh = mesh_of(parts)
    me, group = mesh.sequence_rank, mesh.sequence_group
    shares = share_cases(parts)
    for i, a in enumerate(shares):
        for j, b in enumerate(shares):
            dims = ((1, 2), (2, 0), (0, 2))[(i + j) % 3]
            _one_switch(me, group, DTYPES[(i + 2 * j) % 3], a, b, dims)


def _one_switch(me: int, group: object, dtype: torch.dtype, a: list, b: list, dims: tuple) -> None:
    here, there = dims
    shape = [3, 3, 3]
    shape[here], shape[there] = sum(a), sum(b)
    whole = draw(*shape, seed=1, dtype=dtype)
    upstream = draw(*shape, seed=2, dtype=dtype)
    x = share(whole, a, me, here).clone().requires_grad_()
    where = f"switch {dims} {a} {b} {dtype}"
    with bytes_are(cost.switch_bytes(a, b, me, 3, dtype.itemsize), "switch", where):
        y = comm.switch(x, group, from_dim=here, to_dim=there, from_sizes=a, to_sizes=b)
    exact(y, share(whole, b, me, there), where)
    with bytes_are(cost.switch_bytes(b, a, me, 3, dtype.itemsize), "switch", where):
        y.backward(share(upstream, b, me, there))
    assert x.grad is not None
    exact(x.grad, share(upstream, a, me, here), where)


def switch_many_case(parts: int) -> None:
    """Tensors of several dtypes in one exchange: one call, the same bytes as one by one."""
    mesh = mesh_of(parts)
    me, group = mesh.sequence_rank, mesh.sequence_group
    a, b = even_sizes(2 * parts + 1, parts), even_sizes(parts + 2, parts)
    wholes = [draw(2, sum(a), sum(b), seed=i, dtype=d) for i, d in enumerate(DTYPES)]
    plan = Switch(1, 2, tuple(a), tuple(b))
    expected = cost.Moved()
    for dtype in DTYPES:
        expected += cost.switch_bytes(a, b, me, 2, dtype.itemsize)
    with bytes_are(expected, "switch", "many"), comm.ledger() as moved:
        mine = [share(w, a, me, 1) for w in wholes]
        found = comm.start_switch_many(mine, [plan] * 3, group).wait()
    assert moved.calls == (parts > 1)
    for y, whole in zip(found, wholes, strict=True):
        exact(y, share(whole, b, me, 2), "many")


def gather_case(parts: int) -> None:
    mesh = mesh_of(parts)
    me, group = mesh.sequence_rank, mesh.sequence_group
    for dtype in DTYPES:
        for sizes in share_cases(parts):
            for dim in (0, 1, -1):
                _one_gather(me, group, dtype, sizes, dim, parts)


def _one_gather(
    me: int, group: object, dtype: torch.dtype, sizes: list, dim: int, parts: int
) -> None:
    shape = [2, 2, 2]
    shape[dim] = sum(sizes)
    where = f"gather {sizes} {dim} {dtype}"
    whole = draw(*shape, seed=3, dtype=dtype)
    upstream = [draw(*shape, seed=10 + r, dtype=dtype) for r in range(parts)]
    x = share(whole, sizes, me, dim).clone().requires_grad_()
    with bytes_are(cost.gather_bytes(sizes, me, 4, dtype.itemsize), "gather", where):
        y = comm.gather(x, group, dim=dim, sizes=sizes)
    exact(y, whole, where)
    assert y.requires_grad
    back = cost.reduce_scatter_bytes(sizes, me, 4, dtype.itemsize)
    with bytes_are(back, "gather", where):
        y.backward(upstream[me])
    total = sum(u.double() for u in upstream)
    assert x.grad is not None
    close(x.grad, share(total, sizes, me, dim).to(dtype), where)
    # The other way round: reduce-scatter forward, gather backward.
    z = upstream[me].clone().requires_grad_()
    with bytes_are(back, "gather", where):
        part = comm.reduce_scatter(z, group, dim=dim, sizes=sizes)
    close(part, share(total, sizes, me, dim).to(dtype), where)
    with bytes_are(cost.gather_bytes(sizes, me, 4, dtype.itemsize), "gather", where):
        part.backward(share(whole, sizes, me, dim))
    assert z.grad is not None
    exact(z.grad, whole, where)


def reduce_case(parts: int) -> None:
    mesh = mesh_of(parts)
    me, group = mesh.sequence_rank, mesh.sequence_group
    for dtype in DTYPES:
        for shape in ((), (1,), (2, 3), (7,), (0, 3)):
            where = f"reduce {shape} {dtype}"
            given = [draw(*shape, seed=20 + r, dtype=dtype) for r in range(parts)]
            upstream = [draw(*shape, seed=40 + r, dtype=dtype) for r in range(parts)]
            x = given[me].clone().requires_grad_()
            wide = cost.sum_itemsize(dtype.itemsize)
            expected = cost.reduce_bytes(x.numel(), parts, me, wide)
            with bytes_are(expected, "reduce", where):
                y = comm.reduce(x, group)
            close(y, torch.stack(given).double().sum(0).to(dtype), where)
            with bytes_are(expected, "reduce", where):
                y.backward(upstream[me])
            assert x.grad is not None
            close(x.grad, torch.stack(upstream).double().sum(0).to(dtype), where)
    counts = torch.tensor([2**40 + me, me])
    total = comm.start_reduce(counts, group).wait()
    assert total.tolist() == [parts * 2**40 + sum(range(parts)), sum(range(parts))]


def broadcast_case(parts: int) -> None:
    mesh = mesh_of(parts)
    me, group = mesh.sequence_rank, mesh.sequence_group
    for dtype in DTYPES:
        for root in range(parts):
            where = f"broadcast {root} {dtype}"
            given = [draw(2, 3, seed=60 + r, dtype=dtype) for r in range(parts)]
            x = given[me].clone().requires_grad_()
            there = cost.broadcast_bytes(6, parts, me, root, dtype.itemsize)
            with bytes_are(there, "reduce", where):
                y = comm.broadcast(x, group, root=root)
            exact(y, given[root], where)
            with bytes_are(
                there.back(dtype.itemsize, cost.sum_itemsize(dtype.itemsize)), "reduce", where
            ):
                y.backward(given[me])
            want = torch.stack(given).double().sum(0).to(dtype)
            assert x.grad is not None
            close(x.grad, want if me == root else torch.zeros_like(want), where)


def ring_case(parts: int) -> None:
    mesh = mesh_of(parts)
    me, group = mesh.sequence_rank, mesh.sequence_group
    everyone = range(parts)
    patterns = [
        [list(everyone)] * parts,
        [list(range(r + 1)) for r in everyone],
        [[(r + 1) % parts] for r in everyone],
        [[0] if r == parts - 1 else [] for r in everyone],
        [[] for _ in everyone],
    ]
    for dtype in DTYPES:
        for sizes in share_cases(parts):
            for needs in patterns:
                _one_ring(me, group, dtype, sizes, needs)


def _one_ring(me: int, group: object, dtype: torch.dtype, sizes: list, needs: list) -> None:
    where = f"ring {sizes} {needs} {dtype}"
    given = [draw(2, size, seed=80 + r, dtype=dtype) for r, size in enumerate(sizes)]
    upstream = {
        (user, owner): draw(2, sizes[owner], seed=100 + 10 * user + owner, dtype=dtype)
        for user, owners in enumerate(needs)
        for owner in owners
    }
    x = given[me].clone().requires_grad_()
    there = cost.ring_bytes(sizes, needs, me, 2, dtype.itemsize)
    with bytes_are(there, "ring", where):
        found = comm.blocks(x, group, dim=1, sizes=sizes, needs=needs)
    assert set(found) == {*needs[me], me}
    for owner, block in found.items():
        exact(block, given[owner], where)
    grads = [upstream.get((me, owner), torch.zeros_like(found[owner])) for owner in found]
    wide = cost.sum_itemsize(dtype.itemsize)
    with bytes_are(there.back(dtype.itemsize, wide), "ring", where):
        torch.autograd.backward(list(found.values()), grads)
    used = [g.double() for (_, owner), g in upstream.items() if owner == me]
    want = sum(used) if used else torch.zeros_like(given[me]).double()
    assert x.grad is not None
    assert isinstance(want, Tensor)
    close(x.grad, want.to(dtype), where)


def layout_cases(parts: int) -> Iterator[tuple[str, Layout]]:
    for n in (0, 1, 5, 24):
        for name, layout in layouts(n, parts, seed=n).items():
            yield f"{name} {n}", layout


def relayout_case(parts: int) -> None:
    mesh = mesh_of(parts)
    me, group = mesh.sequence_rank, mesh.sequence_group
    cases = [c for c in layout_cases(parts) if c[1].length in (5, 24)]
    for i, (first, source) in enumerate(cases):
        second, target = cases[(i * 7 + 3) % len(cases)]
        if source.length != target.length:
            target = Layout.zigzag(source.length, parts)
        dtype = DTYPES[i % 3]
        where = f"relayout {first} {second} {dtype}"
        whole = draw(2, source.length, 3, seed=i, dtype=dtype)
        upstream = draw(2, source.length, 3, seed=i + 1000, dtype=dtype)
        x = whole[:, source.positions(me)].clone().requires_grad_()
        with bytes_are(
            cost.relayout_bytes(source, target, me, 6, dtype.itemsize), "relayout", where
        ):
            y = comm.relayout(x, group, dim=1, source=source, target=target)
        exact(y, whole[:, target.positions(me)], where)
        with bytes_are(
            cost.relayout_bytes(target, source, me, 6, dtype.itemsize), "relayout", where
        ):
            y.backward(upstream[:, target.positions(me)])
        assert x.grad is not None
        exact(x.grad, upstream[:, source.positions(me)], where)


def halo_case(parts: int) -> None:
    mesh = mesh_of(parts)
    me, group = mesh.sequence_rank, mesh.sequence_group
    for number, (name, layout) in enumerate(layout_cases(parts)):
        for before, after in ((0, 0), (1, 0), (3, 0), (0, 2), (4, 5), (40, 40)):
            dtype = DTYPES[(number + before) % 3]
            _one_halo(
                me, group, parts, dtype, f"halo {name} {before} {after}", layout, before, after
            )


def _one_halo(
    me: int,
    group: object,
    parts: int,
    dtype: torch.dtype,
    where: str,
    layout: Layout,
    before: int,
    after: int,
) -> None:
    n = layout.length
    whole = draw(2, n, 3, seed=5, dtype=dtype)
    x = whole[:, layout.positions(me)].clone().requires_grad_()
    there = cost.halo_bytes(layout, me, before, after, 6, dtype.itemsize)
    with bytes_are(there, "halo", where):
        found = comm.halo(x, layout, group, dim=1, before=before, after=after)
    for one, (start, stop) in zip(found, layout.segments(me), strict=True):
        assert one[2:] == (max(0, start - before), start, stop, min(n, stop + after))
        exact(one.before, whole[:, one.before_start : start], where)
        exact(one.after, whole[:, stop : one.after_stop], where)
    # The gradient of every halo of every rank, drawn alike everywhere.
    want = torch.zeros(2, n, 3, dtype=torch.float64)
    mine = []
    for rank in range(parts):
        for number, (start, stop) in enumerate(layout.segments(rank)):
            for side, (low, high) in enumerate(
                ((max(0, start - before), start), (stop, min(n, stop + after)))
            ):
                seed = 1000 * rank + 10 * number + side
                grad = draw(2, high - low, 3, seed=seed, dtype=dtype)
                want[:, low:high] += grad.double()
                if rank == me:
                    mine.append(grad)
    if parts == 1 and not found:
        return
    outputs = [t for one in found for t in (one.before, one.after)]
    with bytes_are(there.back(dtype.itemsize, cost.sum_itemsize(dtype.itemsize)), "halo", where):
        if outputs:
            torch.autograd.backward(outputs, mine)
        else:
            pairs: list[tuple[Tensor, Tensor]] = []
            comm.start_halo_adjoint(
                pairs, x, layout, group, dim=1, before=before, after=after
            ).wait()
    if outputs:
        assert x.grad is not None
        close(x.grad, want[:, layout.positions(me)].to(dtype), where)


def scan_case(parts: int) -> None:
    mesh = mesh_of(parts)
    for name, layout in layout_cases(parts):
        n = layout.length
        for cuts in ((0, n), (0, n // 3, n // 3, n // 2, n), tuple(range(n + 1)) or (0, 0)):
            if len(cuts) < 2:
                continue
            for kind in ("none", "scalar", "diagonal", "matrix"):
                _one_scan(mesh, f"scan {name} {cuts} {kind}", layout, cuts, kind)


def _one_scan(mesh: Mesh, where: str, layout: Layout, cuts: tuple[int, ...], kind: str) -> None:
    me, group = mesh.sequence_rank, mesh.sequence_group
    K, V = 2, 3
    pieces = layout.pieces
    count = len(pieces)
    E = draw(count, 2, K, V, seed=7)
    shape = {"none": (0,), "scalar": (2,), "diagonal": (2, K), "matrix": (2, K, K)}[kind]
    M = draw(count, *shape, seed=8)
    if kind in ("scalar", "diagonal"):
        M = -M.abs()
    G = draw(count, 2, K, V, seed=9)
    e_ref, m_ref = E.clone().requires_grad_(), M.clone().requires_grad_()
    want = _folded(layout, cuts, kind, e_ref, m_ref)
    mine = [i for _, i in sorted((p.number, i) for i, p in enumerate(pieces) if p.rank == me)]
    x, m = E[mine].clone().requires_grad_(), M[mine].clone().requires_grad_()
    forward = cost.scan_bytes(layout, cuts, me, (2, K, V), kind, 8)
    backward = cost.scan_bytes(layout, cuts, me, (2, K, V), kind, 8, backward=True)
    with bytes_are(forward, "scan", where):
        found = comm.scan(
            x, None if kind == "none" else m, layout, group, transition=kind, cu_seqlens=cuts
        )
    assert found.requires_grad
    close(found, want[mine], where)
    with bytes_are(backward, "scan", where):
        found.backward(G[mine])
    want.backward(G)
    assert x.grad is not None
    assert e_ref.grad is not None
    close(x.grad, e_ref.grad[mine], f"{where} dE")
    if kind != "none":
        assert m.grad is not None
        assert m_ref.grad is not None
        close(m.grad, m_ref.grad[mine], f"{where} dM")


def _folded(layout: Layout, cuts: tuple, kind: str, E: Tensor, M: Tensor) -> Tensor:
    """The states entering each segment in position order, by the definition."""
    state = torch.zeros_like(E[:1].sum(0))
    # Attached even where nothing is folded.
    entering = [state + 0 * E.sum() + 0 * M.sum()] * 0
    for i, piece in enumerate(layout.pieces):
        fresh = piece.start in cuts
        state_in = torch.zeros_like(state) if fresh else state
        entering.append(state_in + 0 * E.sum() + 0 * M.sum())
        if any(piece.start < cut < piece.stop for cut in cuts):
            state = E[i]
            continue
        through = {
            "none": lambda i=i, s=state_in: s,
            "scalar": lambda i=i, s=state_in: M[i].exp()[:, None, None] * s,
            "diagonal": lambda i=i, s=state_in: M[i].exp()[..., None] * s,
            "matrix": lambda i=i, s=state_in: M[i] @ s,
        }[kind]()
        state = E[i] + through
    return torch.stack(entering) if entering else E * 1.0 + 0 * M.sum()


CASES: dict[str, Callable[[int], None]] = {
    "switch": switch_case,
    "switch_many": switch_many_case,
    "gather": gather_case,
    "reduce": reduce_case,
    "broadcast": broadcast_case,
    "ring": ring_case,
    "relayout": relayout_case,
    "halo": halo_case,
    "scan": scan_case,
}


def run_case(name: str, parts: int) -> bool:
    CASES[name](parts)
    return True
