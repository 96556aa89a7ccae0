"""Which form serves what: every query once, the same numbers, forced forms, and what they cost."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from xdist_kernels.attention import band, blocks, flash, forms, pieces
from xdist_kernels.attention import torch as door
from xdist_kernels.errors import KernelError

Call = dict[str, Any]


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and pieces of a few tokens are served, so that short sequences cross many."""
    monkeypatch.setattr(pieces, "MIN_ROWS", 4)
    monkeypatch.setattr(pieces, "MIN_KEYS", 2)
    monkeypatch.setattr(band, "MIN_ROWS", 4)
    monkeypatch.setattr(band, "_TILE_TOKENS", 13)


def drawn(seed: int) -> tuple[blocks.Spans, Tensor]:
    """Spans and key positions of a drawn mask: documents, causal or not, windows, prefix, chunks,
    and queries and keys in drawn segments, in drawn order, some of the keys elsewhere."""
    made = torch.Generator().manual_seed(seed)

    def some(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=made))

    n = some(30, 120)
    cuts = torch.randint(0, n, (some(0, 4),), generator=made).unique()
    at = torch.arange(n)
    start = torch.zeros(n, dtype=torch.int64)
    stop = torch.full((n,), n)
    for cut in cuts.tolist():
        start[cut:] = cut
        stop[:cut] = stop[:cut].clamp(max=cut)
    if some(0, 4) == 0:
        chunk = some(5, 40)
        start = torch.maximum(start, start + (at - start) // chunk * chunk)
        stop = torch.minimum(stop, start + chunk)
    lo, hi = start.clone(), stop.clone()
    if some(0, 2):
        hi = at + 1
    if some(0, 3) == 0:
        lo = torch.maximum(lo, at - some(0, 30))
        hi = torch.minimum(hi, at + 1 + some(0, 9))
    zero = torch.zeros_like(at)
    prefix_lo, prefix_hi = zero, zero
    if some(0, 3) == 0:
        prefix_lo, prefix_hi = start, torch.minimum(start + some(1, 9), stop)
        lo = torch.maximum(lo, prefix_hi)
    if some(0, 3) == 0:
        blind = torch.randint(0, n, (5,), generator=made)
        hi[blind] = lo[blind]

    def shuffled() -> Tensor:
        ends = sorted({0, n, *torch.randint(0, n, (some(0, 4),), generator=made).tolist()})
        runs = list(pairwise(ends))
        order = torch.randperm(len(runs), generator=made).tolist()
        kept = order[: max(1, len(order) - some(0, 2))]
        return torch.cat([torch.arange(*runs[i]) for i in kept])

    mine, keys = shuffled(), shuffled()
    lo, hi, prefix_lo, prefix_hi = (x[mine] for x in (lo, hi, prefix_lo, prefix_hi))
    return (lo, hi, prefix_lo, prefix_hi), keys


def tensors(n: int, m: int, heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    made = torch.Generator().manual_seed(n * 1000 + m)
    shapes = [(2, n, heads, 6), (2, m, groups, 6), (2, m, groups, 6), (2, n, heads, 6)]
    return [torch.randn(s, generator=made, dtype=torch.float64).to(dtype) for s in shapes]


def everything(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, sinks: Tensor | None = None, **call: Any
) -> list[Tensor]:
    """Out, lse and the gradients."""
    out, lse = door.attention_forward(q, k, v, sinks=sinks, scale=0.4, **call)
    delta = door.attention_delta(out, dout)
    grads = door.attention_backward(q, k, v, lse, delta, dout, scale=0.4, **call)
    return [out, lse, *grads]


def gap(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest absolute difference; infinities must agree."""
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        finite = torch.isfinite(b)
        assert torch.equal(a[~finite].double(), b[~finite].double())
        if finite.any():
            error = (a[finite].double() - b[finite].double()).abs().max()
            assert not error.isnan()
            worst = max(worst, float(error))
    return worst


@pytest.mark.parametrize("part", range(4))
def test_every_form_gives_what_blocks_give(part: int, short_runs: None) -> None:
    used: set[str] = set()
    for seed in range(part * 30, part * 30 + 30):
        spans, keys = drawn(seed)
        heads, groups = [(4, 2), (2, 2), (3, 1)][seed % 3]
        q, k, v, dout = tensors(len(spans[0]), len(keys), heads, groups, torch.float64)
        sinks = torch.randn(heads, dtype=torch.float64) if seed % 4 == 0 else None
        call: Call = {"spans": spans, "k_positions": keys}
        found = everything(q, k, v, dout, sinks, **call)
        wanted = everything(q, k, v, dout, sinks, form="blockwise", **call)
        assert gap(found, wanted) <= 1e-12, seed
        served = door.attention_forms(q, k, v, **call)
        used |= {x.form for x in served}
        assert [x.start for x in served] == [0, *(x.stop for x in served[:-1])]
        assert served[-1].stop == q.shape[1]
    assert used == set(forms.FORMS)


def test_narrow_inputs_are_summed_in_float32_by_every_form(short_runs: None) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for seed in (1, 2, 3, 5, 8, 13):
            spans, keys = drawn(seed)
            q, k, v, dout = tensors(len(spans[0]), len(keys), 4, 2, dtype)
            call: Call = {"spans": spans, "k_positions": keys}
            found = everything(q, k, v, dout, **call)
            wide = [x.double() for x in (q, k, v, dout)]
            wanted = everything(*wide, form="blockwise", **call)  # type: ignore[misc]
            assert all(x.dtype == torch.float32 for x in found)
            assert gap(found, wanted) <= 2e-5


def causal(n: int) -> Call:
    own, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    return {"spans": (zero, own + 1, zero, zero), "k_positions": own}


def packed(lengths: list[int], window: int | None = None) -> Call:
    start = torch.cat([torch.full((x,), sum(lengths[:i])) for i, x in enumerate(lengths)])
    own = torch.arange(len(start))
    zero = torch.zeros_like(own)
    lo = start if window is None else torch.maximum(start, own - window)
    return {"spans": (lo, own + 1, zero, zero), "k_positions": own}


def forms_of(call: Call, heads: int = 2, dim: int = 4, **more: Any) -> list[str]:
    n, m = call["spans"][0].shape[-1], len(call["k_positions"])
    q, k = torch.zeros(1, n, heads, dim), torch.zeros(1, m, heads, dim)
    return [x.form for x in door.attention_forms(q, k, k, **call, **more)]


def test_which_form_serves_what() -> None:
    assert forms_of(causal(300)) == ["flash"]
    assert forms_of(packed([100, 200, 70])) == ["flash"] * 3
    assert forms_of(packed([100, 5, 9, 200])) == ["flash", "blockwise", "flash"]
    assert forms_of(packed([300, 200], window=32)) == ["window"]
    assert forms_of(causal(300), softcap=2.0) == ["blockwise"]
    assert forms_of(causal(10)) == ["blockwise"]
    assert forms_of(packed([5000], window=3000)) == ["flash", "blockwise"]
    # The second zigzag segment of two ranks sees the first whole and itself on the diagonal.
    own = torch.cat([torch.arange(0, 100), torch.arange(300, 400)])
    zero = torch.zeros_like(own)
    call: Call = {"spans": (zero, own + 1, zero, zero), "k_positions": own}
    q = torch.zeros(1, 200, 1, 4)
    served = door.attention_forms(q, q, q, **call)
    assert [x.pieces for x in served] == [
        (pieces.Piece(0, 100, True),),
        (pieces.Piece(0, 100, False), pieces.Piece(100, 200, True)),
    ]


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("kind", ["causal", "square", "two pieces", "a part of the keys"])
def test_one_run_goes_to_the_kernel_whole(kind: str, groups: int) -> None:
    """All heads of one batch row at once, without a copy: the same numbers, laid out as asked."""
    n = 100
    call = causal(n)
    lo, hi, prefix_lo, prefix_hi = call["spans"]
    if kind == "square":
        call["spans"] = (lo, torch.full_like(hi, n), prefix_lo, prefix_hi)
    elif kind == "two pieces":
        call["k_positions"] = torch.cat([torch.arange(300, 400), torch.arange(300)])
        call["spans"] = (lo, hi + 300, prefix_lo, prefix_hi)
    elif kind == "a part of the keys":
        call["k_positions"] = torch.arange(2 * n)
    q, k, v, dout = (x[:1] for x in tensors(n, len(call["k_positions"]), 4, groups, torch.float64))
    wide = torch.randn(1, n, 4, 18, dtype=torch.float64)
    q = wide[..., 6:12]  # as one of three in a fused projection
    sinks = torch.randn(4, dtype=torch.float64)
    found = everything(q, k, v, dout, sinks, form="flash", **call)
    assert len(door.attention_forms(q, k, v, **call)) == 1
    assert gap(found, everything(q, k, v, dout, sinks, form="blockwise", **call)) <= 1e-12
    assert found[1].is_contiguous()
    # With the output at hand nothing stands in for it.
    out, lse = found[:2]
    delta = door.attention_delta(out, dout)
    options = {"scale": 0.4, "form": "flash", "out": out, **call}
    grads = door.attention_backward(q, k, v, lse, delta, dout, **options)
    assert gap(list(grads), found[2:]) <= 1e-12


def test_no_keys_and_no_queries() -> None:
    q = torch.randn(1, 80, 2, 4)
    call = causal(80)
    found = everything(q, q[:, :0], q[:, :0], q, spans=call["spans"], k_positions=torch.arange(0))
    assert not found[0].any()
    assert bool((found[1] == -torch.inf).all())
    assert not found[2].any()
    none = tuple(x[:0] for x in call["spans"])
    found = everything(q[:, :0], q, q, q[:, :0], spans=none, k_positions=torch.arange(80))
    assert found[0].shape == (1, 0, 2, 4)
    assert not any(x.any() for x in found[3:])


def test_a_forced_form_serves_or_says_why_not() -> None:
    q = torch.zeros(1, 100, 1, 4)
    assert {x.form for x in door.attention_forms(q, q, q, form="blockwise", **causal(100))} == {
        "blockwise"
    }
    with pytest.raises(KernelError, match=r"'flash', which cannot serve(.|\n)*there is a softcap"):
        door.attention_forward(q, q, q, scale=1.0, softcap=1.0, form="flash", **causal(100))
    with pytest.raises(KernelError, match="head dims differ: 4 and 2"):
        door.attention_forward(q, q, q[..., :2], scale=1.0, form="flash", **causal(100))
    with pytest.raises(KernelError, match="'window', which cannot serve"):
        door.attention_forward(q, q, q, scale=1.0, form="window", **causal(100))
    with pytest.raises(KernelError, match="no form 'triton'"):
        door.attention_forward(q, q, q, scale=1.0, form="triton", **causal(100))


def test_a_torch_without_the_kernel_goes_blockwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_forward", None)
    assert forms_of(causal(100)) == ["blockwise"]
    with pytest.raises(KernelError, match="this torch has no aten::"):
        forms_of(causal(100), form="flash")


class Kernels(TorchDispatchMode):
    """Counts calls of torch's kernel and the pairs of queries and keys they span, and the largest
    tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "flash_attention_for_cpu" in func._schema.name and "backward" not in func._schema.name:
            self.pairs += args[0].shape[2] * args[1].shape[2]
        out = func(*args, **(kwargs or {}))
        made = [] if func.is_view else out if isinstance(out, (tuple, list)) else [out]
        self.largest = max([self.largest, *(x.numel() for x in made if isinstance(x, Tensor))])
        return out


def test_packed_documents_cost_their_own_pairs_alone() -> None:
    q = torch.randn(1, 800, 1, 4)
    with Kernels() as mode:
        door.attention_forward(q, q, q, scale=1.0, **packed([100] * 8))
    assert mode.pairs == 8 * 100 * 100


def test_the_kernel_is_given_a_few_heads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond inputs and outputs memory is one chunk of heads of one run."""
    monkeypatch.setattr(flash, "_CHUNK_ELEMENTS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    n, heads, dim = 256, 8, 4
    q, k, dout = torch.randn(1, n, heads, dim), torch.randn(1, n, 4, dim), torch.ones(1, n, 8, dim)
    call: Call = {**causal(n), "scale": 1.0}
    with Kernels() as mode:
        out, lse = door.attention_forward(q, k, k, **call)
    assert mode.largest == out.numel()
    delta = door.attention_delta(out, dout)
    dq, dk, dv = torch.empty_like(q), torch.zeros(1, 4, n, dim), torch.zeros(1, 4, n, dim)
    whole = (pieces.Piece(0, n, True),)
    with Kernels() as mode:
        flash.backward_run(q, k, k, lse, delta, dout, dq, dk, dv, whole, 1.0)
    assert mode.largest == n * 2 * dim


def test_rows_of_zero_gradient_and_tiny_gradients_keep_their_delta() -> None:
    """The kernel asks for the output; what stands in for it must give the row's delta back."""
    dout = torch.randn(2, 1, 7, 5)
    dout[1] *= 1e-30
    holes = dout.clone()
    holes[0, 0, 3] = 0.0
    holes[0, 0, 4, :2] = 0.0
    holes[0, 0, 5, 0] = 1e-42
    out = torch.randn(2, 1, 7, 5)
    for rows in (dout, holes):
        delta = (rows * out).sum(-1, keepdim=True)
        given = (rows * flash._stand_in(rows, delta)).sum(-1, keepdim=True)
        assert torch.allclose(given, delta, rtol=1e-6, atol=0.0)


def test_strides_the_kernel_cannot_take_are_left_to_blocks() -> None:
    """Law 8: the kernel hands row strides on in 32 bits."""
    near = torch.zeros(1, 1, 1, 4)
    far = torch.zeros(4).as_strided((1, 1, 1, 4), (0, 2**31, 4, 1))
    assert flash.refusal(near, near, near, None, False) is None
    refused = flash.refusal(near, far, near, None, False)
    assert refused == "tokens or heads lie 2^31 elements apart"
