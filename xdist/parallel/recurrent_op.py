"""The interface by which one scan serves every recurrence, and gated linear attention under it.

An op is affine in its state: S_out = M S_in + E, and its outputs are those from the zero state
plus a linear map of S_in. That is all a strategy uses: `summary` describes a run of tokens to
later ones, `adjoint_summary` describes its outputs' gradients to earlier ones, `run` and
`run_backward` compute, and the `apply` pair completes what was computed before the state came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from xdist.comm.scan import Transition
from xdist.cost.recurrent import Shares, shared_heads, split_heads
from xdist_kernels import linear

Local = Sequence[Tensor | None]  # an op's inputs with tokens in dim 1, or None where left out


class Summary(NamedTuple):
    """A run of tokens as a map of states: S_out = M S_in + E.

    transition: None (M = 1), or log M as [B,H] or [B,H,K], or M itself as [B,H,K,K]; which one
    is the op's `transition`.
    """

    transition: Tensor | None
    entry: Tensor  # E [B, H, K, V]


class RecurrentOp(Protocol):
    """One affine recurrence over plain tensors. Tokens of `local` are of one document, except in
    `run`, where `starts` marks the documents that begin inside."""

    @property
    def transition(self) -> Transition:
        """The kind of M."""

    def out_like(self, local: Local) -> Tensor:
        """The input that has the outputs' shape and dtype."""

    def state_shape(self, local: Local) -> tuple[int, ...]:
        """(B, H, K, V)."""

    def head_shares(self, local: Local, ranks: int) -> tuple[Shares, tuple[Shares | None, ...]]:
        """How strategy switch splits dim 2: of outputs and states, and of each input."""

    def summary(self, local: Local) -> Summary:
        """(M, E) of a run."""

    def transition_of(self, local: Local) -> Tensor | None:
        """M alone."""

    def adjoint_summary(self, local: Local, dout: Tensor) -> Tensor:
        """dE: the gradient of the state before the run from that of its outputs."""

    def run(
        self, local: Local, state_in: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """out, state_out and what `run_backward` needs beside `local`; state_in None is zero."""

    def run_backward(
        self,
        local: Local,
        starts: Tensor | None,
        saved: tuple[Tensor, ...],
        dout: Tensor,
        dstate_out: Tensor | None,
    ) -> tuple[list[Tensor | None], Tensor]:
        """Gradients of `local`, one per input, and dstate_in."""

    def apply_state(self, out: Tensor, local: Local, state: Tensor) -> None:
        """Add to `out` what a state before the run contributes."""

    def apply_state_backward(
        self, grads: Sequence[Tensor | None], local: Local, state: Tensor, dout: Tensor
    ) -> None:
        """Add to `grads` what comes through `apply_state`."""

    def apply_dstate(self, grads: Sequence[Tensor | None], local: Local, dstate: Tensor) -> None:
        """Add to `grads` what comes through E, given the gradient of the state after the run."""

    def apply_both(
        self, grads: Sequence[Tensor | None], local: Local, state: Tensor, dstate: Tensor
    ) -> None:
        """Add to `grads` what comes through M S, given the gradient of the state after the run."""


class _Inputs(NamedTuple):
    """`local` of linear attention, or its gradients, by name."""

    q: Tensor  # [B, n, Hk, K]
    k: Tensor  # [B, n, Hk, K]
    v: Tensor  # [B, n, H, V]
    log_decay: Tensor | None  # None, [B, n, H, 1] or [B, n, H, K]


def _named(local: Local) -> _Inputs:
    q, k, v, log_decay = local
    assert q is not None
    assert k is not None
    assert v is not None
    return _Inputs(q, k, v, log_decay)


@dataclass(frozen=True)
class LinearAttention:
    """S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T, o_t = scale * S_t^T q_t.

    `local` is (q, k, v, log_decay) as in `_Inputs`; `transition` is none, scalar or diagonal, as
    log_decay is.
    """

    scale: float
    transition: Transition

    def out_like(self, local: Local) -> Tensor:
        return _named(local).v

    def state_shape(self, local: Local) -> tuple[int, ...]:
        x = _named(local)
        return x.v.shape[0], x.v.shape[2], x.k.shape[3], x.v.shape[3]

    def head_shares(self, local: Local, ranks: int) -> tuple[Shares, tuple[Shares | None, ...]]:
        x = _named(local)
        values = split_heads(x.v.shape[2], ranks)
        keys = shared_heads(values, x.v.shape[2] // x.k.shape[2])
        return values, (keys, keys, values, None if x.log_decay is None else values)

    def summary(self, local: Local) -> Summary:
        x = _named(local)
        log_m, entry = linear.summary(x.k, x.v, x.log_decay)
        return Summary(self._travelling(log_m), entry)

    def transition_of(self, local: Local) -> Tensor | None:
        return self._travelling(self._log_m(local))

    def _log_m(self, local: Local) -> Tensor | None:
        x = _named(local)
        return linear.log_transition(x.log_decay, linear.state_dtype(x.v))

    def _travelling(self, log_m: Tensor | None) -> Tensor | None:
        return log_m.squeeze(-1) if log_m is not None and self.transition == "scalar" else log_m

    def adjoint_summary(self, local: Local, dout: Tensor) -> Tensor:
        x = _named(local)
        return linear.adjoint_summary(x.q, dout, x.log_decay, self.scale)

    def run(
        self, local: Local, state_in: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        out, state_out, saved = linear.linear_attention_forward(
            *_named(local), scale=self.scale, initial_state=state_in, resets=starts
        )
        return out, state_out, (saved.states,)

    def run_backward(
        self,
        local: Local,
        starts: Tensor | None,
        saved: tuple[Tensor, ...],
        dout: Tensor,
        dstate_out: Tensor | None,
    ) -> tuple[list[Tensor | None], Tensor]:
        x, (states,) = _named(local), saved
        kept = linear.Saved(x.q, x.k, x.v, x.log_decay, self.scale, states, starts)
        *grads, dstate_in = linear.linear_attention_backward(kept, dout, dstate_out)
        return list(grads), dstate_in

    def apply_state(self, out: Tensor, local: Local, state: Tensor) -> None:
        x = _named(local)
        linear.apply_state(out, x.q, x.log_decay, state, self.scale)

    def apply_state_backward(
        self, grads: Sequence[Tensor | None], local: Local, state: Tensor, dout: Tensor
    ) -> None:
        x, d = _named(local), _named(grads)
        linear.apply_state_adjoint(d.q, d.log_decay, x.q, x.log_decay, state, dout, self.scale)

    def apply_dstate(self, grads: Sequence[Tensor | None], local: Local, dstate: Tensor) -> None:
        x, d = _named(local), _named(grads)
        linear.summary_adjoint(d.k, d.v, d.log_decay, x.k, x.v, x.log_decay, dstate)

    def apply_both(
        self, grads: Sequence[Tensor | None], local: Local, state: Tensor, dstate: Tensor
    ) -> None:
        log_decay = _named(grads).log_decay
        linear.transition_adjoint(log_decay, self._log_m(local), state, dstate)
