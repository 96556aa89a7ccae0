"""Linear attention from both ends of a sequence, summed, on one device.

    out_a = scale * q_a^T (S_a + R_a)         S_t = exp(g_t) S_{t-1} + k_t v_t^T
                                              R_t = exp(g_t) R_{t+1} + k_t v_t^T

The current token counts in both directions. As a non-causal layer: Zhu et al., "Vision Mamba"
(2024), section 3.3. Triton makes the sum in one go (triton_bidirectional.py) where there is none or
one decay a token and head; a decay for every key dim, and the other forms, take two calls. A call
is one tile: states of all its spans of 256 tokens exist at once.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xdist_kernels import backend as backends
from xdist_kernels import linear
from xdist_kernels.autocast import in_given_dtypes
from xdist_kernels.errors import KernelError
from xdist_kernels.linear.chunks import collect, state_dtype
from xdist_kernels.linear.inputs import canonical_decay, check


class Sides(NamedTuple):
    """A pair of states [B,H,K,V]: of the direction of positions, and of the other one."""

    forward: Tensor
    backward: Tensor


def bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    starts: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The sum of both directions, [B,n,H,V] in the dtype of v; states start at zero.

    q, k [B,n,Hk,K], v [B,n,H,V]; log_decay None, [H], [B,n,H] or [B,n,H,K]; scale None is K**-0.5;
    starts bool [n]: True where a document starts (never the first token); backend: triton, torch,
    reference or auto.

    Saved for backward: the inputs.

    Raises:
        KernelError: shapes that do not fit, or a backend that cannot serve.
    """
    check(q, k, v, log_decay)
    name = backends.choose(
        "bidirectional", backend, v.device, lambda: linear.refusal(q, k, v, log_decay)
    )
    decay = None if log_decay is None else log_decay.to(state_dtype(q))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    found: Tensor = _Bidirectional.apply(
        q, k, v, canonical_decay(decay, v, q.shape[3]), starts, scale, name
    )
    return found


def _merges(name: str, log_decay: Tensor | None) -> bool:
    return name == "triton" and (log_decay is None or log_decay.shape[3] == 1)


class _Bidirectional(torch.autograd.Function):
    @staticmethod
    @in_given_dtypes
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        starts: Tensor | None,
        scale: float,
        name: str,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, log_decay, starts)
        ctx.scale, ctx.name = scale, name
        zero = _zero(k, v)
        sides = Sides(zero, zero)
        if _merges(name, log_decay):
            return run_merged(q, k, v, log_decay, starts, sides, scale=scale)[0]
        return run_twice(q, k, v, log_decay, starts, sides, scale=scale, backend=name)[0]

    @staticmethod
    @in_given_dtypes
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise KernelError("bidirectional has no second derivative: leave create_graph out")
        q, k, v, log_decay, starts = ctx.saved_tensors
        zero = _zero(k, v)
        sides = Sides(zero, zero)
        if _merges(ctx.name, log_decay):
            grads, _ = backward_merged(
                q, k, v, log_decay, starts, sides, dout, sides, scale=ctx.scale
            )
        else:
            grads, _ = backward_twice(
                q, k, v, log_decay, starts, sides, dout, sides, scale=ctx.scale, backend=ctx.name
            )
        return (*grads, None, None, None)


def _zero(k: Tensor, v: Tensor) -> Tensor:
    shape = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    return v.new_zeros(shape, dtype=state_dtype(v))


def run_merged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    starts: Tensor | None,
    before: Sides,
    *,
    scale: float,
) -> tuple[Tensor, Sides]:
    """Triton: out [B,T,H,V], and the states at the ends of both directions.

    log_decay [B,T,H,1]; before: the state before the first token, and the one behind the last.
    """
    from xdist_kernels.linear import triton_bidirectional as merged
    from xdist_kernels.linear.triton import prepare

    p = prepare(q, k, v, log_decay, scale=scale, starts=starts)
    decay = merged.running(log_decay)
    states, mirrored, after = _states(p, decay, before)
    what = merged.Sources(p.q, p.k, p.v, states, mirrored, adjoint=False, transposed=False)
    out, _ = merged.scans_both(what, decay, p.ids, heads=p.heads, scale=scale)
    return out, after


def _states(p: Any, decay: Any, before: Sides) -> tuple[Tensor, Tensor, Sides]:
    from xdist_kernels.linear import triton_bidirectional as merged
    from xdist_kernels.linear.triton_states import chain

    sums, others = merged.sums_both(p.k, p.v, decay, p.ids, heads=p.heads, scale=1.0, adjoint=False)
    states, last = chain(sums, before.forward, reverse=False, keep=True)
    mirrored, first = chain(others, before.backward, reverse=True, keep=True)
    assert states is not None
    assert mirrored is not None
    return states, mirrored, Sides(last, first)


def backward_merged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    starts: Tensor | None,
    before: Sides,
    dout: Tensor,
    dafter: Sides,
    *,
    scale: float,
) -> tuple[tuple[Tensor | None, ...], Sides]:
    """Triton: (dq, dk, dv, dlog_decay), and the gradients of the states before."""
    from xdist_kernels.linear import triton_bidirectional as merged
    from xdist_kernels.linear.triton import prepare
    from xdist_kernels.linear.triton_gate import gate
    from xdist_kernels.linear.triton_states import chain, contiguous_last

    p = prepare(q, k, v, log_decay, scale=scale, starts=starts)
    dout = contiguous_last(dout.to(v.dtype))
    decay = merged.running(log_decay)
    heads, gated = p.heads, log_decay is not None
    states, mirrored, _ = _states(p, decay, before)
    dsums, dothers = merged.sums_both(
        p.q, dout, decay, p.ids, heads=heads, scale=scale, adjoint=True
    )
    dstates, dfirst = chain(dsums, dafter.forward, reverse=True, keep=True)
    dmirrored, dlast = chain(dothers, dafter.backward, reverse=False, keep=True)
    assert dstates is not None
    assert dmirrored is not None

    def scans(what: merged.Sources, rows: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return merged.scans_both(what, decay, p.ids, heads=heads, scale=scale, rows=rows)

    dq, q_rows = scans(
        merged.Sources(dout, p.v, p.k, states, mirrored, adjoint=False, transposed=True),
        p.q if gated else None,
    )
    dk, k_rows = scans(
        merged.Sources(p.v, dout, p.q, dstates, dmirrored, adjoint=True, transposed=True),
        p.k if gated else None,
    )
    dv, _ = scans(
        merged.Sources(p.k, p.q, dout, dstates, dmirrored, adjoint=True, transposed=False)
    )
    dlog = None
    if q_rows is not None and k_rows is not None:
        span = merged.SPAN_TOKENS
        dlog = gate(q_rows[0], k_rows[0], (states, dstates), p.ids, span=span)
        dlog += gate(q_rows[1], k_rows[1], (mirrored, dmirrored), p.ids, span=span, mirrored=True)
    group = max(1, heads // max(1, k.shape[2]))
    return (collect(dq, group), collect(dk, group), dv, dlog), Sides(dfirst, dlast)


def _mirror(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flip(1)


def _mirrored_starts(starts: Tensor | None) -> Tensor | None:
    """Documents begin behind where others end."""
    if starts is None:
        return None
    found = torch.zeros_like(starts)
    found[1:] = starts[1:].flip(0)
    return found


def run_twice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    starts: Tensor | None,
    before: Sides,
    *,
    scale: float,
    backend: str,
) -> tuple[Tensor, Sides]:
    """As `run_merged`, one direction after the other, on triton, torch or reference."""
    form = linear.kernels(backend)
    forth, back = _tiles(form, (q, k, v, log_decay), starts, scale)
    out, last = form.run(forth, before.forward)
    other, first = form.run(back, before.backward)
    wide = state_dtype(v)
    return (out.to(wide) + other.flip(1).to(wide)).to(v.dtype), Sides(last, first)


def _tiles(
    form: ModuleType, inputs: tuple[Tensor | None, ...], starts: Tensor | None, scale: float
) -> tuple[Any, Any]:
    q, k, v, log_decay = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    forth = form.prepare(q, k, v, log_decay, scale=scale, starts=starts)
    back = form.prepare(
        q.flip(1), k.flip(1), v.flip(1), _mirror(log_decay),
        scale=scale, starts=_mirrored_starts(starts),
    )  # fmt: skip
    return forth, back


def backward_twice(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    starts: Tensor | None,
    before: Sides,
    dout: Tensor,
    dafter: Sides,
    *,
    scale: float,
    backend: str,
) -> tuple[tuple[Tensor | None, ...], Sides]:
    """As `backward_merged`, one direction after the other."""
    form = linear.kernels(backend)
    forth, back = _tiles(form, (q, k, v, log_decay), starts, scale)
    grads, dfirst = form.backward(forth, before.forward, dout, dafter.forward)
    others, dlast = form.backward(back, before.backward, dout.flip(1), dafter.backward)
    found: list[Tensor | None] = []
    for one, other in zip(grads, others, strict=True):
        if one is None or other is None:
            found.append(None)
            continue
        wide = state_dtype(one)
        found.append((one.to(wide) + other.flip(1).to(wide)).to(one.dtype))
    return tuple(found), Sides(dfirst, dlast)
