"""Triton kernels of linear attention, in Triton's interpreter, against the float64 token loop."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import xdist
from tests.kernels.interpreted_grid import only_last_programs
from tests.kernels.triton_linear_cases import (
    SCALE,
    Drawn,
    Wanted,
    apart,
    compare,
    drawn,
    error,
    narrowed,
    starts_of,
    token_loop,
)
from xdist.errors import StrategyError
from xdist.parallel.recurrences.linear import LinearAttention
from xdist_kernels import linear
from xdist_kernels.launch import AMPERE, HOPPER
from xdist_kernels.linear import triton, triton_shapes
from xdist_kernels.linear.reference import linear_attention_reference
from xdist_kernels.linear.ssd_reference import ssd_reference

DECAYS = ("none", "scalar", "diagonal")
MODULES = tuple(
    f"xdist_kernels.linear.triton_{name}" for name in ("states", "scan", "diagonal", "gate")
)


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spans of one or two chunks, so that few tokens have several."""
    monkeypatch.setattr(triton_shapes, "LEAST_SPAN_TOKENS", 64)


def every_way(given: Drawn, cuts: tuple[int, ...], wanted: Wanted, dtype: Any) -> None:
    """Forward, states alone and backward, each from the tile as `prepare` leaves it."""
    q, k, v, log_decay, state = narrowed(given, dtype)
    dout, dend = wanted.dout.to(dtype), wanted.dend.float()
    tile = triton.prepare(q, k, v, log_decay, scale=SCALE, starts=starts_of(cuts))
    compare(triton.run(tile, state), (wanted.out, wanted.end), dtype, "run")
    compare([triton.advance(tile, state)], [wanted.end], dtype, "advance")
    grads, dstate = triton.backward(tile, state, dout, dend)
    assert (grads[3] is None) == (log_decay is None)
    compare([*grads, dstate], wanted.grads, dtype, "backward")
    compare([triton.adjoint(tile, dout, dend)], wanted.grads[4:], dtype, "adjoint")


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("packed", [False, True], ids=["one", "documents"])
@pytest.mark.usefixtures("poisoned", "short_spans")
def test_forward_and_every_gradient(decay: str, packed: bool) -> None:
    """Several spans, odd lengths and dims, shared heads, strided inputs; memory starts as NaN."""
    torch.manual_seed(0)
    n = 77
    cuts = (0, 3, 4, 32, 63, 64, 76, n) if packed else (0, n)
    given = drawn(n, decay, torch.float32)
    every_way(given, cuts, token_loop(given, cuts, torch.float32), torch.float32)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.usefixtures("poisoned")
def test_float16_of_one_span(decay: str) -> None:
    """A tile of one span takes and gives its states without sums of their own."""
    torch.manual_seed(1)
    cuts = (0, 5, 66) if decay == "scalar" else (0, 66)
    given = drawn(66, decay, torch.float16, dims=(16, 24))
    every_way(given, cuts, token_loop(given, cuts, torch.float16), torch.float16)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.usefixtures("poisoned", "short_spans")
def test_work_done_ahead_is_used(decay: str) -> None:
    """`ahead` and `backward_ahead` change nothing but when the work is done."""
    torch.manual_seed(2)
    given = drawn(70, decay, torch.float32, dims=(8, 8), heads=(1, 1))
    wanted = token_loop(given, (0, 70), torch.float32)
    *inputs, state = narrowed(given, torch.float32)
    tile = triton.prepare(*inputs, scale=SCALE)
    dout, dend = wanted.dout.float(), wanted.dend.float()
    compare(triton.run(triton.ahead(tile), state), wanted[:2], torch.float32, "ahead, run")
    early = triton.backward_ahead(tile, state, dout)
    grads, dstate = triton.backward(early, state, dout, dend)
    compare([*grads, dstate], wanted.grads, torch.float32, "ahead, backward")


@pytest.mark.slow
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("dims", [(72, 40), (1, 1), (130, 80)], ids=str)
@pytest.mark.usefixtures("poisoned", "short_spans")
def test_heads_of_any_size(decay: str, dtype: torch.dtype, dims: tuple[int, int]) -> None:
    """Head dims of one, and of more than a block of every kernel; documents; batches."""
    torch.manual_seed(3)
    n, cuts = (130, (0, 1, 100, 130)) if dims[0] < 130 else (70, (0, 70))
    given = drawn(n, decay, dtype, dims=dims, batch=2 if dims[0] == 1 else 1)
    every_way(given, cuts, token_loop(given, cuts, dtype), dtype)


@pytest.mark.parametrize("decay", ["scalar", "diagonal"])
@pytest.mark.parametrize("low", [0.0, -50.0])
def test_any_decay_is_stable(decay: str, low: float) -> None:
    """Decays of 0 and of -50 a token, in one token of three: results and gradients are right."""
    torch.manual_seed(4)
    given = drawn(70, decay, torch.float32, dims=(8, 8), heads=(1, 1))
    assert given.log_decay is not None
    given = given._replace(log_decay=low * (torch.rand_like(given.log_decay) < 0.3).double())
    wanted = token_loop(given, (0, 70), torch.float32)
    *inputs, state = narrowed(given, torch.float32)
    tile = triton.prepare(*inputs, scale=SCALE)
    out, end = triton.run(tile, state)
    grads, dstate = triton.backward(tile, state, wanted.dout.float(), wanted.dend.float())
    found = (out, end, *grads, dstate)
    for x, want in zip(found, (wanted.out, wanted.end, *wanted.grads), strict=True):
        assert x is not None
        assert want is not None
        assert error(x, want) < 1e-5


@pytest.mark.parametrize("decay", DECAYS)
def test_transition_and_advance_describe_a_tile(decay: str) -> None:
    """State after = M state + what zero becomes, M from the same sums; the adjoint uses M^T."""
    torch.manual_seed(5)
    *inputs, state = narrowed(drawn(70, decay, torch.float32, dims=(8, 6)), torch.float32)
    plain = triton.prepare(*inputs, scale=0.4)
    tile = triton.ahead(plain)
    log_m, zero = triton.transition(tile), torch.zeros_like(state)
    assert (log_m is None) == (decay == "none")
    kept = state if log_m is None else log_m.exp()[..., None] * state
    if log_m is not None:
        before = triton.transition(plain)
        assert before is not None
        assert error(log_m, before.double()) < 1e-6
    after = triton.run(tile, state)[1]
    assert error(triton.advance(tile, zero) + kept, after.double()) < 1e-6
    dout = torch.randn(inputs[2].shape)
    whole = triton.adjoint(plain, dout, state)
    assert error(triton.adjoint(plain, dout, zero) + kept, whole.double()) < 1e-6


@pytest.mark.usefixtures("poisoned")
def test_outputs_go_where_they_are_asked_for() -> None:
    """Into a view with gaps; and a gradient without strides of its own is read as it is."""
    torch.manual_seed(6)
    *inputs, state = narrowed(drawn(70, "scalar", torch.float32, dims=(8, 8)), torch.float32)
    tile = triton.prepare(*inputs, scale=SCALE)
    want, _ = triton.run(tile, state)
    room = torch.zeros(1, 70, 2, 16)
    out, _ = triton.run(tile, state, out=room[..., 4:12])
    assert torch.equal(out, want)
    assert torch.equal(room[..., 4:12], want)
    assert not room[..., :4].any()
    ones = torch.ones(())
    found, _ = triton.backward(tile, state, ones.expand(want.shape), state)
    plain, _ = triton.backward(tile, state, torch.ones(want.shape), state)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True) if a is not None)


def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Grows by the name and the programs of each kernel that would be started; none is."""
    names: list[tuple[str, int]] = []

    def written(kernel: Any, programs: int, config: Any, *, device: Any, **arguments: Any) -> None:
        names.append((kernel.__name__, programs))

    for module in MODULES:
        monkeypatch.setattr(f"{module}.launch", written)
    return names


@pytest.mark.parametrize("decay", DECAYS)
def test_passes_over_a_tile(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summaries and adjoints make no outputs; a summary made ahead is not made again; a short
    tile's outputs take one pass."""
    names = launched(monkeypatch)

    def kernels(call: Any, *args: Any) -> tuple[list[str], Any]:
        names.clear()
        found = call(*args)
        return [name for name, _ in names], found

    weigh = ["weigh_chunks"] if decay == "diagonal" else []
    for n in (64, 8192):
        x = torch.empty(1, n, 2, 64, dtype=torch.bfloat16, device="meta")
        sizes = {"scalar": 1, "diagonal": 64}
        log_decay = None
        if decay != "none":
            log_decay = torch.empty(1, n, 2, sizes[decay], device="meta")
        state = torch.empty(1, 2, 64, 64, device="meta")
        tile = triton.prepare(x, x, x, log_decay, scale=1.0)
        summary = ["sum_spans", "chain_spans"]
        assert kernels(triton.advance, tile, state)[0] == [*weigh, *summary]
        assert kernels(triton.adjoint, tile, x, state)[0] == [*weigh, *summary]
        sums = [] if n == 64 else summary
        assert kernels(triton.run, tile, state)[0] == [*weigh, *sums, "scan_spans"]
        made, ready = kernels(triton.ahead, tile)
        assert made == [*weigh, "sum_spans"]
        assert kernels(triton.run, ready, state)[0] == ["chain_spans", "scan_spans"]
        assert kernels(triton.advance, ready, state)[0] == ["chain_spans"]
        whole, _ = kernels(triton.backward, tile, state, x, state)
        assert whole.count("sum_spans") == 2
        assert whole.count("scan_spans") == (2 if decay == "diagonal" else 3)
        assert whole.count("gradients_of_keys") == (decay == "diagonal")
        assert whole.count("gate_gradients") == (decay == "scalar")


def test_one_state_is_kept_for_many_thousand_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are long on Triton kernels, and the state after one has memory of its own."""
    launched(monkeypatch)
    x = torch.empty(1, 20000, 2, 64, device="meta")
    op = LinearAttention.of((x, x, x, None), 1.0, "triton")
    assert op.tile_tokens((x, x, x, None)) == triton.TILE_TOKENS >= 16384
    state = torch.empty(1, 2, 64, 64, device="meta")
    tile = triton.prepare(x, x, x, None, scale=1.0)
    for end in (triton.run(tile, state)[1], triton.advance(tile, state)):
        assert end.untyped_storage().nbytes() == state.nbytes


@pytest.mark.parametrize("decay", DECAYS)
def test_offsets_past_2_to_the_31(decay: str) -> None:
    """q, k, v, decays, dout and where outputs go, each with its last token 2^31 elements behind its
    first: the values of plain copies."""
    torch.manual_seed(7)
    n, dim = 34, 4
    near = [torch.randn(1, n, 1, dim).half() for _ in range(5)]
    log_decay = None
    if decay != "none":
        log_decay = -torch.rand(1, n, 1, dim if decay == "diagonal" else 1)
    state = torch.randn(1, 1, dim, dim)
    distant = apart(*near), None if log_decay is None else apart(log_decay)[0]
    found = []
    for (q, k, v, dout, out), rates in (distant, (near, log_decay)):
        tile = triton.prepare(q, k, v, rates, scale=SCALE)
        _, end = triton.run(tile, state, out=out)
        grads, dstate = triton.backward(tile, state, dout, end)
        found.append([out, end, *(g for g in grads if g is not None), dstate])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("decay", DECAYS)
def test_grids_past_65535(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """70,000 heads that share their memory: the last program of every grid finds its place."""
    torch.manual_seed(8)
    heads, n, dim = 70_000, 3, 2
    q, k, v = (torch.randn(1, n, 1, dim).expand(1, n, heads, dim) for _ in range(3))
    log_decay = None
    if decay != "none":
        size = dim if decay == "diagonal" else 1
        log_decay = -torch.rand(1, n, 1, size).expand(1, n, heads, size)
    state = torch.randn(1, 1, dim, dim).expand(1, heads, dim, dim)
    one = triton.prepare(
        *(x[:, :, :1] for x in (q, k, v)),
        None if log_decay is None else log_decay[:, :, :1],
        scale=SCALE,
    )
    own = state[:, :1]
    wanted = [*triton.run(one, own), triton.advance(one, own)]
    grads, dstate = triton.backward(one, own, v[:, :, :1], own)
    grids = [grid for module in MODULES for grid in [only_last_programs(monkeypatch, module)]]
    tile = triton.prepare(q, k, v, log_decay, scale=SCALE)
    found = [*triton.run(tile, state), triton.advance(tile, state)]
    many, dmany = triton.backward(tile, state, v, state)
    assert all(programs > 65535 for grid in grids for programs in grid)
    pairs = [(found[0][:, :, -1], wanted[0][:, :, 0]), (found[1][:, -1], wanted[1][:, 0])]
    pairs += [(found[2][:, -1], wanted[2][:, 0]), (dmany[:, -1], dstate[:, 0])]
    pairs += [
        (a[:, :, -1], b[:, :, 0])
        for a, b in zip(many, grads, strict=True)
        if a is not None and b is not None
    ]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_cannot_be_served_says_why() -> None:
    """Head dims past 256 and float64, with what to do."""
    x, wide = torch.empty(1, 4, 2, 16), torch.empty(1, 4, 2, 300)
    assert linear.refusal(x, x, x, None) is None
    assert linear.refusal(x, x, wide, torch.empty(1, 4, 2, 1)) == (
        "head dims go up to 256, these are 16 and 300: use more heads, or backend='torch'"
    )
    why = linear.refusal(x.double(), x.double(), x.double(), None)
    assert why is not None
    assert "backend='torch'" in why
    with pytest.raises(StrategyError, match="head dims go up to 256"):
        xdist.linear_attention(wide, wide, wide, backend="triton")


def test_no_heads_are_no_work() -> None:
    """A rank of strategy switch may have no heads."""
    x, state = torch.zeros(2, 5, 0, 4), torch.zeros(2, 0, 4, 4)
    tile = triton.ahead(triton.prepare(x, x, x, None, scale=1.0))
    out, end = triton.run(tile, state)
    grads, dstate = triton.backward(tile, state, out, end)
    assert out.shape == x.shape
    assert end.shape == dstate.shape == triton.advance(tile, state).shape == state.shape
    assert all(g is None or g.shape == x.shape for g in grads)


@pytest.mark.usefixtures("poisoned")
def test_retention_hgrn2_and_mamba2_through_the_public_functions() -> None:
    """A fixed decay a head, HGRN-2's keys 1 - exp(log_decay), and ssd, on Triton kernels: outputs,
    final states, all gradients."""
    torch.manual_seed(9)
    n, heads, dim = 50, 2, 8
    q, k, v = (torch.randn(1, n, heads, dim, requires_grad=True) for _ in range(3))
    decay = torch.tensor([-0.02, -0.3], requires_grad=True)
    _agree(
        lambda *x: xdist.linear_attention(
            *x[:3], log_decay=x[3], output_final_state=True, backend="triton"
        ),
        linear_attention_reference,
        (q, k, v, decay),
    )
    gates = (-torch.rand(1, n, heads, dim)).requires_grad_()
    _agree(
        lambda q, v, g: xdist.linear_attention(
            q, 1 - g.exp(), v, log_decay=g, output_final_state=True, backend="triton"
        ),
        lambda q, v, g: linear_attention_reference(q, 1 - g.exp(), v, g),
        (q, v, gates),
    )
    x, B, C = (torch.randn(1, n, size, dim, requires_grad=True) for size in (heads, 1, 1))
    dt = torch.rand(1, n, heads, requires_grad=True)
    A, D = (torch.tensor([-0.5, -1.5], requires_grad=True) for _ in range(2))
    _agree(
        lambda *x: xdist.ssd(*x[:5], D=x[5], output_final_state=True, backend="triton"),
        lambda *x: ssd_reference(*x[:5], D=x[5]),
        (x, dt, A, B, C, D),
    )


def _agree(ours: Any, reference: Any, inputs: tuple[Tensor, ...]) -> None:
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, wanted = ours(*inputs), reference(*wide)
    seeds = [torch.randn(x.shape) for x in found]
    grads = torch.autograd.grad(found, inputs, seeds)
    wanted_grads = torch.autograd.grad(wanted, wide, [x.double() for x in seeds])
    for a, b in zip((*found, *grads), (*wanted, *wanted_grads), strict=True):
        # One number a head is a sum over all tokens, whose terms are of both signs.
        assert error(a, b) < (1e-5 if a.dim() == 1 else 2e-6)


def test_blocks_are_the_same_on_every_card() -> None:
    """The target decides stages alone, which change no number: what runs in the interpreter stands
    for both."""
    for dtype, first, second in itertools.product(
        (torch.float16, torch.float32), (16, 64, 128, 256), (16, 64, 128, 256)
    ):
        x = torch.empty(0, dtype=dtype)
        for blocks in (triton_shapes.sum_blocks, triton_shapes.scan_blocks):
            old, new = (blocks(first, second, x, target) for target in (AMPERE, HOPPER))
            assert old[:2] == new[:2]
            assert old.config.warps == new.config.warps


@pytest.mark.parametrize("target", [AMPERE, HOPPER], ids=["sm_80", "sm_90"])
def test_spans_fill_a_card_and_keep_few_states(target: Any) -> None:
    """Programs enough for the card where tokens suffice; else the shortest spans."""
    for rows in (1, 16, 96, 1024):
        for tokens in (1, 4096, 262_144):
            span = triton_shapes.span_tokens(tokens, rows, 2)
            programs = rows * 2 * -(-tokens // span)
            assert span % triton_shapes.CHUNK_TOKENS == 0
            assert programs >= triton_shapes.WANTED_PROGRAMS or span <= 256
    blocks = triton_shapes.scan_blocks(256, 256, torch.empty(0), target)
    assert blocks.first * blocks.second <= 8192
