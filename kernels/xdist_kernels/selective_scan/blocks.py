"""A tile of the selective scan as chunks that walk in lock step.

T tokens become rows = B * chunks of L tokens; step i handles token i of every row at once, for one
block of channels, so that a step's tensors [rows, N, channels] stay in the processor's cache and
nothing of size [T, C, N] exists. Channels are innermost: every product broadcasts along whole runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

LONGEST_CHUNK = 64
# Numbers of one step's state, [rows, N, channels of a block].
STEP_NUMBERS = 1 << 16
LEAST_CHANNELS = 16
# torch.exp2 is three times faster than torch.exp on a CPU: exponents are taken to base 2 first.
LOG2_E = 1.0 / math.log(2.0)


class Prepared(NamedTuple):
    """One tile. Tokens beyond T, up to whole chunks, have delta = 0: they leave states alone."""

    u: Tensor  # [B, T, C, 1] as given: the outputs' shape and dtype
    inputs: Tensor  # [L, rows, 1, C] delta * u
    delta: Tensor  # [L, rows, 1, C]
    A: Tensor  # [N, C]
    B: Tensor  # [L, rows, N, 1]
    C: Tensor  # [L, rows, 1, N]
    starts: Tensor | None  # bool [L, rows, 1, 1], a document starts at the token
    ends: Tensor | None = None  # [rows, N, C] the state each chunk makes of zero
    asked: Tensor | None = None  # [rows, N, C] what its outputs ask of the state before it


class Block(NamedTuple):
    """The part of some channels; shapes as in `Prepared` with `channels` for C."""

    at: slice
    inputs: tuple[Tensor, ...]  # L x [rows, 1, channels]
    delta: tuple[Tensor, ...]
    A: Tensor  # [N, channels]
    exponents: Tensor  # A to base 2
    B: tuple[Tensor, ...]
    C: tuple[Tensor, ...]
    starts: tuple[Tensor | None, ...]  # L x [rows, 1, 1]; None where no row starts a document

    def decay(self, step: int, out: Tensor) -> Tensor:
        """exp(delta A) of token `step` of every row, [rows, N, channels]."""
        return torch.mul(self.delta[step], self.exponents, out=out).exp2_()

    def passes(self, state: Tensor, step: int) -> Tensor:
        """`state` in place, zero in rows where a document starts at token `step`."""
        begins = self.starts[step]
        return state if begins is None else state.masked_fill_(begins, 0)

    def new_state(self) -> Tensor:
        rows = self.delta[0].shape[0]
        return self.A.new_zeros(rows, *self.A.shape)


def wide_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def chunk_tokens(tokens: int) -> int:
    """L: about 2 sqrt(T), a power of two, at most 64."""
    return min(LONGEST_CHUNK, 1 << int(math.log2(2 * math.sqrt(tokens))))


def to_steps(x: Tensor, chunk: int) -> Tensor:
    """[B, T, D] as [L, rows, D], T filled up with zeros."""
    x = pad(x, (0, 0, 0, -x.shape[1] % chunk))
    batch, tokens, size = x.shape
    return x.reshape(batch * (tokens // chunk), chunk, size).transpose(0, 1)


def to_tokens(steps: Tensor, batch: int, tokens: int) -> Tensor:
    """[L, rows, D] as [B, T, D]."""
    chunk, rows, size = steps.shape
    return steps.transpose(0, 1).reshape(batch, chunk * (rows // batch), size)[:, :tokens]


def prepare(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor | None = None
) -> Prepared:
    """One tile. u, delta [B,T,C,1], A [C,N], B, C [B,T,1,N]; starts bool [T] or None."""
    wide = wide_dtype(u)
    batch, tokens = u.shape[:2]
    chunk = chunk_tokens(tokens)
    steps = to_steps(delta.squeeze(3).to(wide), chunk).unsqueeze(2)
    inputs = steps * to_steps(u.squeeze(3).to(wide), chunk).unsqueeze(2)
    if starts is not None:
        marks = pad(starts, (0, -tokens % chunk)).view(-1, chunk).repeat(batch, 1)
        starts = marks.t()[:, :, None, None]
    return Prepared(
        u,
        inputs,
        steps,
        A.to(wide).t().contiguous(),
        to_steps(B.squeeze(2).to(wide), chunk).unsqueeze(3),
        to_steps(C.squeeze(2).to(wide), chunk).unsqueeze(2),
        starts,
    )


def blocks(p: Prepared) -> Iterator[Block]:
    """The tile, some channels at a time."""
    rows, (states, channels) = p.delta.shape[1], p.A.shape
    size = max(LEAST_CHANNELS, STEP_NUMBERS // max(1, rows * states))
    marks: tuple[Tensor | None, ...] = (None,) * p.delta.shape[0]
    if p.starts is not None:
        found = p.starts.flatten(1).any(1).tolist()
        marks = tuple(s if any_ else None for s, any_ in zip(p.starts, found, strict=True))
    steps_B, steps_C = p.B.unbind(0), p.C.unbind(0)
    for first in range(0, channels, size):
        at = slice(first, min(first + size, channels))
        A = p.A[:, at].contiguous()
        yield Block(
            at,
            p.inputs[..., at].contiguous().unbind(0),
            p.delta[..., at].contiguous().unbind(0),
            A,
            A * LOG2_E,
            steps_B,
            steps_C,
            marks,
        )


def chunk_decay(p: Prepared) -> Tensor:
    """M of every chunk, [rows, N, C], as if no document started inside."""
    return (p.delta.sum(0) * (p.A * LOG2_E)).exp2_()


def before_chunks(p: Prepared, ends: Tensor, decays: Tensor, state: Tensor) -> list[Tensor]:
    """The states before each chunk and after the last, [B, N, channels] each."""
    return _along_chunks(p, ends, decays, state, step=1)


def after_chunks(p: Prepared, ends: Tensor, decays: Tensor, dstate: Tensor) -> list[Tensor]:
    """The transpose: gradients of the states before each chunk and after the last."""
    return _along_chunks(p, ends, decays, dstate, step=-1)[::-1]


def _along_chunks(
    p: Prepared, ends: Tensor, decays: Tensor, state: Tensor, *, step: int
) -> list[Tensor]:
    """state -> end + M state over the chunks; a chunk in which a document starts has M = 0."""
    split = (state.shape[0], ends.shape[0] // state.shape[0])
    own, passed = (x.unflatten(0, split).unbind(1)[::step] for x in (ends, decays))
    cuts = [False] * len(own)
    if p.starts is not None:
        cuts = p.starts[:, : len(own)].flatten(2).any(2).any(0).tolist()[::step]
    found = [state]
    for end, decay, cut in zip(own, passed, cuts, strict=True):
        # Not a product with zero: what is NaN in one document must not reach the next.
        found.append(end if cut else torch.addcmul(end, decay, found[-1]))
    return found


def as_rows(states: list[Tensor]) -> Tensor:
    """[rows, N, channels] from one [B, N, channels] a chunk."""
    return torch.stack(states, 1).flatten(0, 1)
