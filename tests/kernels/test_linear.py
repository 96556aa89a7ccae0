"""Chunked linear attention against the float64 token loop: output, states and every gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xdist_kernels import linear
from xdist_kernels.errors import KernelError
from xdist_kernels.linear.reference import linear_attention_reference

DECAYS = ("none", "scalar", "diagonal")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2e-2}
SCALE = 8**-0.5


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-300))


def draw_decay(kind: str, shape: tuple[int, ...], strength: float = 0.05) -> Tensor | None:
    batch, n, heads, key_dim = shape
    if kind == "none":
        return None
    sizes = {"scalar": (batch, n, heads, 1), "diagonal": (batch, n, heads, key_dim)}
    # Numbers that float32 holds: they are given as such, whatever the dtype of the rest.
    return (-strength * torch.rand(sizes[kind])).double().requires_grad_()


def draw(
    n: int, kind: str, dtype: torch.dtype, shared: int = 1, batch: int = 2, heads: int = 4
) -> list[Tensor | None]:
    """q, k, v, log_decay and the state before, float64 with values that `dtype` holds."""
    key_dim, width = 8, 6
    keys, values = (batch, n, heads // shared, key_dim), (batch, n, heads, width)
    found: list[Tensor | None] = [
        torch.randn(shape).to(dtype).double().requires_grad_() for shape in (keys, keys, values)
    ]
    found.append(draw_decay(kind, (batch, n, heads, key_dim)))
    found.append(torch.randn(batch, heads, key_dim, width).double().requires_grad_())
    return found


def cut_at(n: int) -> tuple[int, ...]:
    """Single tokens, and cuts on and beside chunk borders."""
    return tuple(sorted({0, min(3, n), min(4, n), min(63, n), min(64, n), min(130, n), n}))


def token_loop(
    inputs: list[Tensor | None], cuts: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor | None]]:
    """out, the last state, random gradients of both, and the gradients of q, k, v, decay, state."""
    q, k, v, log_decay, state = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    assert state is not None
    if log_decay is not None and log_decay.shape[3] == 1 != q.shape[3]:
        log_decay = log_decay[..., 0]
    zeros = state.new_zeros(state.shape[0], len(cuts) - 2, *state.shape[1:])
    starts = torch.cat([state[:, None], zeros], 1)
    out, finals = linear_attention_reference(
        q, k, v, log_decay, initial_state=starts, cu_seqlens=cuts, scale=SCALE
    )
    final = finals[:, -1]
    dout = torch.randn_like(out).bfloat16().double()
    dfinal = torch.randn(final.shape).double()
    leaves = [x for x in inputs if x is not None]
    loss = (out * dout).sum() + (final * dfinal).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    rest = iter(grads)
    return out, final, dout, dfinal, [None if x is None else next(rest) for x in inputs]


def every_result(
    inputs: list[Tensor | None], cuts: tuple[int, ...], dout: Tensor, dfinal: Tensor, dtype: Any
) -> dict[str, list[Tensor | None]]:
    """What each way through the grammar gives: out, final; or dq, dk, dv, dlog_decay, dstate."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v, log_decay, state = (None if x is None else x.detach() for x in inputs)
    given = [x.to(dtype) for x in (q, k, v)]
    log_decay = None if log_decay is None else log_decay.to(wide)
    state, dout, dfinal = state.to(wide), dout.to(dtype), dfinal.to(wide)
    starts = None
    if len(cuts) > 2:
        starts = torch.zeros(q.shape[1], dtype=torch.bool)
        starts[list(cuts[1:-1])] = True
    tile = linear.prepare(*given, log_decay, scale=SCALE, starts=starts)
    early = linear.backward_ahead(tile, state, dout)
    grads, dstate = linear.backward(tile, state, dout, dfinal)
    later, dlater = linear.backward(early, state, dout, dfinal)
    again, dagain = linear.backward(early, state, dout, dfinal)
    assert all(a is b or torch.equal(a, b) for a, b in zip(later, again, strict=True))
    assert torch.equal(dlater, dagain)
    return {
        "run": list(linear.run(tile, state)),
        "ahead, run": list(linear.run(linear.ahead(tile), state)),
        "advance": [None, linear.advance(tile, state)],
        "backward": [*grads, dstate],
        "ahead, backward": [*later, dlater],
        "adjoint": [None, None, None, None, linear.adjoint(tile, dout, dfinal)],
    }


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_forward_and_every_gradient(kind: str, dtype: torch.dtype) -> None:
    """Odd lengths, shared heads, documents, more rows than a block has; outputs start as NaN."""
    torch.manual_seed(0)
    sizes = [(n, shared, 4) for n in (1, 5, 64, 200) for shared in (1, 2)]
    for (n, shared, heads), packed in itertools.product([*sizes, (77, 3, 9)], (False, True)):
        inputs = draw(n, kind, dtype, shared, heads=heads)
        cuts = cut_at(n) if packed else (0, n)
        out, final, dout, dfinal, wanted = token_loop(inputs, cuts)
        for way, found in every_result(inputs, cuts, dout, dfinal, dtype).items():
            wants = [out, final] if len(found) == 2 else wanted
            for index, (x, want) in enumerate(zip(found, wants, strict=True)):
                if x is None or want is None:
                    assert len(found) == 2 or way == "adjoint" or (x is None and want is None)
                elif want.abs().max() == 0:
                    assert x.abs().max() == 0
                else:
                    size = error(x, want)
                    assert size <= TOLERANCE[dtype], (n, shared, packed, way, index, size)


@pytest.mark.parametrize("kind", ["scalar", "diagonal"])
@pytest.mark.parametrize("low", [0.0, -50.0])
def test_any_decay_is_stable(kind: str, low: float) -> None:
    """Decays of 0 and of -50 a token, all of them or one in three: finite, and right."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 150, 2, 8) for _ in range(3))
    state = torch.randn(1, 2, 8, 8)
    for keep in (1.0, 0.3):
        log_decay = low * (torch.rand(1, 150, 2, 1 if kind == "scalar" else 8) < keep).float()
        given = log_decay[..., 0] if kind == "scalar" else log_decay
        want, last = linear_attention_reference(q, k, v, given, initial_state=state, scale=SCALE)
        tile = linear.prepare(q, k, v, log_decay, scale=SCALE)
        out, final = linear.run(tile, state)
        assert error(out, want) < 1e-5
        assert error(linear.advance(tile, state), last) < 1e-5
        grads, dstate = linear.backward(tile, state, torch.randn_like(out), final)
        assert all(torch.isfinite(g).all() for g in (*grads, dstate) if g is not None)


@pytest.mark.parametrize("kind", DECAYS)
def test_transition_and_advance_describe_a_tile(kind: str) -> None:
    """State after = M state + what zero becomes; the adjoint uses M as well."""
    torch.manual_seed(2)
    q, k, v, log_decay, state = (
        None if x is None else x.detach() for x in draw(77, kind, torch.float64)
    )
    tile = linear.prepare(q, k, v, log_decay, scale=0.4)
    log_m, zero = linear.transition(tile), torch.zeros_like(state)
    kept = state if log_m is None else log_m.exp()[..., None] * state
    assert (log_m is None) == (kind == "none")
    assert error(linear.advance(tile, zero) + kept, linear.run(tile, state)[1]) < 1e-12
    dout = torch.randn_like(v)
    down = state if log_m is None else log_m.exp()[..., None] * state
    whole = linear.adjoint(tile, dout, state)
    assert error(linear.adjoint(tile, dout, zero) + down, whole) < 1e-12


@pytest.mark.parametrize("decay", [1, 8], ids=["scalar", "diagonal"])
def test_tiles_can_be_compiled(decay: int) -> None:
    """One graph, without a break: nothing branches on data."""
    torch.manual_seed(4)
    x, state = torch.randn(1, 150, 2, 8), torch.randn(1, 2, 8, 8)
    log_decay, starts = -torch.rand(1, 150, 2, decay), torch.arange(150) % 40 == 39

    def both() -> tuple[Any, ...]:
        tile = linear.prepare(x, x, x, log_decay, scale=0.3, starts=starts)
        out, end = linear.run(tile, state)
        grads, dstate = linear.backward(tile, state, out, end)
        return out, end, *grads, dstate

    traced = torch.compile(both, backend="eager", fullgraph=True)()
    for eager, compiled in zip(both(), traced, strict=True):
        torch.testing.assert_close(eager, compiled)


class Calls(TorchDispatchMode):
    """Names of the operators called, and the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if isinstance(found, Tensor):
            self.largest = max(self.largest, found.numel())
        return found


def test_states_and_adjoints_are_computed_without_outputs() -> None:
    """`advance` and `adjoint` make no product of queries and keys, `run` after `ahead` none."""
    x, state = torch.randn(1, 256, 2, 8), torch.randn(1, 2, 8, 8)
    log_decay = -torch.rand(1, 256, 2, 1)
    tile = linear.prepare(x, x, x, log_decay, scale=0.3)
    ready, early = linear.ahead(tile), linear.backward_ahead(tile, state, x)

    def products(call: Any, *args: Any) -> int:
        with Calls() as calls:
            call(*args)
        return sum("bmm" in name for name in calls.names)

    # Two products inside chunks forward (scores, values), five backward.
    whole, after = products(linear.run, tile, state), products(linear.run, ready, state)
    assert (whole, after) == (5, 2)
    assert products(linear.advance, tile, state) == 2
    assert products(linear.adjoint, tile, x, state) == 2
    assert products(linear.backward, tile, state, x, state) == 13
    # The chain of states, dk, dv, and the sum over a chunk that is the gradient of its decays.
    assert products(linear.backward, early, state, x, state) == 4


def test_state_after_a_tile_keeps_no_other_alive() -> None:
    """The driver keeps one state a tile: each has memory of its own, without those of chunks."""
    x, state = torch.randn(1, 640, 2, 8), torch.zeros(1, 2, 8, 8)
    tile = linear.prepare(x, x, x, None, scale=1.0)
    ends = (linear.run(tile, state)[1], linear.advance(tile, state), linear.adjoint(tile, x, state))
    assert all(end.untyped_storage().nbytes() == state.nbytes for end in ends)


def test_many_short_documents_cost_what_one_long_document_costs() -> None:
    """A document per 3 tokens calls as many torch ops as one per 300: no loop over documents."""
    x, state = torch.randn(1, 600, 2, 8), torch.zeros(1, 2, 8, 8)
    counts = []
    for step in (3, 300):
        starts = torch.arange(600) % step == step - 1
        with Calls() as calls:
            tile = linear.prepare(x, x, x, None, scale=1.0, starts=starts)
            out, end = linear.run(tile, state)
            linear.backward(tile, state, out, end)
        counts.append(len(calls.names))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", DECAYS)
def test_offsets_past_2_to_the_31(kind: str) -> None:
    """Tokens whose last element lies 2^31 elements behind the first: views of pages that are
    never touched, the values of a plain copy."""
    torch.manual_seed(5)
    n, heads, dim = 70, 2, 4
    stride = 2**31 // (n - 1) + 1
    views = []
    for _ in range(3):
        memory = torch.empty(stride * (n - 1) + heads * dim, dtype=torch.bfloat16)
        view = memory.as_strided((1, n, heads, dim), (0, stride, dim, 1))
        assert (n - 1) * view.stride(1) > 2**31
        views.append(view.copy_(torch.randn(1, n, heads, dim)))
    log_decay = draw_decay(kind, (1, n, heads, dim))
    log_decay = None if log_decay is None else log_decay.detach().float()
    state = torch.randn(1, heads, dim, dim)
    found = []
    for q, k, v in (views, [x.clone(memory_format=torch.contiguous_format) for x in views]):
        tile = linear.prepare(q, k, v, log_decay, scale=SCALE)
        out, end = linear.run(tile, state)
        grads, dstate = linear.backward(tile, state, v, end)
        found.append([out, end, *(g for g in grads if g is not None), dstate])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_heads_are_no_work() -> None:
    """A rank of strategy switch may have no heads."""
    x, state = torch.zeros(2, 5, 0, 4), torch.zeros(2, 0, 4, 4)
    tile = linear.ahead(linear.prepare(x, x, x, None, scale=1.0))
    out, end = linear.run(tile, state)
    grads, dstate = linear.backward(tile, state, out, end)
    assert out.shape == x.shape
    assert end.shape == dstate.shape == linear.advance(tile, state).shape == state.shape
    assert all(g is None or g.shape == x.shape for g in grads)


def test_bad_shapes_say_what_was_got() -> None:
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(KernelError, match=r"multiple of key heads.*\(1, 4, 3, 8\)"):
        linear.check(q, q, torch.zeros(1, 4, 3, 8), None)
    with pytest.raises(KernelError, match=r"log_decay must be .* got \(1, 4\)"):
        linear.check(q, q, q, torch.zeros(1, 4))
