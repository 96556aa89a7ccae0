"""The delta rule's Triton kernels, in Triton's interpreter, against the float64 token loop:
outputs, states, transition, adjoint, every gradient. Far offsets: test_triton_delta_far.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.kernels.test_delta import DECAYS, error, low_rank_keys, marks, names
from xdist_kernels import delta
from xdist_kernels.delta import (
    triton_blocks,
    triton_cases,
    triton_gradient_launches,
    triton_launches,
)
from xdist_kernels.delta.reference import delta_rule_reference
from xdist_kernels.errors import KernelError
from xdist_kernels.launch import AMPERE, Config

triton = delta.kernels("triton")
Drawn = dict[str, Tensor | None]
SCALE = 0.3
SUMMARY = ("advance", "adjoint", "end by M")


def draw(
    n: int,
    kind: str,
    *,
    heads: int = 2,
    shared: int = 1,
    dims: tuple[int, int] = (16, 6),
    beta: tuple[float, float] = (0.05, 0.2),
    dtype: torch.dtype = torch.float32,
) -> Drawn:
    """Inputs of one tile and the gradients of its results, as `dtype` holds those of tokens and
    float32 the rest. Gates near 1, keys of low rank: what is written is met again."""
    key_dim, width = dims
    sizes = {"scalar": (1, n, heads), "diagonal": (1, n, heads, key_dim)}
    low, high = beta
    narrow = {
        "q": torch.randn(1, n, heads // shared, key_dim),
        "k": low_rank_keys(1, n, heads // shared, key_dim),
        "v": torch.randn(1, n, heads, width),
        "dout": torch.randn(1, n, heads, width),
    }
    wide = {
        "beta": low + (high - low) * torch.rand(1, n, heads),
        "log_decay": None if kind == "none" else -0.02 * torch.rand(sizes[kind]),
        "state": torch.randn(1, heads, key_dim, width),
        "dstate": torch.randn(1, heads, key_dim, width),
    }
    return {name: y.to(dtype) for name, y in narrow.items()} | wide


def by_tokens(x: Drawn, cuts: tuple[int, ...]) -> dict[str, Tensor]:
    """Results and gradients of the token loop."""
    leaves = {
        name: y.double().requires_grad_()
        for name, y in x.items()
        if y is not None and name not in ("dout", "dstate")
    }
    given = dict(leaves)
    state = given.pop("state")
    rest = torch.zeros(1, len(cuts) - 2, *state.shape[1:])
    out, finals = delta_rule_reference(
        **given, scale=SCALE, initial_state=torch.cat([state[:, None], rest], 1), cu_seqlens=cuts
    )
    loss = (out * x["dout"]).sum() + (finals[:, -1] * x["dstate"]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    found = {"out": out, "end": finals[:, -1]}
    found.update({f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)})
    return {name: y.detach() for name, y in found.items()}


def by_kernels(x: Drawn, starts: Tensor | None, **options: object) -> dict[str, Tensor]:
    """The same, with what other segments need."""
    own = dict(x)
    state, dout, dstate = own.pop("state"), own.pop("dout"), own.pop("dstate")
    assert state is not None
    tile = triton.prepare(**own, scale=SCALE, starts=starts, **options)
    found = {"advance": triton.advance(tile, state), "adjoint": triton.adjoint(tile, dout, dstate)}
    found["out"], found["end"] = triton.run(triton.ahead(tile), state)
    # Both ways to the gradients: the chains one after the other, and at once.
    ready = triton.backward_ahead(tile, state, dout) if starts is None else tile
    grads, found["d_state"] = triton.backward(ready, state, dout, dstate)
    found.update({f"d_{n}": y for n, y in grads._asdict().items() if y is not None})
    if starts is None:
        entry = triton.advance(tile, torch.zeros_like(state))
        found["end by M"] = triton.transition(tile) @ state + entry
    return found


def errors(x: Drawn, cuts: tuple[int, ...], **options: object) -> dict[str, float]:
    """max|a - b| / max|b| of each result against the token loop."""
    want = by_tokens(x, cuts)
    found = by_kernels(x, marks(cuts) if len(cuts) > 2 else None, **options)
    assert all(bool(torch.isfinite(y).all()) for y in found.values())
    assert len(found) >= 9
    return {
        name: error(y, want[names(name)])
        if want[names(name)].abs().max() > 0
        else float(y.abs().max())
        for name, y in found.items()
    }


def only_listed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict]]:
    """From now on nothing runs; the names and arguments of kernels that would."""
    started: list[tuple[str, dict]] = []

    def launch(kernel: Any, programs: int, config: Config, *, device: Any, **given: Any) -> None:
        started.append((kernel.__name__, given))

    for module in (triton_launches, triton_gradient_launches):
        monkeypatch.setattr(module, "launch", launch)
    return started


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", DECAYS)
def test_everything_equals_the_token_loop(kind: str, packed: bool) -> None:
    """float32 as near as the law asks: odd lengths and dims, several chunks, shared key heads,
    documents with single tokens and cuts on chunk borders, results that come filled with NaN."""
    torch.manual_seed(0)
    cuts = (0, 3, 4, 16, 19, 21) if packed else (0, 21)
    x = draw(21, kind, shared=2, dims=(20, 7) if packed else (16, 6))
    # The interpreter multiplies in full either way; kernels differ where tensor cores would.
    precision = "tf32x3" if packed else "ieee"
    for name, size in errors(x, cuts, chunk=16, precision=precision).items():
        assert size <= 2e-6, (name, size)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", DECAYS)
def test_blocks_of_dims_and_of_chunks(kind: str) -> None:
    """Several blocks of key and of value dims, and the inverse of more than one block of 16."""
    torch.manual_seed(1)
    x = draw(35, kind, heads=1, dims=(40, 40), beta=(0.0, 2.0))
    for name, size in errors(x, (0, 35), chunk=32).items():
        assert size <= 3e-6, (name, size)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", DECAYS)
def test_float16(kind: str) -> None:
    """Products of float16: a few roundings of 2^-11. What other segments hang on is float32."""
    torch.manual_seed(2)
    x = draw(20, kind, heads=1, dtype=torch.float16)
    for name, size in errors(x, (0, 20), chunk=16).items():
        bound = 2e-6 if name in SUMMARY else 4e-3
        assert size <= bound, (name, size)


@pytest.mark.parametrize("kind", ["scalar", "diagonal"])
@pytest.mark.parametrize("low", [-50.0, -torch.inf])
def test_strong_decays_are_exact(kind: str, low: float) -> None:
    """One token in three forgets all beside gates near 1: nothing overflows, no digit is lost."""
    torch.manual_seed(3)
    x = draw(20, kind, heads=1)
    weak = x["log_decay"]
    assert weak is not None
    strong = torch.rand(weak.shape) < 0.3
    x["log_decay"] = weak.masked_fill(strong, max(low, -3e4))  # the loop's autograd needs numbers
    want = by_tokens(x, (0, 20))
    x["log_decay"] = weak.masked_fill(strong, low)
    for name, y in by_kernels(x, None, chunk=32).items():
        right = want[names(name)]
        # exp(x) is right to |x| 2^-24: what has forgotten all is measured against what it forgot.
        size = error(y, right) * min(1.0, float(right.abs().max()))
        assert size <= 3e-6, (name, size)


def test_what_enters_a_product_is_said_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 sums: states and summaries are float32 whatever the inputs; `precision` of float32
    products reaches every kernel and may be one of two."""
    torch.manual_seed(4)
    x = draw(18, "scalar", dtype=torch.float16)
    found = by_kernels(x, None, chunk=16, precision="tf32x3")
    assert {name: y.dtype for name, y in found.items()} == {
        name: torch.float16 if name == "out" else torch.float32 for name in found
    }
    started = only_listed(monkeypatch)
    tile = triton.prepare(*(x[n] for n in ("q", "k", "v", "beta", "log_decay")), SCALE)
    for precision in triton.PRECISIONS:
        started.clear()
        triton.transition(tile._replace(precision=precision))
        triton.run(tile._replace(precision=precision), x["state"])
        triton.backward(tile._replace(precision=precision), x["state"], x["dout"], x["state"])
        assert {given["PRECISION"] for _, given in started} == {precision}
        weights = [given for _, given in started if "p_weight" in given]
        wide = [given for given in weights if given["p_weight"].dtype == torch.float32]
        assert [given.get("INVERSE", precision) for given in wide] == [precision] * 2
    with pytest.raises(KernelError, match="chunk 48 and precision 'tf32'"):
        triton.prepare(
            *(x[n] for n in ("q", "k", "v", "beta")), None, 1.0, chunk=48, precision="tf32"
        )


def test_gradients_come_wide_unless_nobody_adds_to_them() -> None:
    torch.manual_seed(5)
    for shared in (1, 2):
        x = draw(9, "scalar", shared=shared, dtype=torch.float16)
        state, dout, dstate = (x[name] for name in ("state", "dout", "dstate"))
        tile = triton.prepare(
            *(x[n] for n in ("q", "k", "v", "beta", "log_decay")), SCALE, chunk=16
        )
        wide, _ = triton.backward(tile, state, dout, dstate)
        narrow, _ = triton.backward(tile, state, dout, dstate, narrow=True)
        assert all(y.dtype == torch.float32 for y in wide)
        assert narrow.v.dtype == torch.float16
        assert narrow.q.dtype == narrow.k.dtype == (torch.float32 if shared == 2 else torch.float16)
        for a, b in zip(wide, narrow, strict=True):
            assert error(b, a.double()) <= 2e-3


def test_any_strides_of_batch_tokens_and_heads() -> None:
    """Heads before tokens, every other token, a decay and a beta that are the same for all: the
    bits of a plain copy."""
    torch.manual_seed(6)
    n, heads, dim = 9, 2, 16
    q = torch.randn(2, heads, n, dim).transpose(1, 2)
    k = normalize(torch.randn(2, 2 * n, heads, dim), dim=-1)[:, ::2]
    v = torch.randn(2, n, dim, heads).transpose(2, 3)  # the last dim is not one piece
    beta = torch.rand(heads).expand(2, n, heads)
    log_decay = -torch.rand(heads).expand(2, n, heads)
    state = torch.randn(2, heads, dim, dim).mT
    dout = torch.randn(2, heads, n, dim).transpose(1, 2)
    given = (q, k, v, beta, log_decay)
    results = []
    for x in (given, [y.contiguous() for y in given]):
        tile = triton.prepare(*x, SCALE, chunk=16)
        out = torch.empty(2, n, heads, dim)
        _, end = triton.run(tile, state, out=out)
        grads, before = triton.backward(tile, state, dout, state)
        results.append([out, end, before, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_rows() -> None:
    """A rank that was given no heads by strategy switch gets results of their shapes."""
    x, state = torch.zeros(1, 70, 0, 3), torch.zeros(1, 0, 3, 3)
    tile = triton.prepare(x, x, x, x[..., 0], None, 1.0)
    out, end = triton.run(triton.ahead(tile), state)
    grads, before = triton.backward(tile, state, out, end)
    assert out.shape == grads.q.shape == x.shape
    assert end.shape == before.shape == triton.transition(tile).shape == state.shape


def test_refusals_say_why_and_what_to_do() -> None:
    x = torch.zeros(1, 4, 2, 16)
    beta = x[..., 0]
    assert delta.refusal(x, x, x, beta, None) is None
    wide = torch.zeros(1, 4, 2, 257)
    assert "257 key dims" in str(delta.refusal(wide, wide, x, beta, None))
    assert "beta is float64" in str(delta.refusal(x, x, x, beta.double(), None))
    assert "float64" in str(delta.refusal(x, x, x.double(), beta, None))


def test_cases_start_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled ahead of time covers each kernel and kind of decay."""
    started = only_listed(monkeypatch)
    for _, call in triton_cases.cases():
        call()
    kernels = ("prepare", "forward_chain", "backward_chain", "both_chains", "writes", "keys")
    names = {f"{name}_kernel" for name in kernels}
    assert {(name, given["DECAY"]) for name, given in started} == {
        (name, kind) for name in names for kind in (0, 1, 2)
    }


@pytest.mark.usefixtures("poisoned")
@pytest.mark.slow
@pytest.mark.parametrize("kind", DECAYS)
def test_lengths_chunks_and_betas(kind: str) -> None:
    """Chunks of 64 and 128, lengths on and beside their borders, small and large beta."""
    torch.manual_seed(7)
    cases = itertools.product((1, 63, 64, 130), (False, True))
    for turn, (n, packed) in enumerate(cases):
        inner = {c for c in (1, 2, 63, 64, 65, 129) if c < n} if packed else set()
        cuts = (0, *sorted(inner), n)
        x = draw(n, kind, shared=1 + turn % 2, beta=(0.05, 0.2) if turn % 3 else (0.0, 2.0))
        for name, size in errors(x, cuts, chunk=64 if turn % 4 else 128).items():
            assert size <= 3e-6, (n, packed, name, size)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.slow
@pytest.mark.parametrize("kind", DECAYS)
def test_float16_in_the_blocks_of_a_card(kind: str) -> None:
    """The chunk of half precision as it is chosen, and as many dims as a layer's heads have."""
    torch.manual_seed(8)
    check_float16(draw(130, kind, heads=1, dims=(128, 128), dtype=torch.float16))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.slow
@pytest.mark.parametrize("kind", DECAYS)
def test_float16_in_the_blocks_of_an_older_card(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what depends on the target only warps, stages and, for a decay a key dim, the blocks of
    key dims of one kernel differ."""
    monkeypatch.setattr(triton_blocks, "target_of", lambda device: AMPERE)
    torch.manual_seed(9)
    dims = (64, 48) if kind == "diagonal" else (32, 20)
    check_float16(draw(70, kind, heads=1, dims=dims, dtype=torch.float16))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.slow
@pytest.mark.parametrize("kind", DECAYS)
def test_many_rows_take_wide_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chains of a batch that fills a card: 64 value dims a program, where one row stands for
    many."""
    monkeypatch.setattr(triton_blocks, "PROGRAMS", 1)
    torch.manual_seed(10)
    x = draw(70, kind, heads=1, dims=(32, 70), dtype=torch.float16)
    size = triton_blocks.Sizes(1, 70, 1, 1, 32, 70)
    device, diagonal = torch.device("cpu"), kind == "diagonal"
    blocks = triton_blocks.blocks_of(size, torch.float16, "ieee", device, 64, diagonal=diagonal)
    assert blocks.chain == 64
    check_float16(x)


def check_float16(x: Drawn) -> None:
    """Outputs, state and gradients in the chunk that the kernels choose for half precision."""
    given = dict(x)
    state, dout, dstate = (given.pop(name) for name in ("state", "dout", "dstate"))
    tile = triton.prepare(**given, scale=SCALE)
    found = dict(zip(("out", "end"), triton.run(tile, state), strict=True))
    grads, found["d_state"] = triton.backward(tile, state, dout, dstate)
    found |= {f"d_{name}": y for name, y in grads._asdict().items() if y is not None}
    want = by_tokens(x, (0, given["v"].shape[1]))
    assert found.keys() == want.keys()
    for name, y in found.items():
        assert error(y, want[name]) <= 4e-3, (name, error(y, want[name]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", DECAYS)
def test_float32_is_as_near_as_torch(kind: str) -> None:
    """Medians of five seeds stay within 1.5 times those of the torch form, or 2e-6."""
    sizes: dict[str, list[tuple[float, float]]] = {}
    for seed in range(5):
        torch.manual_seed(seed)
        x = draw(70, kind, heads=1, dims=(32, 32))
        want = by_tokens(x, (0, 70))
        own = by_kernels(x, None)
        tile = delta.prepare(*(x[n] for n in ("q", "k", "v", "beta", "log_decay")), SCALE)
        out, end = delta.run(tile, x["state"])
        grads, before = delta.backward(tile, x["state"], x["dout"], x["dstate"])
        torchs = {"out": out, "end": end, "d_state": before}
        torchs.update({f"d_{n}": y for n, y in grads._asdict().items() if y is not None})
        for name, y in own.items():
            right = want[names(name)]
            pair = (error(y, right), error(torchs[names(name)], right))
            sizes.setdefault(name, []).append(pair)
    for name, pairs in sizes.items():
        mine, other = (sorted(column)[2] for column in zip(*pairs, strict=True))
        assert mine <= max(1.5 * other, 2e-6), (name, mine, other)
