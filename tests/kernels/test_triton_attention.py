"""Attention's Triton kernels, in Triton's interpreter, against the token loop in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from xdist_kernels.attention import triton as door
from xdist_kernels.attention import triton_tiles
from xdist_kernels.attention.dropout import Dropped
from xdist_kernels.attention.reference import attention_reference
from xdist_kernels.errors import KernelError
from xdist_kernels.launch import AMPERE, HOPPER, Config, Target

pytestmark = pytest.mark.usefixtures("poisoned")


class Case(NamedTuple):
    """Sizes of one case; `kind` names the visibility made by `spans_of`."""

    kind: str
    n: int = 21
    m: int = 37
    heads: int = 2
    groups: int = 1
    dim: int = 8
    value_dim: int = 5
    batch: int = 1
    softcap: float | None = None
    sinks: bool = False
    rate: float = 0.0


CASES = [
    Case("all", batch=2, n=17),
    Case("causal", n=37, groups=2),
    Case("window", n=37, value_dim=16),
    Case("documents", n=37, sinks=True),
    Case("prefix", n=37, heads=1, softcap=2.0),
    Case("chunks", n=33, m=33, heads=1),
    Case("per_head", n=19, heads=4, groups=2, softcap=1.5, sinks=True),
    Case("empty_rows", heads=1),
    Case("empty_rows", sinks=True, heads=1),
    Case("causal", rate=0.4, batch=2, n=9),
    Case("per_head", n=19, m=20, softcap=1.5, sinks=True, rate=0.3),
    Case("all", n=1, m=1, heads=1),
    Case("all", m=0),
    Case("all", m=0, sinks=True),
    Case("causal", n=0),
    Case("all", heads=0, groups=0),
]


def spans_of(case: Case) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Spans, key positions, query positions: both sides hold two segments, out of order."""
    n, m = case.n, case.m
    keys = torch.cat([torch.arange(m // 3, m), torch.arange(0, m // 3)])
    own = torch.cat([torch.arange(n // 2, n), torch.arange(0, n // 2)]) + max(0, m - n)
    zero = torch.zeros(n, dtype=torch.int64)
    whole = (zero, zero + m, zero, zero)
    if case.kind == "causal":
        whole = (zero, own + 1, zero, zero)
    elif case.kind == "window":
        whole = ((own - 5).clamp(min=0), own + 3, zero, zero)
    elif case.kind == "documents":
        start = torch.where(own < 7, 0, torch.where(own < 20, 7, 20))
        whole = (start, own + 1, zero, zero)
    elif case.kind == "prefix":
        whole = ((own - 3).clamp(min=4), own + 1, zero, zero + 4)
    elif case.kind == "chunks":
        whole = (own // 16 * 16, own + 1, zero, zero)
    elif case.kind == "empty_rows":
        whole = (torch.where(own % 2 == 0, own, own + 5), own + 1, zero, zero)
    elif case.kind == "per_head":
        lefts = torch.tensor([1, 100, 2, 20])[: case.heads, None]
        lo = (own[None] - lefts).clamp(min=0)
        whole = (lo, (own + 1).expand_as(lo), zero.expand_as(lo), zero.expand_as(lo))
    return whole, keys, own


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=made, dtype=torch.float64).to(dtype)


def inputs_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, dout."""
    return (
        drawn(case.batch, case.n, case.heads, case.dim, seed=1, dtype=dtype),
        drawn(case.batch, case.m, case.groups, case.dim, seed=2, dtype=dtype),
        drawn(case.batch, case.m, case.groups, case.value_dim, seed=3, dtype=dtype),
        drawn(case.batch, case.n, case.heads, case.value_dim, seed=4, dtype=dtype),
    )


Found = list[tuple[str, Tensor, Tensor]]


def run_both(case: Case, of: torch.dtype, **more: Any) -> Found:
    """(name, ours, reference) of out, lse and every gradient."""
    q, k, v, dout = inputs_of(case, of)
    spans, keys, own = spans_of(case)
    # Not side by side: a column.
    sinks = drawn(case.heads, 2, seed=5)[:, 0] if case.sinks else None
    options: dict[str, Any] = {
        "scale": 0.7, "spans": spans, "k_positions": keys, "softcap": case.softcap,
    }  # fmt: skip
    if case.rate:
        options["dropout"] = Dropped(case.rate, 0x0123456789ABCDEF, 2**40 + 3, 1, own)
    out, lse = door.attention_forward(q, k, v, sinks=sinks, **options, **more)
    delta = door.attention_delta(out, dout)
    grads = list(door.attention_backward(q, k, v, lse, delta, dout, **options, **more))
    leaves = [x.double().clone().requires_grad_() for x in (q, k, v)]
    if sinks is not None:
        grads.append(door.sinks_backward(sinks, lse, delta))
        leaves.append(sinks.double().clone().requires_grad_())
    given = leaves[3] if sinks is not None else None
    want, want_lse = attention_reference(*leaves[:3], sinks=given, **options)
    # allow_unused: a reference with no visible key never touches some inputs.
    wanted = (
        torch.autograd.grad(want, leaves, dout.double(), allow_unused=True)
        if want.requires_grad
        else [None] * len(leaves)
    )
    found = [("out", out, want), ("lse", lse, want_lse)]
    names = ("dq", "dk", "dv", "dsinks")[: len(leaves)]
    for name, ours, ref, leaf in zip(names, grads, wanted, leaves, strict=True):
        found.append((name, ours, torch.zeros_like(leaf) if ref is None else ref))
    return found


def worst(pairs: Found) -> float:
    """Largest error relative to the largest value; infinities and shapes must agree exactly."""
    found = 0.0
    for name, ours, ref in pairs:
        assert ours.shape == ref.shape, name
        ref = ref.detach()
        finite = torch.isfinite(ref)
        assert torch.equal(ours[~finite].double(), ref[~finite]), name
        if finite.any():
            # Where a row sees one key dq and dk are exactly zero: no smaller scale than dv's.
            scale = ref[finite].abs().max().clamp(min=1.0 if name == "lse" else 0.5)
            error = (ours[finite].double() - ref[finite]).abs().max()
            assert not error.isnan(), name
            found = max(found, float(error / scale))
    return found


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 tokens, so that short sequences cross several of them."""
    use_tiles(monkeypatch, lambda *_: triton_tiles.Tile(16, 16, Config(4, 1)))


def use_tiles(monkeypatch: pytest.MonkeyPatch, tile: Callable[..., triton_tiles.Tile]) -> None:
    for name in ("forward_tile", "dq_tile", "dkdv_tile"):
        monkeypatch.setattr(door, name, tile)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_token_loop_in_float32(case: Case, small_blocks: None) -> None:
    pairs = run_both(case, torch.float32)
    assert all(ours.dtype == torch.float32 for _, ours, _ in pairs)
    assert worst(pairs) <= 2e-6


FAST_IN_FLOAT16 = (CASES[2], CASES[6])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in FAST_IN_FLOAT16 else pytest.mark.slow)
        for case in CASES
    ],
    ids=str,
)
def test_float16_rounds_probabilities_once_and_sums_in_float32(
    case: Case, small_blocks: None
) -> None:
    """P, dS and what they are made of are rounded to 11 bits: 2^-11 each, of sums of like terms."""
    pairs = run_both(case, torch.float16)
    assert all(ours.dtype == torch.float32 for _, ours, _ in pairs)
    assert worst([pair for pair in pairs if pair[0] == "lse"]) <= 2e-6
    assert worst(pairs) <= 2 * 2.0**-11


WIDTHS = [(32, 32), (64, 64), (80, 48), (128, 128), (192, 128), (256, 256)]


@pytest.mark.parametrize(("dim", "value_dim"), WIDTHS)
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_head_dims_32_to_256_in_the_blocks_of_a_card(
    dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    check_in_the_blocks_of_a_card(dim, value_dim, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [128, 256])
def test_head_dims_whose_blocks_are_others_on_an_older_card(
    dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 64 dims, and in float32, blocks are those of a newer card; stages alone differ."""
    makers = (triton_tiles.forward_tile, triton_tiles.dq_tile, triton_tiles.dkdv_tile)

    def blocks(width: int, dtype: torch.dtype, target: Target) -> list[tuple[int, int]]:
        return [make(width, width, dtype, target)[:2] for make in makers]

    assert blocks(dim, torch.float16, AMPERE) != blocks(dim, torch.float16, HOPPER)
    for width, dtype in ((32, torch.float16), (64, torch.float16), (dim, torch.float32)):
        assert blocks(width, dtype, AMPERE) == blocks(width, dtype, HOPPER)
    monkeypatch.setattr(door, "target_of", lambda device: AMPERE)
    check_in_the_blocks_of_a_card(dim, dim, torch.float16)


def check_in_the_blocks_of_a_card(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    case = Case("causal", n=150, m=150, dim=dim, value_dim=value_dim, heads=1)
    q, k, v, dout = inputs_of(case, dtype)
    spans, keys, _ = spans_of(case)
    options: dict[str, Any] = {"scale": dim**-0.5, "spans": spans, "k_positions": keys}
    out, lse = door.attention_forward(q, k, v, **options)
    grads = door.attention_backward(q, k, v, lse, None, dout, out=out, **options)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = dense(*leaves, **options)
    wanted = torch.autograd.grad(want, leaves, dout.double())
    pairs = [("out", out, want), ("lse", lse, want_lse)]
    pairs += list(zip(("dq", "dk", "dv"), grads, wanted, strict=True))
    assert worst(pairs) <= (2e-6 if dtype == torch.float32 else 2 * 2.0**-11)


def dense(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, spans: tuple[Tensor, ...], k_positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The reference for spans that all heads share, in whole matrices."""
    lo, hi, prefix_lo, prefix_hi = (s[:, None] for s in spans)
    seen = (k_positions >= lo) & (k_positions < hi)
    seen |= (k_positions >= prefix_lo) & (k_positions < prefix_hi)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    s = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    s = s.masked_fill(~seen, -torch.inf)
    out = torch.einsum("bhij,bjhe->bihe", s.softmax(-1), v)
    return out, s.logsumexp(-1).transpose(1, 2)


def test_partial_results_are_updated_in_place_over_the_steps_of_a_ring(small_blocks: None) -> None:
    """Keys arrive in three blocks, one of which nobody sees; the last call has the sinks."""
    case = Case("window", n=20, m=60)
    q, k, v, dout = inputs_of(case, torch.float32)
    spans, keys, _ = spans_of(case)
    sinks = drawn(case.heads, seed=5)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want, want_lse = attention_reference(
        *leaves, scale=0.7, spans=spans, k_positions=keys, sinks=sinks
    )
    # A view into larger tensors, as a run of heads of a ring's running sum is.
    out, lse = torch.zeros(1, 20, 4, 5)[:, :, 1:3], torch.full((1, 20, 4), -torch.inf)[:, :, 1:3]
    parts = [slice(20, 40), slice(40, 60), slice(0, 20)]
    assert not bool(((keys[parts[1]] >= spans[0].min()) & (keys[parts[1]] < spans[1].max())).any())
    options: dict[str, Any] = {"scale": 0.7, "spans": spans}
    for part in parts:
        last = part == parts[-1]
        given = door.attention_forward(
            q, k[:, part], v[:, part], k_positions=keys[part], into=(out, lse),
            sinks=sinks if last else None, **options,
        )  # fmt: skip
        assert given[0].data_ptr() == out.data_ptr()
        if part == parts[1]:
            before = out.clone(), lse.clone()
            door.attention_forward(
                q, k[:, part], v[:, part], k_positions=keys[part], into=(out, lse), **options
            )
            assert torch.equal(out, before[0])
            assert torch.equal(lse, before[1])
    assert worst([("out", out, want), ("lse", lse, want_lse)]) <= 2e-6
    # The gradients of parts of the keys are parts of the gradients.
    delta = door.attention_delta(out, dout)
    wanted = torch.autograd.grad(want, leaves, dout.double())
    some = [
        door.attention_backward(
            q, k[:, part], v[:, part], lse, delta, dout, k_positions=keys[part], **options
        )
        for part in (slice(0, 20), slice(20, 40), slice(40, 60))
    ]
    dqs, dks, dvs = zip(*some, strict=True)
    sums = (sum(dqs), torch.cat(dks, 1), torch.cat(dvs, 1))
    pairs = list(zip(("dq", "dk", "dv"), sums, wanted, strict=True))
    assert worst(pairs) <= 2e-6


def test_every_option_at_once_adds_into_what_is_there(small_blocks: None) -> None:
    """Dropout's scale is that of the new part alone; soft-cap and sinks as without `into`. The
    gradients of two parts, from the log-sum-exp of both, are those of the float64 loop."""
    case = Case("causal", n=9)
    q, k, v, dout = inputs_of(case, torch.float32)
    spans, keys, own = spans_of(case)
    options: dict[str, Any] = {
        "scale": 0.7, "spans": spans, "softcap": 1.5,
        "dropout": Dropped(0.4, 0x0123456789ABCDEF, 7, 1, own),
    }  # fmt: skip
    sinks = drawn(case.heads, seed=5)
    leaves = [x.double().requires_grad_() for x in (q, k, v, sinks)]
    want, want_lse = attention_reference(*leaves[:3], k_positions=keys, sinks=leaves[3], **options)
    wanted = torch.autograd.grad(want, leaves, dout.double())
    first, second = slice(0, 20), slice(20, 37)
    into = door.attention_forward(q, k[:, first], v[:, first], k_positions=keys[first], **options)
    out, lse = door.attention_forward(
        q, k[:, second], v[:, second], k_positions=keys[second], sinks=sinks, into=into, **options
    )
    delta = door.attention_delta(out, dout)
    parts = [
        door.attention_backward(
            q, k[:, part], v[:, part], lse, delta, dout, k_positions=keys[part], **options
        )
        for part in (first, second)
    ]
    dqs, dks, dvs = zip(*parts, strict=True)
    grads = (sum(dqs), torch.cat(dks, 1), torch.cat(dvs, 1), door.sinks_backward(sinks, lse, delta))
    pairs = [("out", out, want), ("lse", lse, want_lse)]
    pairs += list(zip(("dq", "dk", "dv", "dsinks"), grads, wanted, strict=True))
    assert worst(pairs) <= 2e-6


def test_strided_views_are_read_where_they_lie(small_blocks: None) -> None:
    """q, k, v of one projection, heads before tokens, a gradient that is one number."""
    case = Case("causal", n=20, m=20, heads=2, groups=1, dim=8, value_dim=8)
    spans, keys, _ = spans_of(case)
    packed = drawn(1, 20, 4 * 8, seed=1)
    q, k, v = (x.unflatten(2, (-1, 8)) for x in packed.split([16, 8, 8], dim=2))
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    dout = torch.ones(()).expand(1, 20, 2, 8)
    options: dict[str, Any] = {"scale": 0.7, "spans": spans, "k_positions": keys}
    out, lse = door.attention_forward(turned, k, v, **options)
    grads = door.attention_backward(turned, k, v, lse, None, dout, out=out, **options)
    q, k, v, dout = (x.contiguous() for x in (q, k, v, dout))
    same, same_lse = door.attention_forward(q, k, v, **options)
    wanted = door.attention_backward(q, k, v, same_lse, None, dout, out=same, **options)
    for ours, want in zip((out, lse, *grads), (same, same_lse, *wanted), strict=True):
        assert torch.equal(ours, want)


def test_query_heads_in_parts_give_the_same_sums(
    small_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that few key heads would leave idle takes their query heads in several programs."""
    assert [triton_tiles.head_parts(p, 8) for p in (0, 1, 33, 66, 132)] == [1, 8, 4, 2, 1]
    case = Case("causal", n=9, heads=4, groups=1)
    found = []
    for parts in (1, 2):
        monkeypatch.setattr(door, "head_parts", lambda *_, parts=parts: parts)
        found.append(run_both(case, torch.float32))
        assert worst(found[-1]) <= 2e-6
    assert torch.equal(found[0][2][1], found[1][2][1])


def test_results_can_come_in_the_dtype_of_the_inputs(small_blocks: None) -> None:
    pairs = run_both(CASES[3], torch.float16, dtype=torch.float16)
    assert [ours.dtype for _, ours, _ in pairs[:5]] == [
        torch.float16, torch.float32, torch.float16, torch.float16, torch.float16
    ]  # fmt: skip
    # One more rounding of the result, and of the output that delta is made of.
    assert worst(pairs) <= 4 * 2.0**-11


def test_float32_in_three_tf32_products_by_option(small_blocks: None) -> None:
    """The interpreter multiplies in full precision: this shows the option, not its rounding."""
    assert worst(run_both(CASES[1], torch.float32, precision="tf32x3")) <= 2e-6
    with pytest.raises(KernelError, match="no precision 'tf32'"):
        run_both(CASES[1], torch.float32, precision="tf32")


def test_large_scores_do_not_overflow(small_blocks: None) -> None:
    case = Case("causal", n=37)
    q, k, v, _ = inputs_of(case, torch.float32)
    spans, keys, _ = spans_of(case)
    options: dict[str, Any] = {"scale": 300.0, "spans": spans, "k_positions": keys}
    out, lse = door.attention_forward(q, k, v, **options)
    want, want_lse = attention_reference(q, k, v, **options)
    assert worst([("lse", lse / 1e3, want_lse / 1e3)]) <= 1e-6
    assert worst([("out", out, want)]) <= 1e-3


def test_offsets_past_31_bits(tmp_path: Path, small_blocks: None) -> None:
    """Tokens 2^30 elements apart in a file of holes: what is not touched takes no memory."""
    n, step = 3, 2**30 + 64
    options: dict[str, Any] = {"scale": 1.0, "k_positions": torch.arange(n)}
    zero = torch.zeros(n, dtype=torch.int64)
    options["spans"] = (zero, torch.arange(n) + 1, zero, zero)
    narrow = torch.from_file(
        str(tmp_path / "in"), shared=True, size=2 * step + 64, dtype=torch.float16
    )
    far = [narrow.as_strided((1, n, 1, 16), (0, step, 16, 1), 16 * i) for i in range(4)]
    near = [drawn(1, n, 1, 16, seed=i, dtype=torch.float16) for i in range(4)]
    for view, values in zip(far, near, strict=True):
        view.copy_(values)
    wide = torch.from_file(str(tmp_path / "out"), shared=True, size=2 * step + 64)
    out = wide.as_strided((1, n, 1, 16), (0, step, 16, 1))
    lse = wide.as_strided((1, n, 1), (0, step, 1), 32).fill_(-torch.inf)
    door.attention_forward(*far[:3], into=(out, lse), **options)
    want, want_lse = door.attention_forward(*near[:3], **options)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    found = door.attention_backward(*far[:3], lse, None, far[3], out=out, **options)
    wanted = door.attention_backward(*near[:3], want_lse, None, near[3], out=want, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_what_cannot_be_served_raises_and_says_what_to_do() -> None:
    q = torch.zeros(1, 2, 1, 8)
    plain: dict[str, Any] = {"softcap": None, "dropout": None}
    assert door.refusal(q, q, q, **plain) is None
    assert "float64: use backend='torch'" in str(door.refusal(*[q.double()] * 3, **plain))
    assert "bfloat16" in str(door.refusal(*[q.bfloat16()] * 3, **plain))
    wide = torch.zeros(1, 2, 1, 257)
    assert "257 is above 256: use backend='torch'" in str(door.refusal(q, q, wide, **plain))
    long = torch.zeros(1, 1, 1, 8).expand(1, 2**30 + 1, 1, 8)
    assert "shard the sequence further" in str(door.refusal(q, long, long, **plain))
    at = torch.arange(2)
    options: dict[str, Any] = {"scale": 1.0, "spans": (at, at, at, at), "k_positions": at}
    with pytest.raises(KernelError, match=r"cannot serve this call\n.*257"):
        door.attention_forward(q, q, wide, **options)
    with pytest.raises(KernelError, match="one float dtype"):
        door.attention_forward(q, q, q.half(), **options)
    with pytest.raises(KernelError, match="delta, or the output"):
        door.attention_backward(q, q, q, q[..., 0], None, q, **options)
    apart = torch.zeros(1, 2, 8, 2)[..., :1].transpose(2, 3)
    for into, why in (
        ((q.half(), q[..., 0]), "float32"),
        ((q[:, :1], q[..., 0]), "`into` is out"),
        ((apart, q[..., 0]), "last dim"),
    ):
        with pytest.raises(KernelError, match=why):
            door.attention_forward(q, q, q, into=into, **options)
