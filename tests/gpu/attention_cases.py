"""Attention as it is measured on a card: masks, inputs, and who can compute them.

A method is a pair of calls, forward and backward, that share what forward gave:
    triton       our kernels, called as xdist's strategies call them
    xdist        the public function with backend="auto": whichever it takes, all of its Python
    cudnn, flash_attn, flash_sdpa    the kernels of others by xdist_kernels' own calls of them
    flex         torch's compiled flex_attention with a block mask
    dense        torch's scaled_dot_product_attention with a mask of n x n
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gpu_rivals
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import xdist
from xdist_kernels import attention
from xdist_kernels.attention import libraries
from xdist_kernels.attention.blocks import Spans

OURS, PUBLIC = "triton", "xdist"


def rivals() -> tuple[str, ...]:
    """Those that are here; a table names the absent ones."""
    here = [n for n in libraries.LIBRARIES if n != "flash_attn" or gpu_rivals.has("flash-attn")]
    return (*here, "flex", "dense")


@dataclass(frozen=True)
class Case:
    """One call: batch 1, `groups` key heads for `heads` query heads of `dim`, values of `width`.

    mask: arguments of `xdist.Mask`. documents: how many are packed, of drawn lengths; 0 is one.
    turned: keys and queries lie as a rank of two holds them after a zigzag's switch.
    """

    name: str
    tokens: int
    mask: dict[str, Any] = field(default_factory=dict)
    documents: int = 0
    heads: int = 16
    groups: int = 4
    dim: int = 128
    width: int = 128
    softcap: float | None = None
    sinks: bool = False
    turned: bool = False
    rivals: tuple[str, ...] = libraries.LIBRARIES

    def cuts(self) -> list[int]:
        """Where documents begin and end; lengths differ by up to e^3."""
        if self.documents < 2:
            return [0, self.tokens]
        made = torch.Generator().manual_seed(0)
        weights = torch.rand(self.documents, generator=made, dtype=torch.float64).mul_(3.0).exp_()
        ends = (weights.cumsum(0) / weights.sum() * self.tokens).round_().long().tolist()
        return sorted({0, *ends[:-1], self.tokens})

    def order(self) -> Tensor:
        """Global positions, as tokens lie."""
        at = torch.arange(self.tokens)
        quarter = self.tokens // 4
        if not self.turned:
            return at
        parts = at[:quarter], at[3 * quarter :], at[quarter : 3 * quarter]
        return torch.cat(parts)

    def spans(self) -> Spans:
        """What the queries see, on the CPU."""
        cuts = torch.tensor(self.cuts())
        at = self.order()
        number = torch.searchsorted(cuts, at, right=True) - 1
        start, stop = cuts[number], cuts[number + 1]
        mask = xdist.Mask(**self.mask)
        if mask.chunk is not None:
            start = start + (at - start) // mask.chunk * mask.chunk
            stop = torch.minimum(stop, start + mask.chunk)
        left, right = _sides(self.mask)
        lo = start if left is None else torch.maximum(start, at - left)
        hi = stop if right is None else torch.minimum(stop, at + 1 + right)
        hi = torch.minimum(hi, at + 1) if mask.causal else hi
        zero = torch.zeros_like(at)
        if not mask.prefix:
            return lo, hi, zero, zero
        seen = torch.minimum(start + mask.prefix, stop)
        return torch.maximum(lo, seen), hi, start, seen

    def pairs(self) -> int:
        """Of queries and keys that see each other, a head."""
        lo, hi, prefix_lo, prefix_hi = self.spans()
        return int(((hi - lo).clamp(min=0) + (prefix_hi - prefix_lo).clamp(min=0)).sum())

    def flops(self) -> float:
        """Of the products of one forward; a backward has 2.5 times as many."""
        return 2.0 * self.pairs() * self.heads * (self.dim + self.width)


def _sides(mask: dict[str, Any]) -> tuple[int | None, int | None]:
    window, causal = mask.get("window"), mask.get("causal", True)
    if isinstance(window, tuple):
        return window
    return window, (0 if causal else window) if window is not None else None


class Inputs(NamedTuple):
    """q `[1,n,H,D]`, k `[1,n,G,D]`, v `[1,n,G,E]`, dout `[1,n,H,E]`, sinks `[H]` or None; spans and
    positions on the device."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    sinks: Tensor | None
    spans: Spans
    at: Tensor

    def leaves(self) -> Inputs:
        """The same values as leaves that want a gradient."""
        tensors = [x.detach().requires_grad_() for x in (self.q, self.k, self.v)]
        return self._replace(q=tensors[0], k=tensors[1], v=tensors[2])

    def to(self, dtype: torch.dtype) -> Inputs:
        tensors = [x.to(dtype) for x in (self.q, self.k, self.v, self.dout)]
        sinks = None if self.sinks is None else self.sinks.to(dtype)
        return Inputs(*tensors, sinks, self.spans, self.at)


def draw(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Normal numbers, drawn on the device in float32."""
    made = torch.Generator(device=device).manual_seed(seed)

    def normal(heads: int, dim: int) -> Tensor:
        size = (1, case.tokens, heads, dim)
        return torch.randn(size, generator=made, device=device).to(dtype)

    sinks = torch.randn(case.heads, generator=made, device=device) if case.sinks else None
    lo, hi, prefix_lo, prefix_hi = (s.to(device) for s in case.spans())
    return Inputs(
        normal(case.heads, case.dim),
        normal(case.groups, case.dim),
        normal(case.groups, case.width),
        normal(case.heads, case.width),
        sinks,
        (lo, hi, prefix_lo, prefix_hi),
        case.order().to(device),
    )


# forward() -> (out, lse or None); backward(out, lse) -> dq, dk, dv
Forward = Callable[[], tuple[Tensor, Tensor | None]]
Backward = Callable[[Tensor, Tensor | None], tuple[Tensor, ...]]


class Method(NamedTuple):
    """takes: what serves, where the method chooses. anew: forward with its plan of blocks made
    again, which calls that see alike share."""

    forward: Forward
    backward: Backward
    takes: str = ""
    anew: Forward | None = None


def method(name: str, case: Case, x: Inputs) -> Method | str:
    """The calls, or why there are none."""
    if name in libraries.LIBRARIES:
        return _library(name, case, x)
    if name in ("flex", "dense"):
        refused = case.sinks or (name == "dense" and case.softcap is not None)
        if refused:
            return "it has no such option"
        return _flex(case, x) if name == "flex" else _dense(case, x)
    return _public(case, x) if name == PUBLIC else kernels(name, case, x)


def kernels(name: str, case: Case, x: Inputs, **more: Any) -> Method | str:
    """Our kernels of backend `name`; what Triton's give is in q's dtype, as where nothing is
    added to it."""
    if name == OURS:
        why = attention.refusal(x.q, x.k, x.v, softcap=case.softcap, dropout=None)
        if why is not None:
            return why
    found = attention.kernels(name)
    if name == OURS:
        more = {"dtype": x.q.dtype, "plans": found.Plans(x.spans, x.at), **more}
    call = {
        "scale": case.dim**-0.5,
        "spans": x.spans,
        "k_positions": x.at,
        "softcap": case.softcap,
        **more,
    }

    def forward(**fresh: Any) -> tuple[Tensor, Tensor]:
        options = {**call, **fresh}
        given: tuple[Tensor, Tensor] = found.attention_forward(
            x.q, x.k, x.v, sinks=x.sinks, **options
        )
        return given

    def backward(out: Tensor, lse: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(found.attention_backward(x.q, x.k, x.v, lse, None, x.dout, out=out, **call))

    if name != OURS:
        return Method(forward, backward, name)
    return Method(forward, backward, name, lambda: forward(plans=found.Plans(x.spans, x.at)))


def _library(name: str, case: Case, x: Inputs) -> Method | str:
    at = libraries.here(x.q.device)
    if at is None:
        return "tensors are on no GPU"
    if x.sinks is not None:
        return "it knows no sinks"
    plan = libraries.sequences_of(x.spans, x.at)
    shapes = libraries.shapes_of(x.q, x.k, x.v)
    taken = libraries.choose(at, shapes, plan, softcap=case.softcap, form=name)
    if taken.name is None:
        return taken.why.removeprefix(f"{name}: ")
    call = {
        "scale": case.dim**-0.5,
        "spans": x.spans,
        "k_positions": x.at,
        "softcap": case.softcap,
        "form": name,
    }

    def forward() -> tuple[Tensor, Tensor]:
        found = libraries.attention_forward(x.q, x.k, x.v, **call)
        assert found is not None
        return found

    def backward(out: Tensor, lse: Tensor | None) -> tuple[Tensor, ...]:
        assert lse is not None
        found = libraries.attention_backward(x.q, x.k, x.v, lse, out, x.dout, **call)
        assert found is not None
        return found

    return Method(forward, backward, name)


def _differentiable(call: Callable[[Tensor, Tensor, Tensor], Tensor], x: Inputs) -> Method:
    """A function of torch's autograd: its backward is that of the graph forward left."""
    leaves = x.leaves()
    inputs = [leaves.q, leaves.k, leaves.v]

    def backward(out: Tensor, lse: Tensor | None) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, inputs, x.dout, retain_graph=True)

    return Method(lambda: (call(*inputs), None), backward)


def _public(case: Case, x: Inputs) -> Method:
    mesh = xdist.Mesh.one_rank(str(x.q.device))
    cuts = case.cuts() if case.documents > 1 else None
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(case.tokens, 1), cuts)
    options = {"mask": xdist.Mask(**case.mask), "softcap": case.softcap, "sinks": x.sinks}
    made = _differentiable(lambda q, k, v: xdist.attention(q, k, v, shard, **options), x)
    taken = libraries.take(
        x.q, x.k, x.v, spans=x.spans, k_positions=x.at, softcap=case.softcap, sinks=case.sinks
    )
    why = attention.refusal(x.q, x.k, x.v, softcap=case.softcap, dropout=None)
    own = OURS if x.q.is_cuda and why is None else "torch"
    return made._replace(takes=taken.name or own)


def flex_mask(case: Case, x: Inputs) -> Callable[..., Tensor]:
    """The mask as flex attention takes it: (batch, head, query, key) -> whether it sees."""
    # No more is read than the mask needs: each number costs flex attention time.
    lo, hi, prefix_lo, prefix_hi = (s.int() for s in x.spans)
    at = x.at.int() if case.turned else None

    def own(b: Any, h: Any, i: Any, j: Any) -> Tensor:
        key = j if at is None else at[j]
        return (key >= lo[i]) & (key < hi[i])

    def with_prefix(b: Any, h: Any, i: Any, j: Any) -> Tensor:
        key = j if at is None else at[j]
        return own(b, h, i, j) | ((key >= prefix_lo[i]) & (key < prefix_hi[i]))

    return with_prefix if case.mask.get("prefix") else own


def _flex(case: Case, x: Inputs) -> Method:
    import torch._functorch.config as functorch_config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n, cap = case.tokens, case.softcap
    # Each case compiles for itself: after a few masks torch.compile takes no further one, and runs
    # flex attention uncompiled, over a matrix of n x n scores, without an error.
    torch._dynamo.reset()
    # Backward is timed again and again over one forward: it may not reuse what forward saved.
    functorch_config.donated_buffer = False
    made = torch.compile(create_block_mask, dynamic=False)
    block_mask = made(flex_mask(case, x), None, None, n, n, device=x.q.device)
    capped = None if cap is None else lambda s, b, h, i, j: cap * torch.tanh(s / cap)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = compiled(q, k, v, score_mod=capped, block_mask=block_mask, enable_gqa=True)
        return out.transpose(1, 2)

    return _differentiable(call, x)


def _dense(case: Case, x: Inputs) -> Method:
    lo, hi, prefix_lo, prefix_hi = (s.unsqueeze(1) for s in x.spans)
    seen = (x.at >= lo) & (x.at < hi) | (x.at >= prefix_lo) & (x.at < prefix_hi)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Heads repeated: with enable_gqa and a mask torch has none but its slowest form.
        k, v = (t.repeat_interleave(case.heads // case.groups, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return out.transpose(1, 2)

    return _differentiable(call, x)
