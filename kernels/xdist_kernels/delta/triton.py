"""The delta rule over one tile of tokens on Triton kernels: the functions of tile.py.

    prepare_kernel         each chunk:  W, U, and what outputs read of the state     triton_prepare
    forward_chain_kernel   each head:   states over chunks, and outputs on the way     triton_chain
    backward_chain_kernel  each head:   gradients of states, last chunk to first       triton_chain
    both_chains_kernel     both at once, where nothing has to be waited for            triton_chain
    writes_kernel          each chunk:  what it wrote; dv, dbeta, one decay's gradient  .._gradients
    keys_kernel            each chunk:  dq, dk, a diagonal decay's gradient             .._gradients

Products take operands in the dtype of q, k and v and add up in float32; states, decays and the
inverse are float32. What other segments hang on, the transition, the end made by `advance` and
the adjoint, is made in float32 throughout, whatever the inputs: `precision` says how its products
are taken, "ieee" in full, "tf32x3" by tensor cores as three products of TF32
parts (in theory to 2^-21).

Shapes as in torch.py: q, k [B,T,Hk,K], v [B,T,H,V], beta [B,T,H], log_decay None, [B,T,H] or
[B,T,H,K], states [B,H,K,V] float32. What it costs: docs/kernels/delta.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.delta import triton_launches as launches
from xdist_kernels.delta.backward import Gradients
from xdist_kernels.delta.torch import Inputs
from xdist_kernels.delta.triton_blocks import MOST_KEY_DIMS
from xdist_kernels.delta.triton_gradient_launches import Chains, gradients
from xdist_kernels.delta.triton_launches import Parts, Wanted
from xdist_kernels.errors import KernelError

# Tokens of a chunk, and of one whose products no tensor core takes: fewer of them fit in registers.
CHUNK_TOKENS, PLAIN_CHUNK_TOKENS = 64, 32
# Tokens of a tile, of which one state is kept: enough programs for any number of heads.
TILE_TOKENS = 32768
PRECISIONS = ("ieee", "tf32x3")


class Tile(NamedTuple):
    """A tile as it was given: each function makes the parts it needs, in its precision."""

    inputs: Inputs
    chunk: int | None
    precision: str


class Ahead(NamedTuple):
    """A tile whose outputs need no more than the state."""

    tile: Tile
    parts: Parts


class Ready(NamedTuple):
    """A tile whose gradients need no more than that of the state after it."""

    tile: Tile
    parts: Parts
    states: Tensor  # [B * H, chunks, K, V], dims filled up: before each chunk


def refusal(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> str | None:
    """Why these kernels cannot serve tiles of such tensors, and what to do; None: they can.

    What holds for all kernels (device, dtype of v) is `launch.why_not`.
    """
    if k.shape[3] > MOST_KEY_DIMS:
        return (
            f"a state of {k.shape[3]} key dims does not fit into a program's registers, "
            f"{MOST_KEY_DIMS} do: use backend='torch'"
        )
    given = {"q": q, "k": k, "beta": beta, "log_decay": log_decay}
    for name, x in given.items():
        if x is not None and x.dtype == torch.float64:
            return f"the kernels add up in float32, {name} is float64: use backend='torch'"
    return None


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    starts: Tensor | None = None,
    *,
    chunk: int | None = None,
    precision: str = "ieee",
) -> Tile:
    """A tile of T >= 1 tokens; starts nothing yet.

    starts: bool [T], True where a document starts inside the tile, never at its first token.
    chunk: 16, 32, 64 or 128; None: by the products. precision: "ieee" or "tf32x3", of those of
    float32.

    Raises:
        KernelError: another chunk or precision.
    """
    if chunk not in (None, 16, 32, 64, 128) or precision not in PRECISIONS:
        raise KernelError(
            f"chunk {chunk} and precision {precision!r} were asked for\n"
            f"a chunk has 16, 32, 64 or 128 tokens, products are taken in {' or '.join(PRECISIONS)}"
        )
    q, k, v = _rows(q), _rows(k), _rows(v)
    if log_decay is not None and log_decay.dim() == 4:
        log_decay = _rows(log_decay)
    starts = None if starts is None else starts.contiguous()
    return Tile(Inputs(q, k, v, beta, log_decay, float(scale), starts), chunk, precision)


def _rows(x: Tensor) -> Tensor:
    # Kernels read a head's dims as one piece; the other strides may be anything.
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _narrow(x: Inputs) -> torch.dtype:
    """What products of outputs and gradients take: a dtype that holds q, k and v."""
    return torch.promote_types(torch.promote_types(x.q.dtype, x.k.dtype), x.v.dtype)


def _plain(p: Tile, operand: torch.dtype) -> bool:
    """Whether products of `operand` are taken without tensor cores."""
    return operand == torch.float32 and p.precision == "ieee"


def _parts(p: Tile, operand: torch.dtype, **wanted: bool) -> Parts:
    chunk = p.chunk or (PLAIN_CHUNK_TOKENS if _plain(p, operand) else CHUNK_TOKENS)
    return launches.prepare(p.inputs, operand, chunk, p.precision, Wanted(**wanted))


def transition(p: Tile) -> Tensor:
    """M [B,H,K,K] of a tile in which no document starts, in float32 throughout."""
    return _from_one(p, _parts(p, torch.float32))


def _from_one(p: Tile, parts: Parts) -> Tensor:
    """What the identity becomes by parts without an entry."""
    batch, _, heads, _ = p.inputs.v.shape
    key_dim = p.inputs.k.shape[3]
    one = torch.eye(key_dim, device=p.inputs.v.device).expand(batch, heads, -1, -1)
    return launches.forward_chain(p.inputs, parts, one, p.precision)


def advance(p: Tile, state: Tensor) -> Tensor:
    """The state after the tile [B,H,K,V] from the one before it, in float32 throughout."""
    parts = _parts(p, torch.float32, entry=True)
    return launches.forward_chain(p.inputs, parts, state, p.precision)


def advance_and_transition(p: Tile, state: Tensor) -> tuple[Tensor, Tensor]:
    """`advance` and `transition`, the tile's parts made once for both."""
    parts = _parts(p, torch.float32, entry=True)
    after = launches.forward_chain(p.inputs, parts, state, p.precision)
    return after, _from_one(p, parts._replace(entry=None))


def ahead(p: Tile) -> Ahead:
    """The part of the outputs that needs no state."""
    return Ahead(p, _parts(p, _narrow(p.inputs), entry=True, reads=True, own=True))


def run(p: Tile | Ahead, state: Tensor, *, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """out [B,T,H,V] in the dtype of v, and the state after the tile [B,H,K,V].

    out: where the outputs go, contiguous and of that shape and dtype; None: into a new tensor.
    """
    tile, parts = p if isinstance(p, Ahead) else ahead(p)
    if out is None:
        out = torch.empty(tile.inputs.v.shape, dtype=tile.inputs.v.dtype, device=state.device)
    return out, launches.forward_chain(tile.inputs, parts, state, tile.precision, out=out)


def adjoint(p: Tile, dout: Tensor, dstate: Tensor) -> Tensor:
    """Gradient of the state before the tile, from those of its outputs [B,T,H,V] and of the state
    after it [B,H,K,V], in float32 throughout."""
    parts = _parts(p, torch.float32, reads=True)
    return launches.backward_chain(p.inputs, parts, _rows(dout), dstate, p.precision)


def _saved(p: Tile) -> Parts:
    return _parts(p, _narrow(p.inputs), entry=True, reads=True, saved=True)


def backward_ahead(p: Tile, state: Tensor, dout: Tensor) -> Ready:
    """All of a tile's backward pass before the chain back; state: the one before the tile."""
    parts = _saved(p)
    states = launches.states_of(p.inputs, parts, p.precision)
    launches.forward_chain(p.inputs, parts, state, p.precision, states=states)
    return Ready(p, parts, states)


def backward(
    p: Tile | Ready, state: Tensor, dout: Tensor, dstate: Tensor, *, narrow: bool = False
) -> tuple[Gradients, Tensor]:
    """Gradients of a tile's inputs in float32, and of the state before it.

    narrow: those of q, k and v are rounded to the inputs' dtypes where one head's is all of it;
    half the bytes, for callers that add nothing to them.
    """
    dout = _rows(dout)
    if isinstance(p, Tile) and _plain(p, _narrow(p.inputs)):
        # Each chain fills a multiprocessor's registers by itself.
        p = backward_ahead(p, state, dout)
    if isinstance(p, Ready):
        (x, _, precision), parts, states = p
        dstates = torch.empty_like(states)
        before = launches.backward_chain(x, parts, dout, dstate, precision, dstates=dstates)
    else:
        (x, _, precision), parts = p, _saved(p)
        states, dstates, before = launches.both_chains(x, parts, state, dout, dstate, precision)
    shared = x.k.shape[2] != x.v.shape[2]
    wide = torch.float32
    dtypes = (x.q.dtype, x.k.dtype, x.v.dtype) if narrow else (wide, wide, wide)
    if shared:
        dtypes = (wide, wide, dtypes[2])
    found = gradients(x, parts, Chains(states, dstates), dout, precision, dtypes)
    dq, dk = found.dq, found.dk
    if shared:
        dq, dk = (y.unflatten(2, (x.k.shape[2], -1)).sum(3) for y in (dq, dk))
    return Gradients(dq, dk, found.dv, found.dbeta, found.dlog), before
