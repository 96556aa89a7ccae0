"""The selective scan in lock step against the float64 token loop: outputs, states, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xdist_kernels import selective_scan
from xdist_kernels.selective_scan.reference import selective_scan_reference

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}
NAMES = ("u", "delta", "A", "B", "C")


def error(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double().reshape(b.shape), b.detach()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


def draw(shape: tuple[int, int, int, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """u, delta, A, B, C and a state for (batch, tokens, channels, states): values dtype holds."""
    batch, tokens, channels, states = shape
    found = {
        "u": torch.randn(batch, tokens, channels),
        "delta": 0.1 * torch.rand(batch, tokens, channels),
        "A": -torch.rand(channels, states),
        "B": torch.randn(batch, tokens, states),
        "C": torch.randn(batch, tokens, states),
        "state": torch.randn(batch, channels, states),
    }
    return {name: x.to(dtype).double().requires_grad_() for name, x in found.items()}


def kernel_inputs(x: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    given = {name: y.detach().to(dtype) for name, y in x.items()}
    return (
        given["u"].unsqueeze(3),
        given["delta"].unsqueeze(3),
        given["A"],
        given["B"].unsqueeze(2),
        given["C"].unsqueeze(2),
    )


def starts_of(cuts: tuple[int, ...]) -> Tensor | None:
    if len(cuts) == 2:
        return None
    starts = torch.zeros(cuts[-1], dtype=torch.bool)
    starts[list(cuts[1:-1])] = True
    return starts


CASES = [
    ((1, 1, 1, 1), (0, 1)),
    ((2, 3, 4, 2), (0, 3)),
    ((2, 37, 5, 3), (0, 37)),
    ((2, 37, 40, 3), (0, 3, 4, 8, 20, 37)),
    ((1, 200, 33, 16), (0, 7, 64, 65, 200)),
    ((3, 130, 50, 4), (0, 130)),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_forward_and_every_gradient(dtype: torch.dtype) -> None:
    """Odd sizes, one token, one channel, documents cut anywhere, several blocks of channels."""
    torch.manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xdist_kernels.selective_scan.blocks.STEP_NUMBERS", 512)
        for shape, cuts in CASES:
            x = draw(shape, dtype)
            fresh = torch.zeros(shape[0], len(cuts) - 2, shape[2], shape[3])
            initial = torch.cat([x["state"].unsqueeze(1), fresh], 1)
            out, finals = selective_scan_reference(
                *(x[name] for name in NAMES), initial, cu_seqlens=cuts
            )
            dout, dfinal = torch.randn_like(out), torch.randn_like(finals[:, -1])
            loss = (out * dout).sum() + (finals[:, -1] * dfinal).sum()
            grads = torch.autograd.grad(loss, list(x.values()))

            state, given = x["state"].detach().to(wide).unsqueeze(3), kernel_inputs(x, dtype)
            upper = dout.to(dtype).unsqueeze(3), dfinal.to(wide).unsqueeze(3)
            p = selective_scan.prepare(*given, starts_of(cuts))
            got, after = selective_scan.run(p, state)
            assert got.dtype == dtype
            found = {"out": (got, out), "after": (after, finals[:, -1])}
            found["advance"] = (selective_scan.advance(p, state), finals[:, -1])
            found["adjoint"] = (selective_scan.adjoint(p, *upper), grads[-1])
            own, before = selective_scan.backward(p, state, *upper)
            found["dstate"] = (before, grads[-1])
            found.update({f"d{n}": pair for n, *pair in zip(NAMES, own, grads, strict=False)})
            for name, (a, b) in found.items():
                assert error(a, b) <= TOLERANCE[dtype], (shape, cuts, name)


def test_what_is_made_ahead_changes_nothing() -> None:
    torch.manual_seed(1)
    x = draw((2, 70, 6, 3), torch.float32)
    p = selective_scan.prepare(*kernel_inputs(x, torch.float32))
    state = x["state"].detach().float().unsqueeze(3)
    want, got = selective_scan.run(p, state), selective_scan.run(selective_scan.ahead(p), state)
    dout, dstate = torch.randn_like(want[0]), torch.randn_like(state)
    wanted = selective_scan.backward(p, state, dout, dstate)
    found = selective_scan.backward(selective_scan.backward_ahead(p, dout), state, dout, dstate)
    for a, b in zip(tree_leaves([want, wanted]), tree_leaves([got, found]), strict=True):
        assert torch.equal(a, b)


def test_the_transition_is_the_sum_of_delta() -> None:
    torch.manual_seed(2)
    x = draw((2, 70, 6, 3), torch.float64)
    p = selective_scan.prepare(*kernel_inputs(x, torch.float64))
    state = x["state"].detach().unsqueeze(3)
    log_m = selective_scan.transition(p).unsqueeze(2) * x["A"].detach()
    want = log_m.exp().unsqueeze(3) * state + selective_scan.advance(p, torch.zeros_like(state))
    assert error(selective_scan.advance(p, state), want) < 1e-13


@pytest.mark.parametrize("step", [0.0, 1e-6, 50.0, 1e4])
def test_any_step_is_stable(step: float) -> None:
    """From no decay at all to states that forget at once: nothing is divided, nothing overflows."""
    torch.manual_seed(3)
    x = draw((1, 150, 4, 3), torch.float32)
    with torch.no_grad():
        x["delta"].fill_(step)
        x["delta"][:, ::3] = 0.01
    out, _ = selective_scan_reference(*(x[name] for name in NAMES))
    grads = torch.autograd.grad(out.sum(), [x[name] for name in NAMES])
    p = selective_scan.prepare(*kernel_inputs(x, torch.float32))
    state = torch.zeros(1, 4, 3, 1)
    got, _ = selective_scan.run(p, state)
    own, _ = selective_scan.backward(p, state, torch.ones_like(got), state)
    for name, a, b in zip(("out", *NAMES), (got, *own), (out, *grads), strict=True):
        assert error(a, b) < 5e-6, name


def test_a_nan_stays_in_its_document() -> None:
    torch.manual_seed(4)
    x = draw((1, 200, 4, 3), torch.float32)
    given = kernel_inputs(x, torch.float32)
    given[0][:, 70] = torch.nan
    starts = starts_of((0, 64, 90, 200))
    state = torch.full((1, 4, 3, 1), torch.nan)
    p = selective_scan.prepare(*given, starts)
    out, after = selective_scan.run(p, state)
    wrong = out.isnan().any(3).any(2).squeeze(0)
    assert wrong[:64].all()
    assert not wrong[64:70].any()
    assert wrong[70:90].all()
    assert not wrong[90:].any()
    assert after.isfinite().all()


class Watch(TorchDispatchMode):
    """Calls, and bytes of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.largest = 0, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        sizes = [x.untyped_storage().nbytes() for x in tree_leaves(out) if torch.is_tensor(x)]
        self.largest = max([self.largest, *sizes])
        return out


def watched(shape: tuple[int, int, int, int], cuts: tuple[int, ...]) -> Watch:
    x = draw(shape, torch.float32)
    state = x["state"].detach().float().unsqueeze(3)
    given = kernel_inputs(x, torch.float32)
    with Watch() as watch:
        p = selective_scan.prepare(*given, starts_of(cuts))
        out, after = selective_scan.run(p, state)
        selective_scan.backward(p, state, out, after)
    return watch


def test_no_loop_runs_over_tokens() -> None:
    """Sixteen times the tokens of a tile are four times the calls: L steps and R borders, not T."""
    calls = [watched((1, tokens, 4, 2), (0, tokens)).calls for tokens in (64, 1024)]
    assert calls[1] < 5 * calls[0]
    assert calls[1] < 4 * 1024


def test_many_short_documents_cost_what_one_costs() -> None:
    one = watched((1, 512, 4, 2), (0, 512)).calls
    many = watched((1, 512, 4, 2), (*range(0, 512, 3), 512)).calls
    assert many < 1.5 * one


def test_nothing_of_tokens_by_channels_by_states_is_made() -> None:
    """[T, C, N] would be 64 MiB; forward and backward stay at a block of channels' share of it."""
    watch = watched((1, 4096, 256, 16), (0, 4096))
    assert watch.largest <= 65 * 65536 * 4 < 4096 * 256 * 16 * 4 // 3


def test_offsets_past_two_to_the_31() -> None:
    """Tokens some 2^31 elements apart, as views of memory that is never touched in between."""
    tokens, channels = 5, 3
    stride = 2**31 // (tokens - 1) + 1
    torch.manual_seed(5)
    x = draw((1, tokens, channels, 2), torch.float32)
    given = list(kernel_inputs(x, torch.float32))
    held = torch.empty((tokens - 1) * stride + channels, dtype=torch.bfloat16)
    view = held.as_strided((1, tokens, channels, 1), (0, stride, 1, 1))
    view.copy_(given[0])
    assert (tokens - 1) * view.stride(1) > 2**31
    given[0] = view.detach().clone()
    state = x["state"].detach().float().unsqueeze(3)
    found = []
    for u in (given[0], view):
        p = selective_scan.prepare(u, *given[1:])
        out, after = selective_scan.run(p, state)
        found.append([out, after, *tree_leaves(selective_scan.backward(p, state, out, after))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_channels_are_no_work() -> None:
    """A rank of strategy switch may have no channels."""
    x, by_state = torch.zeros(2, 5, 0, 1), torch.ones(2, 5, 1, 3)
    p = selective_scan.prepare(x, x, torch.zeros(0, 3), by_state, by_state)
    state = torch.zeros(2, 0, 3, 1)
    out, after = selective_scan.run(p, state)
    grads, before = selective_scan.backward(p, state, out, after)
    assert out.shape == grads[0].shape == x.shape
    assert after.shape == before.shape == state.shape
    assert all((grad == 0).all() for grad in grads)
