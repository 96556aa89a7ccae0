"""Merging partial softmax results in place."""

from __future__ import annotations

import torch
from torch import Tensor

from xdist_kernels.errors import KernelError


def merge_(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Adds the attention over other keys to (`out`, `lse`), in place.

    out, other_out `[..., E]`; lse, other_lse `[...]`; float32 or float64 (a running sum in a
    narrower dtype would lose what it adds). With z = exp(lse) + exp(other_lse):
    out = exp(lse)/z out + exp(other_lse)/z other_out, lse = log z. A row with lse -inf holds no
    keys and adds nothing; two such rows give out 0 and lse -inf. Never makes a NaN of numbers.
    """
    check(out, lse, other_out, other_lse)
    merged = torch.logaddexp(lse, other_lse)
    # Both empty: merged is -inf and (-inf) - (-inf) a NaN; any finite base gives weights 0.
    base = merged.masked_fill(merged == -torch.inf, 0.0)
    out.mul_((lse - base).exp_().unsqueeze(-1))
    out.addcmul_(other_out, (other_lse - base).exp_().unsqueeze(-1))
    lse.copy_(merged)


def merge_sinks_(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """Adds one logit per head that takes probability and has no value, in place.

    out `[B,n,H,E]`, lse `[B,n,H]`, sinks `[H]`. A row without keys keeps output 0; its lse becomes
    the sink's.
    """
    merged = torch.logaddexp(lse, sinks.to(lse.dtype).expand_as(lse))
    base = merged.masked_fill(merged == -torch.inf, 0.0)
    out.mul_((lse - base).exp_().unsqueeze(-1))
    lse.copy_(merged)


def check(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Raise KernelError where partial results are too narrow or differ in shape."""
    if out.dtype not in (torch.float32, torch.float64) or other_out.dtype != out.dtype:
        raise KernelError(
            f"partial results merge in float32 or float64: got {out.dtype} and {other_out.dtype}"
        )
    if out.shape != other_out.shape or lse.shape != other_lse.shape or out.shape[:-1] != lse.shape:
        raise KernelError(
            "partial results differ in shape: "
            f"out {tuple(out.shape)} and {tuple(other_out.shape)}, "
            f"lse {tuple(lse.shape)} and {tuple(other_lse.shape)}"
        )
