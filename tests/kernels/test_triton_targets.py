"""Blocks for sm_80 and for sm_90: where they differ, and that the older card's give the results.

The interpreter knows no card; wrappers choose for sm_90 there. So kernels that differ are run here,
or beside their family's tests, as they are started on sm_80.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.started_kernels import Started, started
from tests.kernels.test_triton_attention import Case, run_both, worst
from tests.kernels.triton_linear_cases import SCALE, drawn, narrowed
from xdist_kernels import ahead
from xdist_kernels.attention import triton as attention
from xdist_kernels.launch import AMPERE, HOPPER
from xdist_kernels.linear import bidirectional, triton

# What differs in more than warps and stages. Run on sm_80's blocks in test_triton_attention.py
# (test_head_dims_whose_blocks_are_others_on_an_older_card) and in test_triton_delta.py
# (test_float16_in_the_blocks_of_an_older_card).
DIFFERENT = {
    "attention": {"attention_forward_kernel", "attention_dq_kernel", "attention_dkdv_kernel"},
    "delta": {"keys_kernel"},
}
# Made for the blocks of those, one for all that have the same.
PLANS = ("key_hulls_kernel", "query_hulls_kernel", "plan_queries_kernel", "plan_keys_kernel")
# Families that never ask what they are made for.
ALIKE = ("conv", "cross_entropy", "merge", "selective_scan")
FAMILIES = ("attention", "delta", "linear", *ALIKE)
HALF = (torch.float16, torch.bfloat16)


def on(target: Any, call: Callable[[], object]) -> list[Started]:
    with started(target) as found:
        call()
    return [one for one in found if one.kernel not in PLANS]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_decide_blocks_where_it_is_said_and_nowhere_else(family: str) -> None:
    """Every case that is compiled: the same kernels on the same arguments, but for blocks of wide
    heads in half precision (attention) and of a decay a key dim in half precision (delta)."""
    families, different = ahead.families(), set()
    assert set(families) == set(FAMILIES)
    for name, call in families[family].cases():
        old, new = on(AMPERE, call), on(HOPPER, call)
        assert [one.kernel for one in old] == [one.kernel for one in new], name
        for one, other in zip(old, new, strict=True):
            if family in ALIKE:
                assert one == other, name
            if one.work == other.work:
                continue
            different.add(one.kernel)
            if "BD" in one.given:
                assert one.given["p_q"][1] in HALF, name
                assert max(one.given["BD"], one.given["BE"]) > 64, name
            if family == "delta":
                assert one.given["p_q"][1] in HALF, name
                assert one.given["DECAY"] == 2, name
    assert different == DIFFERENT.get(family, set())


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
def test_attention_in_the_blocks_of_an_older_card_with_every_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A window a head, grouped queries, soft-cap, sinks, dropout, V != K, segments out of order."""
    monkeypatch.setattr(attention, "target_of", lambda device: AMPERE)
    case = Case("per_head", n=70, m=75, dim=96, value_dim=72, softcap=1.5, sinks=True, rate=0.3)
    assert worst(run_both(case, torch.float16)) <= 2 * 2.0**-11


def _linear(kind: str) -> list[Tensor | None]:
    """Outputs, states and gradients of linear attention, float16."""
    torch.manual_seed(0)
    decay = "scalar" if kind == "both directions" else kind
    given = drawn(70, decay, torch.float16, dims=(8, 6), heads=(1, 1))
    q, k, v, log_decay, state = narrowed(given, torch.float16)
    if kind == "both directions":
        sides = bidirectional.Sides(state, 2.0 * state)
        out, ends = bidirectional.run_merged(q, k, v, log_decay, None, sides, scale=SCALE)
        grads, before = bidirectional.backward_merged(
            q, k, v, log_decay, None, sides, out, sides, scale=SCALE
        )
        return [out, *ends, *grads, *before]
    tile = triton.prepare(q, k, v, log_decay, scale=SCALE)
    out, end = triton.run(tile, state)
    grads, first = triton.backward(tile, state, out, end)
    return [out, end, triton.advance(tile, state), *grads, first]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scalar", "diagonal", "both directions"])
def test_linear_attention_has_the_same_bits_on_either_target(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def older(device: torch.device) -> Any:
        asked.append(device)
        return AMPERE

    new = _linear(kind)
    for name in ("triton", "triton_states", "triton_scan", "triton_bidirectional"):
        monkeypatch.setattr(f"xdist_kernels.linear.{name}.target_of", older)
    old = _linear(kind)
    assert asked
    assert len(old) == len(new)
    for a, b in zip(old, new, strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
