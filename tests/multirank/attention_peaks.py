"""Peak memory of a strategy of attention by itself: kernels that only allocate what they return."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import xdist
from tests.multirank.attention_cases import Case, shards
from xdist_kernels.attention import torch as kernels
from xdist_kernels.attention.torch import attention_delta
from xdist_kernels.merge.torch import merge_


class PeakBytes:
    """The most bytes of CPU memory torch held at once inside the block, beyond the start."""

    def __enter__(self) -> PeakBytes:
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)
        held = self.peak_bytes = 0
        events = self._profile.profiler.kineto_results.events()
        for event in sorted(events, key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                self.peak_bytes = max(self.peak_bytes, held)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=_wide(q))
    lse = q.new_zeros(q.shape[:3], dtype=_wide(q))
    if options.get("into") is None:
        return out, lse
    merge_(*options["into"], out, lse)
    return options["into"]


def _backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Any, dout: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    if delta is None:
        attention_delta(options["out"], dout)  # as every form but one
    dq, dk, dv = (torch.zeros(x.shape, dtype=_wide(x)) for x in (q, k, v))
    return dq, dk, dv


@contextmanager
def kernels_that_only_allocate() -> Iterator[None]:
    """What a strategy itself holds: its messages, blocks, sums and results."""
    known = kernels.attention_forward, kernels.attention_backward
    kernels.attention_forward = _forward
    kernels.attention_backward = _backward  # type: ignore[assignment]
    try:
        yield
    finally:
        kernels.attention_forward, kernels.attention_backward = known


@dataclass(frozen=True)
class Peaks:
    """Bytes of one rank beyond its inputs: forward without and with a backward to come, backward
    beyond what forward left, and what that is."""

    alone: int
    forward: int
    backward: int
    kept: int


def peaks(case: Case, *, computed: bool = False) -> Peaks:
    """Measures one call on this rank, by kernels that only allocate, or as it is `computed`."""
    shard, _ = shards(case)
    n = shard.local_length
    q = torch.randn(case.batch, n, case.heads, case.dim).to(case.dtype)
    k = torch.randn(case.batch, n, case.groups, case.dim).to(case.dtype)
    v = torch.randn(case.batch, n, case.groups, case.value_dim).to(case.dtype)
    dout = torch.randn(case.batch, n, case.heads, case.value_dim).to(case.dtype)

    def call() -> Tensor:
        return xdist.attention(
            q, k, v, shard, mask=case.mask, strategy=case.strategy, head_chunks=case.head_chunks
        )

    with nullcontext() if computed else kernels_that_only_allocate():
        call()  # what a first call makes once is not counted
        with torch.no_grad(), PeakBytes() as alone:
            call()
        for x in (q, k, v):
            x.requires_grad_()
        with PeakBytes() as forward:
            out = call()
        kept = _held(out)
        with PeakBytes() as backward:
            torch.autograd.grad(out, (q, k, v), dout)
    return Peaks(alone.peak_bytes, forward.peak_bytes, backward.peak_bytes, kept)


def _held(out: Tensor) -> int:
    """Bytes of the tensors that `out`'s function saved for backward."""
    node = out.grad_fn
    assert node is not None
    saved = {x.untyped_storage().data_ptr(): x for x in node.saved_tensors if x is not None}
    return sum(x.untyped_storage().nbytes() for x in saved.values())
