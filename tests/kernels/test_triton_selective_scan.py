"""The selective scan's Triton kernels, in the interpreter, against the float64 token loop."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from xdist_kernels import selective_scan
from xdist_kernels.selective_scan import triton
from xdist_kernels.selective_scan.reference import selective_scan_reference

# Law 1 in float32. Half precision: one rounding of the outputs and of du, the inputs are exact.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
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


def kernel_inputs(x: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    given = {name: y.detach().to(dtype) for name, y in x.items()}
    return [
        given["u"].unsqueeze(3),
        given["delta"].unsqueeze(3),
        given["A"],
        given["B"].unsqueeze(2),
        given["C"].unsqueeze(2),
    ]


def starts_of(cuts: tuple[int, ...]) -> Tensor | None:
    if len(cuts) == 2:
        return None
    starts = torch.zeros(cuts[-1], dtype=torch.bool)
    starts[list(cuts[1:-1])] = True
    return starts


def reference(
    x: dict[str, Tensor], cuts: tuple[int, ...], douts: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Outputs, final state and every gradient of the tile by the loop, float64."""
    fresh = x["state"].new_zeros(x["state"].shape[0], len(cuts) - 2, *x["state"].shape[1:])
    initial = torch.cat([x["state"].unsqueeze(1), fresh], 1)
    out, finals = selective_scan_reference(*(x[name] for name in NAMES), initial, cu_seqlens=cuts)
    found = {"out": out, "after": finals[:, -1]}
    grads = torch.autograd.grad((out, found["after"]), list(x.values()), douts)
    found = {name: y.detach() for name, y in found.items()}
    return found | {f"d{name}": grad for name, grad in zip(x, grads, strict=True)}


def sum_of_terms(
    x: dict[str, Tensor], cuts: tuple[int, ...], dout: Tensor, dafter: Tensor
) -> float:
    """The largest sum of |terms| of dA: law 1 measures tensors held whole against that, for their
    terms may cancel."""
    u, delta, A, B, C = (x[name].detach() for name in NAMES)
    each = A.expand(*u.shape[:2], *A.shape).clone().requires_grad_()
    h, loss = x["state"].detach(), torch.zeros((), dtype=torch.float64)
    for t in range(u.shape[1]):
        h = torch.zeros_like(h) if t in cuts[1:-1] else h
        step = delta[:, t, :, None]
        h = torch.exp(step * each[:, t]) * h + step * u[:, t, :, None] * B[:, t, None, :]
        loss = loss + ((h * C[:, t, None, :]).sum(-1) * dout[:, t]).sum()
    (grad,) = torch.autograd.grad(loss + (h * dafter).sum(), each)
    return float(grad.abs().sum((0, 1)).max())


# (batch, tokens, channels, states), document cuts; what the case is for.
CASES: dict[str, tuple[tuple[int, int, int, int], tuple[int, ...]]] = {
    "one of everything": ((1, 1, 1, 1), (0, 1)),
    "two rows": ((2, 3, 4, 3), (0, 3)),
    "documents within a mark's tokens": ((1, 37, 5, 2), (0, 3, 4, 8, 20, 37)),
    "two spans, documents on their borders": ((1, 70, 2, 2), (0, 7, 64, 65, 70)),
}


def check(
    shape: tuple[int, int, int, int],
    cuts: tuple[int, ...],
    dtype: torch.dtype,
    case: str,
    *,
    wide_steps: bool = False,
) -> None:
    """wide_steps: delta and A in float32 beside inputs of `dtype`, as behind a softplus."""
    x = draw(shape, dtype)
    batch, tokens, channels, states = shape
    douts = torch.randn(batch, tokens, channels), torch.randn(batch, channels, states)
    douts = douts[0].to(dtype).double(), douts[1].double()
    want = reference(x, cuts, douts)
    given, state = kernel_inputs(x, dtype), x["state"].detach().float().unsqueeze(3)
    if wide_steps:
        given[1:3] = given[1].float(), given[2].float()
    upper = douts[0].to(dtype).unsqueeze(3), douts[1].float().unsqueeze(3)
    p = triton.prepare(*given, starts_of(cuts))
    out, after = triton.run(p, state)
    grads, before = triton.backward(p, state, *upper)
    assert out.dtype == grads[0].dtype == dtype
    assert grads[1].dtype == given[1].dtype
    found = {"out": out, "after": after, "dstate": before}
    found |= {f"d{name}": grad for name, grad in zip(NAMES, grads, strict=True)}
    scales = {"dA": sum_of_terms(x, cuts, *douts)}
    for name, a in found.items():
        scale = scales.get(name, float(want[name].abs().max()))
        off = error(a, want[name]) * float(want[name].abs().max()) / max(scale, 1e-300)
        assert off <= TOLERANCE[dtype], (case, name)
    assert error(triton.advance(p, state), want["after"]) <= TOLERANCE[dtype], case
    assert error(triton.adjoint(p, *upper), want["dstate"]) <= TOLERANCE[dtype], case


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("poisoned")
def test_forward_states_and_every_gradient(case: str) -> None:
    torch.manual_seed(0)
    check(*CASES[case], torch.float32, case)


@pytest.mark.usefixtures("poisoned")
def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(1)
    check((1, 35, 3, 1), (0, 30, 35), torch.float16, "float16")
    check((1, 3, 2, 2), (0, 3), torch.float16, "float32 steps", wide_steps=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_more_shapes(dtype: torch.dtype) -> None:
    """Ten spans; 16 states; so many states that lanes share a channel; two blocks of channels."""
    torch.manual_seed(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "LEAST_SPAN_TOKENS", 16)
        check((1, 150, 2, 1), (0, 150), dtype, "ten spans")
    check((1, 20, 3, 16), (0, 1, 19, 20), dtype, "16 states")
    check((1, 3, 18, 40), (0, 2, 3), dtype, "40 states")
    check((2, 17, 70, 1), (0, 17), dtype, "two blocks of channels")


@pytest.mark.slow
def test_what_is_made_ahead_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a batch that goes through backward in pieces; and a tile's ends are made once."""
    torch.manual_seed(3)
    x = draw((2, 70, 2, 1), torch.float32)
    given, state = kernel_inputs(x, torch.float32), x["state"].detach().float().unsqueeze(3)
    p = triton.prepare(*given)
    want = triton.run(p, state)
    assert len(p.made) == 1
    got = triton.run(triton.ahead(triton.prepare(*given)), state)
    dout, dstate = torch.randn_like(want[0]), torch.randn_like(state)
    wanted = triton.backward(p, state, dout, dstate)
    marked = triton.backward_ahead(p, dout)
    assert marked.marks is not None
    found = [triton.backward(marked, state, dout, dstate)]
    monkeypatch.setattr(triton, "MARK_BYTES", 1)
    assert triton.backward_ahead(p, dout).marks is None
    found.append(triton.backward(p, state, dout, dstate))
    for a, b in zip(tree_leaves([want, wanted, wanted]), tree_leaves([got, found]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6 * float(a.abs().max()))
    for a, b in zip(tree_leaves(wanted), tree_leaves(found[0]), strict=True):
        assert torch.equal(a, b)


def test_the_transition_is_the_sum_of_delta() -> None:
    torch.manual_seed(4)
    x = draw((1, 66, 3, 2), torch.float32)
    p = triton.prepare(*kernel_inputs(x, torch.float32))
    state = x["state"].detach().float().unsqueeze(3)
    assert error(triton.transition(p), x["delta"].detach().sum(1)) < 1e-6
    log_m = triton.transition(p).unsqueeze(2) * x["A"].detach().float()
    want = log_m.exp().unsqueeze(3) * state + triton.advance(p, torch.zeros_like(state))
    assert error(triton.advance(p, state), want.double()) < 2e-6


@pytest.mark.parametrize("step", [0.0, 1e4])
def test_any_step_is_stable(step: float) -> None:
    """From no decay at all to states that forget at once: nothing is divided, nothing overflows."""
    torch.manual_seed(5)
    x = draw((1, 20, 2, 2), torch.float32)
    with torch.no_grad():
        x["delta"].fill_(step)
        x["delta"][:, ::3] = 0.01
    douts = torch.ones(1, 20, 2).double(), torch.zeros(1, 2, 2).double()
    want = reference(x, (0, 20), douts)
    p = triton.prepare(*kernel_inputs(x, torch.float32))
    state = x["state"].detach().float().unsqueeze(3)
    out, _ = triton.run(p, state)
    grads, _ = triton.backward(p, state, douts[0].float().unsqueeze(3), torch.zeros_like(state))
    for name, a in zip(("out", *(f"d{n}" for n in NAMES)), (out, *grads), strict=True):
        assert error(a, want[name]) < 5e-6, name


@pytest.mark.parametrize(
    "cuts", [(0, 17, 30, 36), pytest.param((0, 64, 90, 100), marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_nan_stays_in_its_document(cuts: tuple[int, ...]) -> None:
    """In the first row's second document; the state before the row is not a number, too."""
    torch.manual_seed(6)
    _, one, two, tokens = cuts
    x = draw((2, tokens, 2, 1), torch.float32)
    given = kernel_inputs(x, torch.float32)
    given[0][0, one + 4], given[3][0, one + 5] = torch.nan, torch.inf
    state = torch.full((2, 2, 1, 1), torch.nan)
    state[1] = 0.0
    p = triton.prepare(*given, starts_of(cuts))
    out, after = triton.run(p, state)
    dout, dstate = torch.ones_like(out), torch.ones_like(state)
    (du, *_), _ = triton.backward(p, torch.zeros_like(state), dout, dstate)
    wrong = out[0].isfinite().logical_not().any(2).any(1)
    assert wrong[:one].all()
    assert not wrong[one : one + 4].any()
    assert wrong[one + 4 : two].all()
    assert not wrong[two:].any()
    # The other row of the batch, the state behind the tile, and gradients of other documents.
    assert out[1].isfinite().all()
    assert after.isfinite().all()
    assert du[:, :one].isfinite().all()
    assert du[:, two:].isfinite().all()
    assert du[1].isfinite().all()


def test_offsets_past_two_to_the_31() -> None:
    """Tokens some 2^31 elements apart, as views of memory that is never touched in between; and
    channels that do not lie side by side, which are copied."""
    tokens, channels = 5, 3
    stride = 2**31 // (tokens - 1) + 1
    torch.manual_seed(7)
    x = draw((1, tokens, channels, 2), torch.float16)
    given, state = kernel_inputs(x, torch.float16), x["state"].detach().float().unsqueeze(3)
    held = torch.empty((tokens - 1) * stride + channels, dtype=torch.float16)
    far = held.as_strided((1, tokens, channels, 1), (0, stride, 1, 1))
    assert (tokens - 1) * far.stride(1) > 2**31
    apart = given[0].transpose(1, 2).contiguous().transpose(1, 2)
    assert apart.stride(2) > 1
    found = []
    for view in (given[0], far, apart):
        view.copy_(given[0].clone())
        p = triton.prepare(view, *given[1:])
        out, after = triton.run(p, state)
        far.copy_(out.clone()) if view is far else None
        dout = far if view is far else out
        if view is far:
            p = triton.prepare(given[0], *given[1:])
        found.append([out, after, *tree_leaves(triton.backward(p, state, dout, after))])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_no_channels_are_no_work() -> None:
    """A rank of strategy switch may have no channels."""
    x, by_state = torch.zeros(2, 5, 0, 1), torch.ones(2, 5, 1, 3)
    p = triton.prepare(x, x, torch.zeros(0, 3), by_state, by_state)
    state = torch.zeros(2, 0, 3, 1)
    out, after = triton.run(p, state)
    grads, before = triton.backward(p, state, out, after)
    assert out.shape == grads[0].shape == x.shape
    assert after.shape == before.shape == state.shape
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.usefixtures("last_program")
def test_grids_past_65535() -> None:
    """The last of 70,000 programs, more than a second grid dim could hold."""
    torch.manual_seed(8)
    rows = 70_000
    x = draw((1, 2, 1, 1), torch.float32)
    douts = torch.randn(1, 2, 1).double(), torch.randn(1, 1, 1).double()
    want = reference(x, (0, 2), douts)

    def many(y: Tensor) -> Tensor:
        return y.expand(rows, *y.shape[1:])

    u, delta, A, B, C = kernel_inputs(x, torch.float32)
    p = triton.prepare(many(u), many(delta), A, many(B), many(C))
    state = many(x["state"].detach().float().unsqueeze(3))
    upper = [many(y.float().unsqueeze(3)) for y in douts]
    out, after = triton.run(p, state)
    (du, ddelta, _, dB, dC), before = triton.backward(p, state, *upper)
    found = {"out": out, "after": after, "du": du, "ddelta": ddelta, "dB": dB, "dC": dC}
    for name, a in (found | {"dstate": before}).items():
        assert a.shape[0] == rows
        assert error(a[-1:], want[name]) < 2e-6, name


def test_few_channels_fill_the_card_and_many_walk_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is cut into spans just where channels and batch leave the card empty."""
    started: list[tuple[str, int, bool]] = []

    def note(kernel: Any, programs: int, *_: Any, **arguments: Any) -> None:
        started.append((kernel.fn.__name__, programs, arguments.get("p_out") is not None))

    monkeypatch.setattr(triton, "launch", note)

    def walks(batch: int, tokens: int, channels: int) -> list[tuple[str, int, bool]]:
        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float16, device="meta")

        started.clear()
        by_token, by_state = new(batch, tokens, channels, 1), new(batch, tokens, 1, 16)
        p = triton.prepare(by_token, by_token, new(channels, 16), by_state, by_state)
        triton.run(p, torch.empty(batch, channels, 16, 1, device="meta"))
        return list(started)

    spans = 8192 // triton.LEAST_SPAN_TOKENS
    few = walks(1, 8192, 64)
    assert few == [("walk", 2 * spans, False), ("fold", 2 * 16, False), ("walk", 2 * spans, True)]
    assert walks(64, 2048, 5120) == [("walk", 64 * 160, True)]


_COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from xdist_kernels.launch import HOPPER, recording
from xdist_kernels.selective_scan import triton_cases
with recording(HOPPER) as launches:
    dict(triton_cases.cases())["bf16 delta fp32 N16"]()
walk = next(one for one in launches if dict(one.signature).get("p_out") == "*bf16")
places = {name: (i,) for i, (name, _) in enumerate(walk.signature)}
source = ASTSource(
    walk.kernel, dict(walk.signature), {places[name]: value for name, value in walk.constants},
    {places[name]: [["tt.divisibility", 16]] for name in walk.aligned},
)
ptx = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ptx"]
print(ptx.count("shfl"), ptx.count("bar.sync"), ptx.count("ld.global.v4") >= 2 * 4 * 8)
"""


@pytest.mark.slow
def test_states_stay_in_the_registers_of_their_thread() -> None:
    """The code for sm_90 exchanges nothing between threads, and loads B and C 16 bytes at a time:
    the compiler could as well spread a channel's states over lanes, three times slower."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", _COMPILE]
    made = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=250, check=False
    )
    assert made.stdout.split() == ["0", "0", "True"], made.stderr[-2000:]


def test_refusals_say_what_to_do() -> None:
    def why(states: int = 2, dtype: torch.dtype = torch.float32) -> str | None:
        x, by_state = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, states)
        return selective_scan.refusal(x, x.to(dtype), torch.zeros(1, states), by_state, by_state)

    assert why() is None
    for found in (why(dtype=torch.float64), why(states=257)):
        assert found is not None
        assert "use backend='torch'" in found
