"""The selective scan of one tile on a GPU: the functions of torch.py and backward.py by Triton.

    ends      every span of the tile from zero, and the sum of its steps           (walk)
    fold      the states before the spans and behind the tile                      (fold)
    run       every span from its true state: outputs                              (walk)
    backward  marks: states and their gradients every 16 tokens, spans from zero   (walk, walk_back)
              fold both;  then every 16 tokens for themselves: all gradients       (gradients)

A span is so long that a card is just full of spans x blocks of channels x batch rows; with enough
of the latter two there is one span, and `run` goes over the tile once. Kept are the inputs and one
state a tile; marks live as long as one backward. The same inputs give the same bits: what is added
over programs is written side by side first. docs/kernels/selective_scan.md counts the bytes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.launch import Config, launch
from xdist_kernels.selective_scan.triton_gradients import gradients
from xdist_kernels.selective_scan.triton_walk import fold, walk, walk_back

# Tokens between the states that a layer keeps for backward.
TILE_TOKENS = 8192
# Tokens between the marks of backward; tokens that `walk`, and spans that `fold` loads at once.
MARK_TOKENS, LOADED_ROWS = 16, 8
# Two neighbours a thread halve the sums over lanes; with four, registers run out.
CHANNELS_A_THREAD = 2
GRADIENT_CHANNELS = 32 * CHANNELS_A_THREAD
FOLD_CHANNELS = 32
# Programs of one warp that fill an H200 (132 x 12 at 156 registers) twice over, and the shortest
# span worth a program of its own.
PROGRAMS, LEAST_SPAN_TOKENS = 3168, 64
MOST_STATES = 256
# Of marks and partial sums; a batch that needs more goes through backward in pieces.
MARK_BYTES = 1 << 30
ONE_WARP = Config(1, 2)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Ends(NamedTuple):
    """What spans make of zero: states [B, spans, N, C], and their steps' sums [B, spans, C]."""

    states: Tensor
    sums: Tensor


class Marks(NamedTuple):
    """For the states ([0]) and for their gradients ([1]), spans from zero: at the tiles of
    MARK_TOKENS [2, B, tiles, N, C], the steps up to there [2, B, tiles, C], and `Ends` of both."""

    states: Tensor
    reach: Tensor
    ends: tuple[Ends, Ends]


class Prepared(NamedTuple):
    """One tile. B, C and starts are filled up with zeros to whole tiles of MARK_TOKENS."""

    u: Tensor  # [B, T, C] as given
    delta: Tensor  # [B, T, C] as given
    exponents: Tensor  # [N, C] float32, A to base 2
    B: Tensor  # [B, padded, N] float32
    C: Tensor  # [B, padded, N] float32
    starts: Tensor | None  # uint8 [padded], 1 where a document starts at the token
    made: list[Ends]  # what every span makes of zero, once somebody asked
    marks: Marks | None = None  # of `backward_ahead`


class _Spans(NamedTuple):
    """How the walks cut a tile."""

    states: int  # N filled up to a power of two
    channels: int  # of a program
    number: int
    tokens: int  # of a span, a multiple of MARK_TOKENS


def refusal(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> str | None:
    """Why these kernels cannot serve u, delta [B,n,C,1], A [C,N], B, C [B,n,1,N]; None: they
    can."""
    for name, x in (("u", u), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        if x.dtype not in _DTYPES:
            return f"{name} is {x.dtype}, the kernels add up in float32: use backend='torch'"
    if A.shape[1] > MOST_STATES:
        return (
            f"a thread cannot hold {A.shape[1]} states a channel, {MOST_STATES} is the most: "
            "use backend='torch'"
        )
    return None


def prepare(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor | None = None
) -> Prepared:
    """One tile. u, delta [B,T,C,1], A [C,N], B, C [B,T,1,N]; starts bool [T] or None."""
    exponents = A.to(torch.float32).t().contiguous() * (1 / math.log(2.0))
    if starts is not None:
        starts = _filled(starts.view(1, -1, 1), torch.uint8).view(-1)
    B, C = (_filled(x.squeeze(2), torch.float32) for x in (B, C))
    return Prepared(_rows(u), _rows(delta), exponents, B, C, starts, [])


def _rows(x: Tensor) -> Tensor:
    """[B, T, C, 1] as [B, T, C] with neighbouring channels side by side; the kernels take any
    other strides."""
    x = x.squeeze(3)
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _filled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, N] with zeros up to whole tiles of MARK_TOKENS, contiguous."""
    batch, tokens, size = x.shape
    padded = _cdiv(tokens, MARK_TOKENS) * MARK_TOKENS
    found = x.new_zeros(batch, padded, size, dtype=dtype)
    found[:, :tokens] = x
    return found


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _spans(p: Prepared) -> _Spans:
    batch, tokens, channels = p.u.shape
    states = 1 << (p.exponents.shape[0] - 1).bit_length()
    # A thread holds at most 32 states: with more, a channel is shared by several lanes.
    own = 32 * 32 // max(states, 32)
    wanted = _cdiv(PROGRAMS, max(1, batch * _cdiv(channels, own)))
    span = max(LEAST_SPAN_TOKENS, _cdiv(tokens, wanted))
    span = _cdiv(span, MARK_TOKENS) * MARK_TOKENS
    return _Spans(states, own, max(1, _cdiv(tokens, span)), span)


def _sizes(p: Prepared, spans: _Spans) -> dict[str, int]:
    """Arguments that both walks take."""
    _, tokens, channels = p.u.shape
    return {
        "T": tokens, "channels": channels, "spans": spans.number, "span": spans.tokens,
        "N": p.exponents.shape[0], "BN": spans.states, "BC": spans.channels, "BT": MARK_TOKENS,
        "BG": LOADED_ROWS,
    }  # fmt: skip


def _programs(p: Prepared, spans: _Spans) -> int:
    batch, _, channels = p.u.shape
    return batch * spans.number * _cdiv(channels, spans.channels)


def _new_ends(p: Prepared, spans: _Spans) -> Ends:
    batch, _, channels = p.u.shape
    states, size = p.exponents.shape[0], (batch, spans.number)
    made = p.exponents.new_empty(*size, states, channels)
    return Ends(made, p.exponents.new_empty(*size, channels))


def _walk(
    p: Prepared, first: Tensor | None, out: Tensor | None, marks: tuple[Tensor, Tensor] | None
) -> Ends:
    """States after the spans; from `first` [B,spans,N,C] or zero; writes `out` [B,T,C], marks."""
    spans = _spans(p)
    ends = _new_ends(p, spans)
    at, reach = (None, None) if marks is None else marks
    launch(
        walk, _programs(p, spans), ONE_WARP, device=p.u.device,
        p_u=p.u, p_delta=p.delta, p_exponents=p.exponents, p_B=p.B,
        p_C=None if out is None else p.C, p_starts=p.starts, p_first=first, p_out=out,
        p_last=ends.states, p_sums=ends.sums, p_marks=at, p_reach=reach,
        u_b=p.u.stride(0), u_t=p.u.stride(1),
        delta_b=p.delta.stride(0), delta_t=p.delta.stride(1), **_sizes(p, spans),
    )  # fmt: skip
    return ends


def _walk_back(p: Prepared, dout: Tensor, marks: tuple[Tensor, Tensor] | None) -> Ends:
    """What the outputs of each span ask of the state before it; writes marks."""
    spans = _spans(p)
    ends = _new_ends(p, spans)
    at, reach = (None, None) if marks is None else marks
    launch(
        walk_back, _programs(p, spans), ONE_WARP, device=p.u.device,
        p_dout=dout, p_delta=p.delta, p_exponents=p.exponents, p_C=p.C, p_starts=p.starts,
        p_last=ends.states, p_sums=ends.sums, p_marks=at, p_reach=reach,
        dout_b=dout.stride(0), dout_t=dout.stride(1),
        delta_b=p.delta.stride(0), delta_t=p.delta.stride(1), **_sizes(p, spans),
    )  # fmt: skip
    return ends


def _fold(
    p: Prepared, ends: Ends, state: Tensor, first: Tensor | None = None, *, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """(the states before each span [B,spans,N,C], written to `first` where given; the state after
    all [B,N,C]); reverse: gradients, from the last span to the first."""
    batch, spans, states, channels = ends.states.shape
    first = torch.empty_like(ends.states) if first is None else first
    last = torch.empty_like(state)
    launch(
        fold, batch * states * _cdiv(channels, FOLD_CHANNELS), ONE_WARP, device=p.u.device,
        p_exponents=p.exponents, p_own=ends.states, p_sums=ends.sums, p_state=state,
        p_first=first, p_last=last, channels=channels, spans=spans, N=states, BC=FOLD_CHANNELS,
        BG=LOADED_ROWS, REVERSE=reverse,
    )  # fmt: skip
    return first, last


def _ends(p: Prepared) -> Ends:
    """Made once for a tile: it depends on nothing but the tile."""
    if not p.made:
        p.made.append(_walk(p, None, None, None))
    return p.made[0]


def _inner(state: Tensor) -> Tensor:
    """[B, C, N, 1] as [B, N, C] float32, contiguous."""
    return state.squeeze(3).transpose(1, 2).to(torch.float32).contiguous()


def _outer(state: Tensor) -> Tensor:
    """[B, N, C] as [B, C, N, 1]."""
    return state.transpose(1, 2).unsqueeze(3)


def transition(p: Prepared) -> Tensor:
    """sum of delta of a tile of one document, [B, C]: with A it gives log M = A * sum of delta."""
    return _ends(p).sums.sum(1)


def ahead(p: Prepared) -> Prepared:
    """With what every span makes of the zero state, where there are several."""
    if _spans(p).number > 1:
        _ends(p)
    return p


def advance(p: Prepared, state: Tensor) -> Tensor:
    """The state [B,C,N,1] after the tile, float32."""
    return _outer(_fold(p, _ends(p), _inner(state))[1])


def run(p: Prepared, state: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs [B,T,C,1] in the dtype of u, and the state after the tile, float32.

    out: where to write the outputs, contiguous.
    """
    first = _inner(state)
    if out is None:
        out = torch.empty((*p.u.shape, 1), dtype=p.u.dtype, device=p.u.device)
    if _spans(p).number > 1:
        first, _ = _fold(p, _ends(p), first)
    ends = _walk(p, first, out, None)
    return out, _outer(ends.states[:, -1])


def adjoint(p: Prepared, dout: Tensor, dstate: Tensor) -> Tensor:
    """Gradient of the state before the tile, from those of outputs and of the state after."""
    asked = _walk_back(p, _rows(dout), None)
    return _outer(_fold(p, asked, _inner(dstate), reverse=True)[1])


def backward_ahead(p: Prepared, dout: Tensor) -> Prepared:
    """With what backward needs of the tile and its outputs' gradients alone, where it fits."""
    if p.marks is not None or _batch_step(p) < p.u.shape[0]:
        return p
    return p._replace(marks=_marks(p, _rows(dout)))


def _marks(p: Prepared, dout: Tensor) -> Marks:
    batch, tokens, channels = p.u.shape
    states, tiles = p.exponents.shape[0], _cdiv(tokens, MARK_TOKENS)
    at = p.exponents.new_empty(2, batch, tiles, states, channels)
    reach = p.exponents.new_empty(2, batch, tiles, channels)
    ends = _walk(p, None, None, (at[0], reach[0]))
    return Marks(at, reach, (ends, _walk_back(p, dout, (at[1], reach[1]))))


def _batch_step(p: Prepared) -> int:
    """Batch rows whose marks and partial sums fit in MARK_BYTES, at least one."""
    _, tokens, channels = p.u.shape
    one = 8 * p.exponents.numel() * _cdiv(tokens, MARK_TOKENS)
    one += 8 * _cdiv(channels, GRADIENT_CHANNELS) * tokens * p.exponents.shape[0]
    return max(1, MARK_BYTES // max(1, one))


def backward(
    p: Prepared, state: Tensor, dout: Tensor, dstate: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Gradients of u, delta, A (this tile's part), B, C, and of the state before the tile.

    Those of u and delta are in their dtypes, the others float32. Marks made ahead are used up.
    """
    batch, tokens, _ = p.u.shape
    dout, first, after = _rows(dout), _inner(state), _inner(dstate)
    du, ddelta = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (p.u, p.delta))
    dBC = p.exponents.new_empty(2, batch, p.exponents.shape[0], tokens)
    dA, dbefore = torch.zeros_like(p.exponents), torch.empty_like(first)
    step = batch if p.marks is not None else _batch_step(p)
    for start in range(0, batch, step):
        at = slice(start, start + step)
        part = _batch_rows(p, at)
        marks = p.marks or _marks(part, dout[at])
        borders = p.exponents.new_empty(2, *marks.ends[0].states.shape)
        _fold(part, marks.ends[0], first[at], borders[0])
        dbefore[at] = _fold(part, marks.ends[1], after[at], borders[1], reverse=True)[1]
        dBC[:, at] = _gradients(part, dout[at], marks, borders, du[at], ddelta[at])
        # The states' marks became the tiles' parts of dA.
        dA += marks.states[0].sum((0, 1))
    dB, dC = dBC.transpose(2, 3).unsqueeze(3)
    return (du.unsqueeze(3), ddelta.unsqueeze(3), dA.t(), dB, dC), _outer(dbefore)


def _batch_rows(p: Prepared, at: slice) -> Prepared:
    return p._replace(u=p.u[at], delta=p.delta[at], B=p.B[at], C=p.C[at], made=[])


def _gradients(
    p: Prepared, dout: Tensor, marks: Marks, borders: Tensor, du: Tensor, ddelta: Tensor
) -> Tensor:
    """dB and dC [2,B,N,T]; writes du and ddelta [B,T,C], and dA's parts over marks.states[0]."""
    (batch, tokens, channels), spans = p.u.shape, _spans(p)
    states, blocks = p.exponents.shape[0], _cdiv(channels, GRADIENT_CHANNELS)
    parts = p.exponents.new_empty(2, blocks, batch, states, tokens)
    launch(
        gradients, batch * _cdiv(tokens, MARK_TOKENS) * blocks, ONE_WARP, device=p.u.device,
        p_u=p.u, p_delta=p.delta, p_dout=dout, p_exponents=p.exponents, p_B=p.B, p_C=p.C,
        p_starts=p.starts, p_borders=borders, p_marks=marks.states, p_reach=marks.reach, p_du=du,
        p_ddelta=ddelta, p_dBC=parts, u_b=p.u.stride(0), u_t=p.u.stride(1),
        delta_b=p.delta.stride(0), delta_t=p.delta.stride(1), dout_b=dout.stride(0),
        dout_t=dout.stride(1), batch=batch, T=tokens, channels=channels, spans=spans.number,
        span=spans.tokens, N=states, BT=MARK_TOKENS, BC=GRADIENT_CHANNELS, PER=CHANNELS_A_THREAD,
    )  # fmt: skip
    return parts.sum(1)
