"""The chunked delta rule against the float64 token loop: outputs, states, transition, adjoint,
every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from xdist_kernels import delta
from xdist_kernels.delta.inverse import unit_inverse
from xdist_kernels.delta.reference import delta_rule_reference
from xdist_kernels.errors import KernelError

DECAYS = ("none", "scalar", "diagonal")
RANK = 4


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-300))


def low_rank_keys(batch: int, n: int, heads: int, key_dim: int) -> Tensor:
    """Unit keys of one space of RANK dims a head: what is written is met again."""
    space = torch.randn(batch, 1, heads, RANK, key_dim, dtype=torch.float64)
    at = torch.randn(batch, n, heads, 1, RANK, dtype=torch.float64)
    return normalize((at @ space).squeeze(3), dim=-1)


def draw(
    n: int, kind: str, *, shared: int = 1, beta: tuple[float, float] = (0.05, 0.2), width: int = 6
) -> dict[str, Tensor | None]:
    """Inputs of one tile in float64, with gates near 1."""
    batch, heads, key_dim = 2, 4, 16
    sizes = {"scalar": (batch, n, heads), "diagonal": (batch, n, heads, key_dim)}
    low, high = beta
    decay = None
    if kind != "none":
        decay = -0.02 * torch.rand(sizes[kind], dtype=torch.float64)
    return {
        "q": torch.randn(batch, n, heads // shared, key_dim, dtype=torch.float64),
        "k": low_rank_keys(batch, n, heads // shared, key_dim),
        "v": torch.randn(batch, n, heads, width, dtype=torch.float64),
        "beta": low + (high - low) * torch.rand(batch, n, heads, dtype=torch.float64),
        "log_decay": decay,
        "state": torch.randn(batch, heads, key_dim, width, dtype=torch.float64),
    }


def cut_at(n: int) -> tuple[int, ...]:
    """Documents with single tokens, and cuts on and beside chunk borders."""
    return tuple(sorted({0, min(3, n), min(4, n), min(63, n), min(64, n), min(130, n), n}))


def marks(cuts: tuple[int, ...]) -> Tensor:
    starts = torch.zeros(cuts[-1], dtype=torch.bool)
    starts[list(cuts[1:-1])] = True
    return starts


def wanted(x: dict[str, Tensor | None], cuts: tuple[int, ...], seed: int = 5) -> dict[str, Tensor]:
    """Results and gradients of the token loop for drawn dout and dstate."""
    leaves = {name: y.clone().requires_grad_() for name, y in x.items() if y is not None}
    given = dict(leaves)
    state = given.pop("state")
    rest = torch.zeros(state.shape[0], len(cuts) - 2, *state.shape[1:])
    out, finals = delta_rule_reference(
        **given, initial_state=torch.cat([state[:, None], rest], 1), cu_seqlens=cuts
    )
    torch.manual_seed(seed)
    dout, dstate = torch.randn_like(out), torch.randn_like(state)
    loss = (out * dout).sum() + (finals[:, -1] * dstate).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {"out": out, "end": finals[:, -1], "dout": dout, "dstate": dstate}
    found.update({f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)})
    return {name: y.detach() for name, y in found.items()}


def chunked(
    x: dict[str, Tensor | None],
    want: dict[str, Tensor],
    dtype: torch.dtype,
    starts: Tensor | None = None,
    **options: int,
) -> dict[str, Tensor]:
    """The same results from the kernel in `dtype`."""
    own = {name: y if y is None else y.to(dtype) for name, y in x.items()}
    state = own.pop("state")
    assert state is not None
    dout, dstate = want["dout"].to(dtype), want["dstate"].to(dtype)
    tile = delta.prepare(**own, scale=16**-0.5, starts=starts, **options)
    found = {"advance": delta.advance(tile, state), "adjoint": delta.adjoint(tile, dout, dstate)}
    found["out"], found["end"] = delta.run(tile, state)
    found["out ahead"], found["end ahead"] = delta.run(delta.ahead(tile), state)
    grads, found["d_state"] = delta.backward(tile, state, dout, dstate)
    _, found["d_state ahead"] = delta.backward(
        delta.backward_ahead(tile, state, dout), state, dout, dstate
    )
    found.update({f"d_{n}": y for n, y in grads._asdict().items() if y is not None})
    if starts is None:
        found["end by M"] = delta.transition(tile) @ state + delta.advance(tile, 0 * state)
    return found


def names(name: str) -> str:
    """The token loop's name of a result."""
    alias = {"advance": "end", "end by M": "end", "adjoint": "d_state"}
    return alias.get(name, name.removesuffix(" ahead"))


def errors(x: dict, cuts: tuple[int, ...], dtype: torch.dtype, **options: int) -> dict[str, float]:
    want = wanted(x, cuts)
    found = chunked(x, want, dtype, marks(cuts) if len(cuts) > 2 else None, **options)
    return {
        name: error(y, want[names(name)])
        if want[names(name)].abs().max() > 0
        else float(y.abs().max())
        for name, y in found.items()
    }


@pytest.mark.parametrize("kind", DECAYS)
def test_forward_transition_adjoint_and_every_gradient(kind: str) -> None:
    """float64 to 1e-10, for odd lengths, shared key heads, documents, and small and large beta."""
    torch.manual_seed(0)
    cases = itertools.product((1, 5, 64, 150), (False, True), ((0.05, 0.2), (0.0, 2.0)))
    for turn, (n, packed, beta) in enumerate(cases):
        shared = 1 + (turn + turn // 2) % 2
        cuts = cut_at(n) if packed else (0, n)
        found = errors(draw(n, kind, shared=shared, beta=beta), cuts, torch.float64)
        assert len(found) >= 11
        for name, size in found.items():
            assert size <= 1e-10, (n, shared, packed, beta, name, size)


@pytest.mark.parametrize("kind", DECAYS)
def test_chunk_sizes_agree(kind: str) -> None:
    torch.manual_seed(1)
    x = draw(150, kind, width=33)
    for chunk in (1, 2, 16, 32, 128):
        for name, size in errors(x, (0, 77, 150), torch.float64, chunk=chunk).items():
            assert size <= 1e-10, (chunk, name, size)


def test_blocks_of_rows_agree() -> None:
    """Rows one by one, a shared key head's two at a time, one batch entry at a time, all."""
    torch.manual_seed(1)
    x = draw(70, "scalar", shared=2)
    for rows in (1, 3, 4, 8):
        for name, size in errors(x, (0, 33, 70), torch.float64, elements=rows * 70 * 16).items():
            assert size <= 1e-10, (rows, name, size)


def test_no_rows() -> None:
    """A rank that was given no heads by strategy switch gets results of their shapes."""
    x = torch.zeros(1, 70, 0, 3)
    state = torch.zeros(1, 0, 3, 3)
    tile = delta.prepare(x, x, x, x[..., 0], None, 1.0)
    out, end = delta.run(delta.ahead(tile), state)
    grads, before = delta.backward(tile, state, out, end)
    assert out.shape == grads.q.shape == x.shape
    assert end.shape == before.shape == delta.transition(tile).shape == state.shape


@pytest.mark.parametrize("kind", DECAYS)
def test_float32_is_near_the_best_possible(kind: str) -> None:
    """Against the token loop on the same rounded inputs: medians over five seeds stay within
    twice those of a token loop that itself runs in float32, and within 2e-6."""
    sizes: dict[str, list[tuple[float, float]]] = {}
    for seed in range(5):
        torch.manual_seed(seed)
        x = draw(130, kind)
        x = {name: y if y is None else y.float().double() for name, y in x.items()}
        want = wanted(x, (0, 130))
        best = _float32_loop(x, want)
        for name, y in chunked(x, want, torch.float32).items():
            key = names(name)
            pair = (error(y, want[key]), error(best[key], want[key]))
            sizes.setdefault(name, []).append(pair)
    for name, pairs in sizes.items():
        own, best = (sorted(column)[2] for column in zip(*pairs, strict=True))
        assert own <= max(2 * best, 2e-6), (name, own, best)


def _float32_loop(x: dict[str, Tensor | None], want: dict[str, Tensor]) -> dict[str, Tensor]:
    """The definition in float32, gradients by autograd."""
    leaves = {n: y.float().requires_grad_() for n, y in x.items() if y is not None}
    q, k, v, beta, state = (leaves[name] for name in ("q", "k", "v", "beta", "state"))
    decay = leaves.get("log_decay")
    factors = None if decay is None else decay.exp()
    if factors is not None and factors.dim() == 3:
        factors = factors[..., None]
    now, outs = state, []
    for t in range(q.shape[1]):
        now = now if factors is None else factors[:, t, ..., None] * now
        lacks = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], now)
        now = now + k[:, t, ..., None] * (beta[:, t, :, None] * lacks)[..., None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], now) * 16**-0.5)
    out = torch.stack(outs, 1)
    loss = (out * want["dout"].float()).sum() + (now * want["dstate"].float()).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out, "end": now, **found}


@pytest.mark.parametrize("kind", ["scalar", "diagonal"])
@pytest.mark.parametrize("low", [-50.0, -1e4])
def test_strong_decays_are_exact(kind: str, low: float) -> None:
    """All tokens, or one in three beside gates near 1: nothing overflows and no digit is lost."""
    torch.manual_seed(2)
    x = draw(150, kind)
    weak = x["log_decay"]
    assert weak is not None
    for share in (1.0, 0.3):
        x["log_decay"] = torch.where(torch.rand(weak.shape) < share, low, weak).float().double()
        for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 3e-6)):
            want = wanted(x, (0, 150))
            for name, y in chunked(x, want, dtype).items():
                right = want[names(name)]
                # Where every token forgets, decays' gradients are differences of large sums
                # that cancel: measured against those, which are of order 1 here.
                size = error(y, right) * min(1.0, float(right.abs().max()))
                assert size <= bound, (share, dtype, name, size)


def test_transition_matters_for_keys_of_low_rank_and_dies_for_random_ones() -> None:
    """What tests of many ranks rely on: with low rank and small beta M stays large."""
    torch.manual_seed(3)
    x = draw(300, "none")
    x.pop("state")
    low = delta.transition(delta.prepare(**x, scale=1.0))
    x["k"] = normalize(torch.randn(2, 300, 4, 16, dtype=torch.float64), dim=-1)
    x["beta"] = torch.ones_like(x["beta"])
    full = delta.transition(delta.prepare(**x, scale=1.0))
    assert low.norm(dim=(-1, -2)).min() > 0.5
    assert full.norm(dim=(-1, -2)).max() < 1e-3


def test_unit_inverse() -> None:
    torch.manual_seed(4)
    for side in (1, 2, 8, 16, 32, 128):
        x = torch.randn(3, side, side, dtype=torch.float64).tril(-1) / side**0.5
        product = unit_inverse(x) @ (x + torch.eye(side))
        assert (product - torch.eye(side)).abs().max() < 1e-10


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", DECAYS)
def test_every_element_is_written(kind: str) -> None:
    """Preallocated results start as NaN here: a hole would show."""
    torch.manual_seed(6)
    x = draw(130, kind)
    found = chunked(x, wanted(x, (0, 130)), torch.float32)
    assert all(torch.isfinite(y).all() for y in found.values())


def test_many_short_documents_cost_what_one_long_document_costs() -> None:
    """A document per 3 tokens calls as many torch ops as two documents: no loop over them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    x = draw(300, "scalar")
    want = wanted(x, (0, 300))
    counts = []
    for step in (3, 150):
        with Count() as count:
            chunked(x, want, torch.float32, torch.arange(300) % step == step - 1)
        counts.append(count.calls)
    assert counts[0] == counts[1]


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    torch.manual_seed(7)
    x = {n: y if y is None else y.bfloat16().double() for n, y in draw(200, "scalar").items()}
    want = wanted(x, (0, 200))
    state = x.pop("state")
    own = {n: y if y is None else y.bfloat16() for n, y in x.items()}
    own["log_decay"] = x["log_decay"].float()
    tile = delta.prepare(**own, scale=16**-0.5)
    out, end = delta.run(tile, state.float())
    assert out.dtype == torch.bfloat16
    assert end.dtype == torch.float32
    assert error(end, want["end"]) < 2e-6
    assert error(out, want["out"]) < 4e-3  # rounded once
    grads, _ = delta.backward(tile, state.float(), want["dout"].float(), want["dstate"].float())
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert error(grads.k, want["d_k"]) < 3e-6


def test_results_hold_nothing_but_themselves() -> None:
    """A state that is kept for backward must not keep the states of every chunk alive."""
    x = draw(300, "scalar")
    want = wanted(x, (0, 300))
    found = chunked(x, want, torch.float64)
    for name in ("advance", "end", "end ahead", "adjoint", "d_state"):
        assert found[name].untyped_storage().nbytes() == found[name].nbytes, name


@pytest.mark.parametrize("kind", DECAYS)
def test_offsets_past_2_to_the_31(kind: str) -> None:
    """Tokens whose last element lies 2^31 elements behind the first: views of pages that are
    never touched give the bits of a plain copy."""
    torch.manual_seed(8)
    n, heads, dim = 70, 2, 4
    stride = 2**31 // (n - 1) + 1
    views = []
    for width in (dim, dim, dim, 1):
        memory = torch.empty(stride * (n - 1) + heads * width, dtype=torch.bfloat16)
        view = memory.as_strided((1, n, heads, width), (0, stride, width, 1))
        assert (n - 1) * view.stride(1) > 2**31
        views.append(view.copy_(torch.rand(1, n, heads, width)))
    sizes = {"none": None, "scalar": (1, n, heads), "diagonal": (1, n, heads, dim)}
    shape = sizes[kind]
    log_decay = None if shape is None else -0.1 * torch.rand(shape)
    state = torch.randn(1, heads, dim, dim)
    found = []
    for q, k, v, beta in (views, [x.clone(memory_format=torch.contiguous_format) for x in views]):
        tile = delta.prepare(q, k, v, beta.squeeze(-1), log_decay, 0.3)
        out, end = delta.run(tile, state)
        grads, before = delta.backward(tile, state, v, end)
        found.append([out, end, before, *(g for g in grads if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bad_shapes_say_what_was_got() -> None:
    q, v = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 4, 8)
    with pytest.raises(KernelError, match=r"beta must be \[B,n,H\] = \[1, 4, 4\].*\[1, 4, 2\]"):
        delta.check(q, q, v, torch.zeros(1, 4, 2), None)
    with pytest.raises(KernelError, match=r"floating; got .* torch.int64"):
        delta.check(q, q, v, torch.zeros(1, 4, 4, dtype=torch.int64), None)
    with pytest.raises(KernelError, match=r"multiple of key heads"):
        delta.check(q, q, torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3), None)
