"""Merging partial attention: exact, and never a NaN out of numbers."""

from __future__ import annotations

import pytest
import torch

from xdist_kernels.attention.torch import attention_forward
from xdist_kernels.errors import KernelError
from xdist_kernels.merge.reference import merge_reference
from xdist_kernels.merge.torch import merge_


def drawn(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    out = torch.randn(rows, 5, generator=made, dtype=torch.float64)
    lse = torch.randn(rows, generator=made, dtype=torch.float64) * 40
    empty = torch.arange(rows) % (seed + 2) == 0
    return out.masked_fill(empty[:, None], 0), lse.masked_fill(empty, -torch.inf)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_equals_the_row_loop(dtype: torch.dtype, limit: float) -> None:
    parts = [drawn(24, seed) for seed in range(4)]
    want, want_lse = merge_reference(parts)
    out, lse = (x.to(dtype).clone() for x in parts[0])
    for other, other_lse in parts[1:]:
        merge_(out, lse, other.to(dtype), other_lse.to(dtype))
    empty = want_lse == -torch.inf
    assert bool(empty.any())
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any()
    assert float((out - want).abs().max()) <= limit
    assert float((lse - want_lse)[~empty].abs().max()) <= limit * 100


def test_rows_that_see_nothing_never_make_a_nan() -> None:
    out, lse = torch.zeros(3, 2), torch.full((3,), -torch.inf)
    merge_(out, lse, torch.zeros(3, 2), torch.full((3,), -torch.inf))
    assert not out.any()
    assert torch.equal(lse, torch.full((3,), -torch.inf))
    merge_(out, lse, torch.ones(3, 2), torch.tensor([0.0, 300.0, -torch.inf]))
    assert torch.equal(out, torch.tensor([[1.0, 1], [1, 1], [0, 0]]))
    merge_(out, lse, torch.zeros(3, 2), torch.full((3,), -torch.inf))
    assert torch.equal(out, torch.tensor([[1.0, 1], [1, 1], [0, 0]]))


def test_halves_of_the_keys_merge_to_the_whole() -> None:
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 12, 3, 4, generator=made, dtype=torch.float64) for _ in range(3))
    own, zero = torch.arange(12), torch.zeros(12, dtype=torch.int64)
    options = {"scale": 0.5, "spans": (zero, own + 1, zero, zero)}
    want, want_lse = attention_forward(q, k, v, k_positions=own, **options)
    out, lse = attention_forward(q, k[:, :7], v[:, :7], k_positions=own[:7], **options)
    merge_(out, lse, *attention_forward(q, k[:, 7:], v[:, 7:], k_positions=own[7:], **options))
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-13)


def test_narrow_or_unequal_partials_raise() -> None:
    out, lse = torch.zeros(3, 2), torch.zeros(3)
    with pytest.raises(KernelError, match="float32 or float64"):
        merge_(out.bfloat16(), lse, out.bfloat16(), lse)
    with pytest.raises(KernelError, match="differ in shape"):
        merge_(out, lse, out[:2], lse[:2])
