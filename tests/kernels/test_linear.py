"""Chunked linear attention against the float64 token loop: output, states and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from xdist_kernels import linear
from xdist_kernels.errors import KernelError
from xdist_kernels.linear.reference import linear_attention_reference

DECAYS = ("none", "fixed", "scalar", "diagonal")
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).detach().abs().max() / b.detach().abs().max().clamp_min(1e-300))


def draw_decay(kind: str, shape: tuple[int, ...], strength: float = 0.05) -> Tensor | None:
    batch, n, heads, key_dim = shape
    sizes = {
        "fixed": (heads,),
        "scalar": (batch, n, heads),
        "diagonal": (batch, n, heads, key_dim),
    }
    if kind == "none":
        return None
    return (-strength * torch.rand(sizes[kind], dtype=torch.float64)).requires_grad_()


def draw(n: int, kind: str, dtype: torch.dtype, *, shared: int = 1) -> dict:
    batch, heads, key_dim, width = 2, 4, 8, 6
    inputs = {
        name: torch.randn(batch, n, count, dim, dtype=torch.float64).to(dtype).requires_grad_()
        for name, count, dim in (
            ("q", heads // shared, key_dim),
            ("k", heads // shared, key_dim),
            ("v", heads, width),
        )
    }
    inputs["log_decay"] = draw_decay(kind, (batch, n, heads, key_dim))
    state = torch.randn(batch, heads, key_dim, width, dtype=torch.float64)
    inputs["initial_state"] = state.requires_grad_()
    return inputs


def cut_at(n: int) -> tuple[int, ...]:
    """Documents with an empty one, single tokens, and cuts on and beside chunk borders."""
    return tuple(sorted({0, min(3, n), min(4, n), min(63, n), min(64, n), min(130, n), n}))


def run_case(n: int, kind: str, dtype: torch.dtype, shared: int, packed: bool) -> dict[str, float]:
    x = draw(n, kind, dtype, shared=shared)
    q, k, v, log_decay, state = x.values()
    cuts = cut_at(n) if packed else (0, n)
    resets = None
    if packed:
        resets = torch.zeros(n, dtype=torch.bool)
        resets[list(cuts[1:-1])] = True
    starts = torch.cat([state[:, None], torch.zeros(2, len(cuts) - 2, *state.shape[1:])], 1)
    out, finals = linear_attention_reference(
        q, k, v, log_decay, initial_state=starts, cu_seqlens=cuts
    )
    final = finals[:, -1]
    dout, dfinal = torch.randn_like(out), torch.randn_like(final)
    leaves = [y for y in x.values() if y is not None]
    loss = (out * dout).sum() + (final * dfinal).sum()
    wanted = dict(zip(x, [None] * 5, strict=True))
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    wanted.update(zip([name for name, y in x.items() if y is not None], grads, strict=True))

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        decay = None if log_decay is None else log_decay.to(wide)
        canonical = linear.canonical_decay(decay, v, q.shape[3])
        got_out, got_final, saved = linear.linear_attention_forward(
            q, k, v, canonical, scale=8**-0.5, initial_state=state, resets=resets, tile=96
        )
        dq, dk, dv, dlog, dinitial = linear.linear_attention_backward(
            saved, dout.to(dtype), dfinal.to(wide), tile=96
        )
        dlog = linear.reduce_decay_gradient(dlog, decay)
    errors = {"out": error(got_out, out), "final": error(got_final, final)}
    got = {"q": dq, "k": dk, "v": dv, "log_decay": dlog, "initial_state": dinitial}
    for name, gradient in wanted.items():
        if gradient is None:
            assert got[name] is None
        elif gradient.abs().max() > 0:
            errors[f"d{name}"] = error(got[name], gradient)
        else:
            assert got[name].abs().max() == 0, name
    return errors


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_forward_and_every_gradient(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for n, shared, packed in itertools.product((1, 5, 64, 200), (1, 2), (False, True)):
        for name, size in run_case(n, kind, dtype, shared, packed).items():
            assert size <= TOLERANCE[dtype], (n, shared, packed, name, size)


@pytest.mark.parametrize("kind", ["scalar", "diagonal"])
@pytest.mark.parametrize("low", [0.0, -50.0])
def test_any_decay_is_stable(kind: str, low: float) -> None:
    """Decays of 0 and of -50 a token, all of them or one in three: finite, and right."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 150, 2, 8) for _ in range(3))
    shape = (1, 150, 2) if kind == "scalar" else (1, 150, 2, 8)
    for keep in (1.0, 0.3):
        log_decay = low * (torch.rand(shape) < keep).float()
        want, _ = linear_attention_reference(q, k, v, log_decay)
        canonical = linear.canonical_decay(log_decay, v, 8)
        out, final, saved = linear.linear_attention_forward(q, k, v, canonical, scale=8**-0.5)
        assert error(out, want) < 1e-5
        grads = linear.linear_attention_backward(saved, torch.randn_like(out), final)
        assert all(torch.isfinite(g).all() for g in grads if g is not None)


@pytest.mark.parametrize("kind", DECAYS)
def test_pieces_complete_a_run_from_zero(kind: str) -> None:
    """run(state) = run(0) + apply_state, and the same for every adjoint, in float64."""
    torch.manual_seed(2)
    x = {name: y if y is None else y.detach() for name, y in draw(77, kind, torch.float64).items()}
    q, k, v, state = x["q"], x["k"], x["v"], x["initial_state"]
    decay = linear.canonical_decay(x["log_decay"], v, 8)
    dout, dfinal = torch.randn_like(v), torch.randn_like(state)
    out, final, saved = linear.linear_attention_forward(
        q, k, v, decay, scale=0.4, initial_state=state
    )
    whole = linear.linear_attention_backward(saved, dout, dfinal)

    local, end, saved = linear.linear_attention_forward(q, k, v, decay, scale=0.4)
    log_m, own = linear.summary(k, v, decay)
    assert error(own, end) < 1e-12
    assert error(own + linear.transition_times(log_m, state), final) < 1e-12
    linear.apply_state(local, q, decay, state, 0.4)
    assert error(local, out) < 1e-12

    dq, dk, dv, dlog, dzero = linear.linear_attention_backward(saved, dout, None)
    asked = linear.adjoint_summary(q, dout, decay, 0.4)
    assert error(asked, dzero) < 1e-12
    assert error(asked + linear.transition_times(log_m, dfinal), whole[4]) < 1e-12
    linear.apply_state_adjoint(dq, dlog, q, decay, state, dout, 0.4)
    linear.summary_adjoint(dk, dv, dlog, k, v, decay, dfinal)
    linear.transition_adjoint(dlog, log_m, state, dfinal)
    for got, want in zip((dq, dk, dv, dlog), whole, strict=False):
        assert got is None or error(got, want) < 1e-11


@pytest.mark.usefixtures("poisoned")
def test_every_element_is_written() -> None:
    """Preallocated outputs start as NaN here: a hole would show."""
    torch.manual_seed(3)
    q, k = torch.randn(3, 130, 3, 8), torch.randn(3, 130, 3, 8)
    v = torch.randn(3, 130, 9, 5)
    out, final, saved = linear.linear_attention_forward(q, k, v, None, scale=1.0, tile=64)
    grads = linear.linear_attention_backward(saved, torch.ones_like(out), final, tile=64)
    assert all(torch.isfinite(x).all() for x in (out, final, *grads) if x is not None)


@pytest.mark.parametrize("decay", [(), (8,)], ids=["scalar", "diagonal"])
def test_tiles_can_be_compiled(decay: tuple[int, ...]) -> None:
    """One graph, without a break: nothing branches on data."""
    torch.manual_seed(4)
    kernels = (linear.chunk_scalar_forward, linear.chunk_scalar_backward)
    if decay:
        kernels = (linear.chunk_diagonal_forward, linear.chunk_diagonal_backward)
    x, state = torch.randn(1, 150, 2, 8), torch.randn(1, 2, 8, 8)
    log_decay, resets = -torch.rand(1, 150, 2, *decay), torch.arange(150) % 40 == 39
    found = []
    for compiled in (False, True):
        forward, backward = (
            torch.compile(f, backend="eager", fullgraph=True) if compiled else f for f in kernels
        )
        out, end = forward(x, x, x, log_decay, 0.3, state, resets=resets)
        grads = backward(x, x, x, log_decay, 0.3, state, out, end, resets=resets)
        found.append((out, end, *grads))
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(eager, traced)


def test_memory_is_one_state_per_tile() -> None:
    """What is saved beyond the inputs is one state per 4096 tokens."""
    q = torch.randn(1, 10_000, 1, 16)
    _, _, saved = linear.linear_attention_forward(q, q, q, None, scale=1.0)
    assert saved.states.shape == (3, 1, 1, 16, 16)
    assert saved.q is q
    assert saved.k is q
    assert saved.v is q


def test_many_short_documents_cost_what_one_long_document_costs() -> None:
    """A document per 3 tokens calls as many torch ops as one document: no loop over documents."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    q = torch.randn(1, 600, 2, 8)
    counts = []
    for step in (3, 300):
        resets = torch.arange(600) % step == 0
        with Count() as count:
            out, final, saved = linear.linear_attention_forward(
                q, q, q, None, scale=1.0, resets=resets
            )
            linear.linear_attention_backward(saved, out, final)
        counts.append(count.calls)
    assert counts[0] == counts[1]


def test_bad_shapes_say_what_was_got() -> None:
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(KernelError, match=r"multiple of key heads.*\(1, 4, 3, 8\)"):
        linear.check(q, q, torch.zeros(1, 4, 3, 8), None)
    with pytest.raises(KernelError, match=r"log_decay must be .* got \(1, 4\)"):
        linear.check(q, q, q, torch.zeros(1, 4))
