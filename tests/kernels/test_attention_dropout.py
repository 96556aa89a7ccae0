"""Dropout inside attention: the hash, its uniformity, and the kernels against the token loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from xdist_kernels.attention import blocks, blockwise
from xdist_kernels.attention import torch as door
from xdist_kernels.attention.dropout import Dropped
from xdist_kernels.attention.reference import attention_reference
from xdist_kernels.errors import KernelError

FAR = 2**33 + 5
PINNED = ["0011100010011010", "0010101111100100", "1001100000000110", "0100111110111110"]


def dropped(n: int, rate: float = 0.4, first: int = 0) -> Dropped:
    return Dropped(rate, 0x0123456789ABCDEF, 2**40 + 3, 1, torch.arange(n) + first)


def every_pair(drop: Dropped, batch: int, heads: int, keys: Tensor) -> Tensor:
    """Bool `[batch, heads, n, keys]` of the blockwise form."""
    words = drop.queries(batch, slice(0, heads), slice(0, len(drop.q_positions)))
    return drop.kept(words, keys)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.999999])
def test_the_block_form_is_the_hash_of_each_pair_bit_for_bit(rate: float) -> None:
    drop = replace(dropped(5, rate), q_positions=torch.tensor([0, 1, 77, FAR, 2**62]))
    keys = torch.tensor([0, 1, 2, 3, FAR, FAR - 1, 2**31, 2**32])
    found = every_pair(drop, 2, 3, keys)
    for (b, h, i, j), kept in zip(
        torch.cartesian_prod(*(torch.arange(s) for s in found.shape)).tolist(),
        found.flatten().tolist(),
        strict=True,
    ):
        assert kept == drop.keeps(b, h, int(drop.q_positions[i]), int(keys[j]))


def test_the_hash_is_what_it_was() -> None:
    """Fixed words: a run resumed under another version, or on a card, drops the same."""
    drop = Dropped(0.5, 42, 0, 0, torch.arange(4))
    found = every_pair(drop, 1, 1, torch.arange(16))[0, 0]
    assert ["".join("1" if x else "0" for x in row) for row in found.tolist()] == PINNED


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_share_dropped_is_the_rate_in_every_row_column_and_pair_of_rows(rate: float) -> None:
    n = 1024
    mask = (~every_pair(dropped(n, rate), 1, 2, torch.arange(n))).double()[0]
    deviation = (rate * (1 - rate)) ** 0.5
    for part, count in ((mask, 2 * n * n), (mask.sum(-1) / n, n), (mask.sum(-2) / n, n)):
        mean = part.mean() if part.dim() == 3 else part
        limit = 4.0 if part.dim() == 3 else 6.0
        assert float((mean - rate).abs().max()) <= limit * deviation / count**0.5
    # Rows, columns and heads are as good as independent: correlations of 1 / sqrt(n) and no more.
    unit = (mask - rate) / deviation
    for x in (unit[0], unit[0].T):
        products = x @ x.T / n
        products.fill_diagonal_(0)
        assert float(products.abs().max()) <= 6.5 / n**0.5
        assert float(products.square().mean() * n) == pytest.approx(1.0, abs=0.02)
    assert abs(float((unit[0] * unit[1]).mean())) <= 4.0 / n
    assert abs(float((unit[0, :-1, :-1] * unit[0, 1:, 1:]).mean())) <= 4.0 / n


@pytest.mark.parametrize("name", ["key", "first_row", "first_head"])
def test_another_key_row_or_head_drops_others(name: str) -> None:
    drop = dropped(64, 0.5)
    other = replace(drop, **{name: getattr(drop, name) + 1})
    pairs = [every_pair(x, 1, 1, torch.arange(64)) for x in (drop, other)]
    assert 0.4 < float((pairs[0] == pairs[1]).double().mean()) < 0.6


def test_rows_heads_and_positions_are_global() -> None:
    whole = every_pair(dropped(12), 3, 4, torch.arange(20))
    part = dropped(5, first=7)
    part = replace(part, first_row=part.first_row + 1, first_head=part.first_head + 2)
    assert torch.equal(every_pair(part, 2, 2, torch.arange(3, 11)), whole[1:, 2:, 7:, 3:11])


def run(
    kind: str, dtype: torch.dtype, sinks: bool = False, softcap: float | None = None
) -> tuple[float, bool]:
    """Largest error of out, lse and gradients against the token loop; whether any pair fell."""
    made = torch.Generator().manual_seed(2)
    n, heads, groups = 11, 4, 2
    q, k, v, dout = (
        torch.randn(2, n, h, d, generator=made, dtype=torch.float64).to(dtype)
        for h, d in ((heads, 6), (groups, 6), (groups, 3), (heads, 3))
    )
    own, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    lo = zero
    if kind == "per_head":
        lo = (own[None] - torch.tensor([1, 100, 3, 3])[:, None]).clamp(min=0)
    spans = tuple(x.expand_as(lo) for x in (lo, own + 1, zero, zero))
    sink = torch.randn(heads, generator=made, dtype=torch.float64) if sinks else None
    options = {
        "scale": 0.6, "spans": spans, "k_positions": own, "softcap": softcap,
        "dropout": dropped(n),
    }  # fmt: skip
    out, lse = door.attention_forward(q, k, v, sinks=sink, **options)
    delta = door.attention_delta(out, dout)
    grads = door.attention_backward(q, k, v, lse, delta, dout, **options)
    leaves = [x.double().clone().requires_grad_() for x in (q, k, v)]
    want, want_lse = attention_reference(*leaves, sinks=sink, **options)
    wanted = [want, want_lse, *torch.autograd.grad(want, leaves, dout.double())]
    found = [out, lse, *grads]
    errors = [
        float((a.double() - b.detach()).abs().max()) for a, b in zip(found, wanted, strict=True)
    ]
    plain, _ = door.attention_forward(q, k, v, sinks=sink, **(options | {"dropout": None}))
    return max(errors), not torch.equal(plain, out)


@pytest.mark.parametrize("kind", ["causal", "per_head"])
@pytest.mark.parametrize("extra", [{}, {"sinks": True}, {"softcap": 1.5}], ids=str)
def test_equals_the_token_loop_forward_and_backward(
    kind: str, extra: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "_KEY_TOKENS", 3)
    monkeypatch.setattr(blockwise, "_BLOCK_SCORES", 1)
    error, fell = run(kind, torch.float64, **extra)
    assert fell
    assert error <= 1e-12
    assert run(kind, torch.float32, **extra)[0] <= 5e-6


def test_blocks_do_not_change_what_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(1, 70, 2, 4, dtype=torch.float64) for _ in range(3))
    own, zero = torch.arange(70), torch.zeros(70, dtype=torch.int64)
    spans: blocks.Spans = (zero, own + 1, zero, zero)
    options = {"scale": 0.5, "spans": spans, "k_positions": own, "dropout": dropped(70)}
    whole, _ = door.attention_forward(q, k, v, **options)
    monkeypatch.setattr(blockwise, "_KEY_TOKENS", 7)
    cut, _ = door.attention_forward(q, k, v, **options)
    assert float((whole - cut).abs().max()) <= 1e-13


def test_inputs_are_left_as_they_were() -> None:
    q, k, v, dout = (torch.randn(1, 9, 1, 4, dtype=torch.float64) for _ in range(4))
    own, zero = torch.arange(9), torch.zeros(9, dtype=torch.int64)
    options = {
        "scale": 0.5, "spans": (zero, own + 1, zero, zero), "k_positions": own,
        "dropout": dropped(9),
    }  # fmt: skip
    before = [x.clone() for x in (q, k, v, dout)]
    out, lse = door.attention_forward(q, k, v, **options)
    door.attention_backward(q, k, v, lse, (out * dout).sum(-1), dout, **options)
    assert all(torch.equal(x, y) for x, y in zip(before, (q, k, v, dout), strict=True))


def test_positions_and_rates_that_do_not_fit_raise() -> None:
    q = torch.zeros(1, 4, 1, 2)
    own, zero = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    options = {"scale": 1.0, "spans": (zero, own + 1, zero, zero), "k_positions": own}
    with pytest.raises(KernelError, match=r"query positions \(3,\) for 4"):
        door.attention_forward(q, q, q, dropout=dropped(3), **options)
    with pytest.raises(KernelError, match=r"\[0, 1\): got 1.0"):
        door.attention_forward(q, q, q, dropout=dropped(4, 1.0), **options)
