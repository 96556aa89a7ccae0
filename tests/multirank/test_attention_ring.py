"""The ring and its rows: order of travel and work, width of sums, memory, rounding in depth."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

import xdist
from tests.multirank.attention_cases import Case, mesh_of, segments, shards
from tests.multirank.attention_peaks import Peaks, peaks
from xdist.comm.pending import Pending
from xdist.layout import Layout
from xdist.mask import Mask
from xdist.parallel.attention_blocks import Blocks
from xdist.testing import RankPool, relative_error
from xdist_kernels.attention import torch as kernels

FORWARD = "start keys, work, wait keys, start keys, work, wait keys, work"
# Gradients of a block travel home while the next block is worked on.
BACKWARD = (
    "start keys, work, wait keys, start keys, work, start gradients, wait keys, work, "
    "wait gradients, start gradients, wait gradients"
)


class Noting:
    """Notes, on this rank, when blocks start, are waited for and are worked on."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.dtypes: set[torch.dtype] = set()

    def __enter__(self) -> Noting:
        self._keys, self._gradients = Blocks.start_keys, Blocks.start_gradients
        self._works = kernels.attention_forward, kernels.attention_backward
        self._merge = kernels.merge_
        Blocks.start_keys = self._started("keys", self._keys)  # type: ignore[method-assign]
        Blocks.start_gradients = self._started(  # type: ignore[method-assign]
            "gradients", self._gradients
        )
        forward, backward = map(self._worked, self._works)
        kernels.attention_forward, kernels.attention_backward = forward, backward
        kernels.merge_ = self._merged
        return self

    def __exit__(self, *error: object) -> None:
        Blocks.start_keys = self._keys  # type: ignore[method-assign]
        Blocks.start_gradients = self._gradients  # type: ignore[method-assign]
        kernels.attention_forward, kernels.attention_backward = self._works
        kernels.merge_ = self._merge

    def _started(
        self, what: str, start: Callable[..., Pending[Any]]
    ) -> Callable[..., Pending[Any]]:
        def started(*args: Any) -> Pending[Any]:
            self.said.append(f"start {what}")
            if what == "gradients":
                self.dtypes |= {x.dtype for pair in args[1].values() for x in pair}
            pending = start(*args)

            def finish() -> Any:
                self.said.append(f"wait {what}")
                return pending.wait()

            return Pending(finish)

        return started

    def _worked(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def worked(*args: Any, **options: Any) -> Any:
            self.said.append("work")
            return work(*args, **options)

        return worked

    def _merged(self, *args: Tensor) -> None:
        self.dtypes |= {x.dtype for x in args}
        self._merge(*args)


def noted(case: Case) -> tuple[str, str, set[torch.dtype]]:
    """Forward and backward of one call, in words, and the dtypes of sums over blocks."""
    shard, _ = shards(case)
    q = torch.randn(1, shard.local_length, case.heads, 4).to(case.dtype).requires_grad_()
    with Noting() as forward:
        out = xdist.attention(q, q, q, shard, mask=case.mask, strategy=case.strategy)
    with Noting() as backward:
        torch.autograd.grad(out, q, torch.ones_like(out))
    return ", ".join(forward.said), ", ".join(backward.said), forward.dtypes | backward.dtypes


def test_each_block_travels_while_the_one_before_is_worked_on(pool3: RankPool) -> None:
    layout = segments(Layout.contiguous(12, 3))
    case = Case("ring", layout, Mask(causal=False), 12, 2, 2, dtype=torch.float32)
    for forward, backward, _ in pool3.run(noted, case):
        assert forward == FORWARD
        assert backward == BACKWARD


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_partial_results_merge_and_travel_wide(
    pool4: RankPool, dtype: torch.dtype, wide: torch.dtype
) -> None:
    layout = segments(Layout.zigzag(16, 4))
    for strategy, inner in (("ring", 1), ("2d", 2)):
        case = Case(strategy, layout, Mask(), 16, 2, 2, dtype=dtype, ulysses=inner)
        assert [found[2] for found in pool4.run(noted, case)] == [{wide}] * 4


def measure(cases: list[Case]) -> list[Peaks]:
    return [peaks(case) for case in cases]


def test_two_axes_hold_a_rows_keys_of_their_heads_and_two_blocks(pool4: RankPool) -> None:
    """In shares (keys and values of one rank): no more than ring, and gather holds three more."""
    tokens, share = 256, 256 * 4 * 2 * 64 * 4
    layout = segments(Layout.zigzag(4 * tokens, 4))
    sizes = {"batch": 1, "dim": 64, "value_dim": 64, "dtype": torch.float32}
    names = (("ring", 1), ("2d", 2), ("gather", 1))
    cases = [
        Case(s, layout, Mask(causal=False), 4 * tokens, 4, 4, ulysses=u, **sizes) for s, u in names
    ]
    for found in pool4.run(measure, cases):
        ring, both, gather = ((x.alone / share, x.backward / share) for x in found)
        # Out and what merges with it, one block, one more arriving, one leaving.
        assert both[0] <= ring[0] + 1.1, found
        assert both[1] <= ring[1] + 1.6, found
        assert gather[0] >= 3, found


@pytest.mark.slow
def test_four_rows_hold_no_more_than_their_steps(pool8: RankPool) -> None:
    """In shares. Forward: two outputs, a block, one arriving, one leaving, and half of one's own.
    Backward, in full swing: as a ring's step, nine."""
    layout, share = segments(Layout.zigzag(256 * 8, 8)), 256 * 4 * 2 * 64 * 4
    sizes = {"batch": 1, "dim": 64, "value_dim": 64, "dtype": torch.float32}
    cases = [
        Case(s, layout, Mask(causal=False), 256 * 8, 4, 4, ulysses=2, **sizes)
        for s in ("2d", "gather")
    ]
    for both, gather in pool8.run(measure, cases):
        assert both.alone <= 5.6 * share
        assert both.backward <= 9.1 * share
        assert gather.alone >= 7 * share


LAYERS, HEADS, DIM = 24, 2, 16


def deep(
    seed: int, shard: xdist.SequenceShard | None, dtype: torch.dtype, n: int = 96
) -> dict[str, Tensor]:
    """24 layers of normed causal attention with a residual; bfloat16 values, summed as `dtype`
    asks. Gives this rank's output and gradient of the input."""
    made = torch.Generator().manual_seed(seed)
    width = HEADS * DIM
    x, dout = torch.randn(2, 1, n, width, generator=made).bfloat16().to(dtype)
    weights = torch.randn(LAYERS, width, 4 * width, generator=made) * width**-0.5
    # As usual in deep models, what a layer adds shrinks with their number: else rounding grows from
    # layer to layer without a bound, and one seed's error says little of the next one's.
    weights[..., 3 * width :] *= LAYERS**-0.5
    weights = weights.bfloat16().to(dtype)
    if shard is not None:
        x, dout = shard.scatter(x), shard.scatter(dout)
    start = x.clone().requires_grad_()
    h = start
    for weight in weights:
        normed = torch.nn.functional.rms_norm(h, (width,))
        q, k, v = (
            part.unflatten(-1, (HEADS, DIM))
            for part in (normed @ weight[:, : 3 * width]).chunk(3, dim=-1)
        )
        mixed = xdist.attention(q, k, v, shard, mask=Mask(), strategy="ring")
        h = h + mixed.flatten(2) @ weight[:, 3 * width :]
    (dx,) = torch.autograd.grad(h, start, dout)
    return {"out": h.detach(), "dx": dx}


def deep_on_ranks(seeds: range, n: int) -> list[dict[str, Tensor]]:
    mesh = mesh_of(8)
    assert mesh is not None
    shard = xdist.SequenceShard(mesh, Layout.zigzag(n, 8))
    found = [deep(seed, shard, torch.bfloat16, n) for seed in seeds]
    return [{name: shard.gather(x) for name, x in one.items()} for one in found]


@pytest.mark.slow
def test_a_deep_ring_rounds_no_more_than_one_rank(pool8: RankPool) -> None:
    """8 ranks, 24 layers, bfloat16: error against float64 at most 1.5 times one rank's."""
    seeds, n = range(5), 96
    ranks = pool8.run(deep_on_ranks, seeds, n)[0]
    for name in ("out", "dx"):
        ours, one = [], []
        for seed in seeds:
            exact = deep(seed, None, torch.float64, n)[name]
            ours.append(relative_error(ranks[seed][name].double(), exact))
            one.append(relative_error(deep(seed, None, torch.bfloat16, n)[name].double(), exact))
        assert median(ours) <= 1.5 * median(one), (name, ours, one)
