"""Calls on a card leave the host free: nothing is read back, and nothing copied there twice.

Meta stands for the card: its tensors have shapes alone, kernels are written down, and what would
read a number from it raises.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import xdist
from tests.kernels.host_traffic import HostTraffic
from tests.kernels.started_kernels import started
from xdist.memory.loss import _Sweep
from xdist.mesh import Mesh
from xdist.parallel import attention_call
from xdist.testing import relative_error
from xdist_kernels import cross_entropy
from xdist_kernels.attention.dropout import Dropped
from xdist_kernels.launch import HOPPER

N, CUTS = 24, (0, 5, 6, 24)


def test_traffic_is_seen() -> None:
    """What the other tests count would be counted."""
    card = torch.empty(3, device="meta")
    with HostTraffic() as seen:
        torch.arange(3.0).to("meta")
        card.copy_(torch.ones(3))
        card.new_tensor([1.0, 2.0])
        float(torch.ones(()))
        bool((torch.ones(2) > 0).all())
    assert len(seen.copies) == 3
    assert len(seen.reads) == 2
    with HostTraffic() as seen:
        card.mul_(2.0).add_(card).to(torch.float64)
        torch.full((), 3, device="meta")
    assert (seen.copies, seen.reads) == ([], [])


def test_dropout_s_words_are_made_on_the_card() -> None:
    positions = torch.arange(4, device="meta")
    drop = Dropped(0.5, 2**63 + 5, 7, 1, positions)
    with HostTraffic() as seen:
        words = drop.queries(2, slice(1, 3), slice(0, 4))
        kept = drop.kept(words, positions)
    assert kept.shape == (2, 2, 4, 4)
    assert (seen.copies, seen.reads) == ([], [])


def test_dropout_s_numbers_have_64_bits() -> None:
    """Rows, heads and keys at both ends of what a word holds, and past the last."""
    for key, row, head in (
        (2**64 - 1, 2**64 - 1, 2**63 - 1),
        (2**63, 2**63 - 1, 2**64 - 1),
        (0, 2**32 - 1, 2**31),
    ):
        drop = Dropped(0.5, key, row, head, torch.tensor([0, 2**62, 3]))
        keys = torch.tensor([0, 5, 2**40])
        found = drop.kept(drop.queries(2, slice(0, 2), slice(0, 3)), keys)
        wanted = [
            [[[drop.keeps(b, h, i, j) for j in keys.tolist()] for i in (0, 2**62, 3)]
             for h in range(2)] for b in range(2)
        ]  # fmt: skip
        assert found.tolist() == wanted


def test_the_loss_waits_for_no_number() -> None:
    """Forward and backward, with the gradient of 1 that most calls have."""
    hidden = torch.empty(2, N, 8, device="meta", requires_grad=True)
    head = torch.empty(50, 8, device="meta", requires_grad=True)
    labels = torch.empty(2, N, dtype=torch.int64, device="meta")
    with HostTraffic() as seen:
        xdist.cross_entropy(hidden, head, labels, valid_tokens=N).backward()
    assert hidden.grad is not None
    assert (seen.copies, seen.reads) == ([], [])


def test_a_factor_of_1_changes_no_bit_of_the_loss_s_gradients() -> None:
    """A card multiplies by the loss's gradient; a CPU looks first whether it is 1."""
    found = []
    for late in (1.0, 1.0 + 2.0**-40):  # the second one is multiplied by, and is 1 in float32
        torch.manual_seed(0)
        hidden, head = torch.randn(1, N, 8), torch.randn(50, 8)
        sweep = _Sweep(hidden, head, None, torch.float32, False, cross_entropy.kernels("torch"))
        sweep.run(torch.arange(N).view(1, N), -100, 1 / N)
        sweep.late = late
        dhidden, dhead, _ = sweep.gradients(torch.ones(()))
        found.append((dhidden, dhead))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def on_a_card(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def shard_of(documents: Any = CUTS) -> xdist.SequenceShard:
    return xdist.SequenceShard(Mesh.one_rank("meta"), xdist.Layout.contiguous(N, 1), documents)


def _attention(shard: Any, **options: Any) -> Tensor:
    q, k, v = on_a_card(1, N, 4, 32), on_a_card(1, N, 2, 32), on_a_card(1, N, 2, 32)
    return xdist.attention(q, k, v, shard, backend="triton", **options)


def _linear(shard: Any, sizes: tuple[int, ...], **options: Any) -> Any:
    q, k, v = (on_a_card(1, N, 2, 16) for _ in range(3))
    decay = on_a_card(1, N, 2, *sizes, dtype=torch.float32)
    return xdist.linear_attention(q, k, v, shard, log_decay=decay, backend="triton", **options)


def _both_ways(shard: Any) -> Tensor:
    given = {name: on_a_card(1, N, 2, 16) for name in ("q", "k", "v")}
    out: Tensor = xdist.bidirectional(
        xdist.linear_attention, given, None, shard, backend="triton", merge=True
    )
    return out


def _delta(shard: Any) -> Any:
    q, k, v = (on_a_card(1, N, 2, 16) for _ in range(3))
    beta = on_a_card(1, N, 2, dtype=torch.float32)
    return xdist.delta_rule(q, k, v, beta, shard, backend="triton")


def _selective(shard: Any) -> Any:
    u, delta = on_a_card(1, N, 8), on_a_card(1, N, 8)
    A, B, C = on_a_card(8, 4, dtype=torch.float32), on_a_card(1, N, 4), on_a_card(1, N, 4)
    return xdist.selective_scan(u, delta, A, B, C, shard, backend="triton")


def _conv(shard: Any, **options: Any) -> Any:
    x, weight = on_a_card(1, N, 8), on_a_card(8, 4)
    return xdist.causal_conv1d(x, weight, None, shard, backend="triton", **options)


CALLS: dict[str, Callable[[Any], Any]] = {
    "attention": partial(_attention, mask=xdist.Mask(window=5, prefix=2)),
    "attention, a window a head": partial(_attention, mask=xdist.Mask(window=[3, None, 1, 2])),
    "attention, dropout": partial(
        _attention, mask=xdist.Mask(), dropout=xdist.Dropout(0.1, seed=1)
    ),
    "linear": partial(_linear, sizes=()),
    "linear, reverse": partial(_linear, sizes=(16,), reverse=True),
    "linear, both ways": _both_ways,
    "delta": _delta,
    "selective_scan": _selective,
    "conv": _conv,
    "conv, reverse": partial(_conv, reverse=True),
}


def traffic_of(call: Callable[[Any], Any], shard: Any) -> tuple[list[str], list[str], list[str]]:
    """Copies, reads and the names of kernels of one forward and backward."""
    with started(HOPPER) as found, HostTraffic() as seen:
        out = call(shard)
        out.backward(torch.empty_like(out))
    return seen.copies, seen.reads, [one.kernel for one in found]


@pytest.mark.parametrize("name", CALLS)
def test_a_second_layer_copies_and_reads_nothing(name: str) -> None:
    """Calls of one shard with packed documents: the first may copy integers to the card, none
    reads a number."""
    shard = shard_of()
    first, second = (traffic_of(CALLS[name], shard) for _ in range(2))
    assert second[:2] == ([], [])
    assert first[1] == []
    assert set(second[2]) <= set(first[2])
    assert second[2]


MASKS = [xdist.Mask(), xdist.Mask(window=(3, 0), chunk=7), xdist.Mask(window=[3, None, 1, 2])]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_attention_without_a_shard_keeps_what_it_made(mask: xdist.Mask) -> None:
    """Spans, positions and plans of blocks are those of the last such call."""
    attention_call._remembered.cache_clear()
    call = partial(_attention, mask=mask)
    first, second = (traffic_of(call, None) for _ in range(2))
    assert first[0]
    assert any("plan" in kernel for kernel in first[2])
    assert second[:2] == ([], [])
    assert not any("plan" in kernel or "hulls" in kernel for kernel in second[2])
    assert [k for k in first[2] if "plan" not in k and "hulls" not in k] == second[2]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few calls, of rows that are not long, and only what goes to a card."""
    remembered = attention_call._remembered
    remembered.cache_clear()
    for window in range(2 * attention_call.MOST_REMEMBERED):
        traffic_of(partial(_attention, mask=xdist.Mask(window=window)), None)
    assert remembered.cache_info().currsize == attention_call.MOST_REMEMBERED
    remembered.cache_clear()
    monkeypatch.setattr(attention_call, "MOST_SPANS", 2 * N)
    traffic_of(partial(_attention, mask=MASKS[0]), None)
    assert remembered.cache_info().currsize == 1
    traffic_of(partial(_attention, mask=MASKS[2]), None)  # four heads, four sets of spans
    monkeypatch.setattr(attention_call, "MOST_SPANS", N - 1)
    traffic_of(partial(_attention, mask=MASKS[1]), None)
    x = torch.randn(1, N, 2, 8)
    xdist.attention(x, x, x, mask=xdist.Mask(window=2))
    assert remembered.cache_info().currsize == 1


def test_calls_without_a_shard_do_not_meet_another_s_mask() -> None:
    """Masks take turns, first in inference mode, then with gradients."""
    attention_call._remembered.cache_clear()
    torch.manual_seed(0)
    q = torch.randn(1, 9, 2, 4)
    masks = (xdist.Mask(), xdist.Mask(chunk=4), xdist.Mask(prefix=2, window=1))
    for mask in masks:
        wanted = xdist.attention(q, q, q, mask=mask, backend="torch")
        with torch.inference_mode():
            first = xdist.attention(q, q, q, mask=mask, backend="triton")
        assert relative_error(first, wanted) < 2e-6
    for mask in masks:
        grads: list[Tensor] = []
        for backend in ("triton", "torch"):
            leaf = q.clone().requires_grad_()
            out = xdist.attention(leaf, leaf, leaf, mask=mask, backend=backend)
            grads.append(torch.autograd.grad(out.square().sum(), leaf)[0])
        assert relative_error(grads[0], grads[1]) < 1e-5
