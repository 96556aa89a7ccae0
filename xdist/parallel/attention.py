"""Softmax attention over the sequence ranks: checks, choice of strategy, dispatch."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from xdist.comm.checks import checks_are_on, raise_together
from xdist.cost.attention import STRATEGIES, check_strategy
from xdist.cost.attention_choice import Choice, choose, chosen
from xdist.cost.attention_keys import Problem
from xdist.documents import Documents
from xdist.dropout import Dropout
from xdist.errors import MaskError, NumericsError, ShapeError, StrategyError
from xdist.mask import Mask
from xdist.parallel.attention_2d import TwoAxesAttention
from xdist.parallel.attention_call import Call
from xdist.parallel.attention_checks import (
    check_alike,
    check_device,
    check_kinds,
    check_settings,
)
from xdist.parallel.attention_fetch import FetchAttention
from xdist.parallel.attention_ring import RingAttention
from xdist.parallel.attention_ulysses import ulysses
from xdist.parallel.backend import decided, is_auto
from xdist.parallel.noted import Noted, notes
from xdist.shard import SequenceShard, resolve
from xdist_kernels import attention as kernels
from xdist_kernels.autocast import without_autocast

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
KeyShard: TypeAlias = SequenceShard | str


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard | None,
    *,
    mask: Mask,
    strategy: str,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    key_shard: KeyShard,
    dropout: Dropout | None,
    head_chunks: int,
    backend: str = "auto",
) -> Tensor:
    """`xdist.attention`, see there. Every check comes before anything is sent."""
    check_kinds(shard, q=q, k=k, v=v, sinks=sinks)
    shared = shard is not None
    shard = resolve(shard, q.shape[1] if q.dim() == 4 else 0)
    check_settings(mask, scale, softcap, dropout)
    problem = problem_of(q, k, v, shard, mask=mask, sinks=sinks, key_shard=key_shard)
    strategy = _with_head_chunks(strategy, head_chunks)
    dropped = None if dropout is None or dropout.rate == 0.0 else dropout
    auto = is_auto(backend)
    choice = decided(
        "attention",
        backend,
        q,
        lambda: kernels.refusal(q, k, v, softcap=softcap, dropout=dropped),
    )
    noted = notes()
    if noted is not None:
        noted.append(Noted((problem,), strategy))
        return q.new_empty(*q.shape[:3], v.shape[3])
    check_device(q, shard)
    if strategy == "auto":
        strategy = _chosen(problem)
    check_strategy(problem, strategy)
    if checks_are_on():
        back = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, k, v, sinks)
        )
        settings = (scale, softcap, sinks is None, dropout, head_chunks, back)
        check_alike(problem, shard, strategy, q.dtype, *settings)
        _check_values(q, k, v, shard)
    q, scale = _scaled(q, scale)
    call = Call(
        problem, shard.rank, shard.group, scale, softcap, q.device, dropout, shared, choice, auto
    )
    with without_autocast(q):
        return _run(call, strategy, q, k, v, sinks, head_chunks)


def _scaled(q: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """q and a positive scale of the same scores, to the bit.

    Kernels hide a key by -inf, some of them before they scale: a scale below zero would turn that
    into +inf, and zero into a NaN.
    """
    if scale is None:
        return q, float(q.shape[-1] ** -0.5)
    if scale > 0:
        return q, float(scale)
    return (-q, -float(scale)) if scale < 0 else (q * 0.0, 1.0)


def _run(
    call: Call, strategy: str, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, chunks: int
) -> Tensor:
    if strategy == "ulysses":
        return ulysses(call, q, k, v, sinks, chunks)
    if strategy == "2d":
        return TwoAxesAttention.apply(call, q, k, v, sinks)
    if strategy == "ring":
        return RingAttention.apply(call, q, k, v, sinks)
    return FetchAttention.apply(call, strategy, q, k, v, sinks)


def _chosen(problem: Problem) -> str:
    if problem.parts == 1:  # nothing moves, and there is nothing to share: nothing to count
        return STRATEGIES[0]
    return chosen(problem).strategy


def _with_head_chunks(strategy: str, head_chunks: int) -> str:
    """The strategy of a call in `head_chunks` runs of heads: only ulysses has them."""
    if isinstance(head_chunks, bool) or not isinstance(head_chunks, int) or head_chunks < 1:
        raise ShapeError("head_chunks must be an integer from 1", f"got {head_chunks!r}")
    if head_chunks == 1:
        return strategy
    if strategy not in ("auto", "ulysses"):
        raise StrategyError(
            f"strategy {strategy!r} cannot serve this call",
            f"head_chunks={head_chunks}: only ulysses switches and computes heads in runs",
            "choose ulysses, or leave head_chunks at 1",
        )
    return "ulysses"


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard | None = None,
    *,
    mask: Mask,
    key_shard: KeyShard = "same",
) -> Choice:
    """What `strategy="auto"` takes for this call, with FLOPs and bytes of each strategy.

    Reads shapes and dtypes alone: tensors on the meta device will do.
    """
    check_kinds(shard, q=q, k=k, v=v)
    shard = resolve(shard, q.shape[1] if q.dim() == 4 else 0)
    return choose(problem_of(q, k, v, shard, mask=mask, sinks=None, key_shard=key_shard))


def problem_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard,
    *,
    mask: Mask,
    sinks: Tensor | None,
    key_shard: KeyShard,
) -> Problem:
    """The call as every rank knows it, after the checks of shapes, dtypes and mask."""
    _check_tensors(q, k, v, sinks)
    if mask.heads is not None:
        mask.head_groups(q.shape[2])  # raises on another number of heads
    if q.shape[1] != shard.local_length:
        raise ShapeError(
            "q does not hold this rank's share of the sequence",
            f"q has {q.shape[1]} tokens, the shard gives rank {shard.rank} {shard.local_length} of "
            f"{shard.layout.length}",
            "pass shard.scatter(x), or make the shard for this length",
        )
    same = key_shard is shard or key_shard == "same"
    if same:
        layout, documents = shard.layout, shard.documents
    elif key_shard == "replicated":
        layout, documents = None, Documents.of(None, k.shape[1])
    elif isinstance(key_shard, SequenceShard):
        layout, documents = key_shard.layout, key_shard.documents
    else:
        raise ShapeError(
            "key_shard is 'same', 'replicated' or a SequenceShard", f"got {key_shard!r}"
        )
    if not same:
        _check_cross(mask, shard, layout is None, documents, key_shard)
    held = k.shape[1] if layout is None else layout.local_length(shard.rank)
    if k.shape[1] != held:
        raise ShapeError(
            "k and v do not hold this rank's share of the keys",
            f"they have {k.shape[1]} tokens, rank {shard.rank} holds {held} of {documents.length}",
            "shard them alike, or pass key_shard",
        )
    batch, _, heads, dim = q.shape
    sizes = (batch, heads, k.shape[2], dim, v.shape[3], q.element_size())
    # Layers of one shard share the problem, with what was counted for it (`Problem.kept`).
    return shard.once(
        ("attention", mask, "same" if same else key_shard, k.shape[1], sizes),
        lambda: Problem(
            shard.layout, shard.documents, mask, layout, documents, not same, *sizes,
            shard.mesh.ulysses_size,
        ),
    )  # fmt: skip


def _check_values(q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard) -> None:
    """Refuses NaN and infinity on all ranks when any rank has one."""
    fault = not all(bool(x.isfinite().all()) for x in (q, k, v))
    raise_together(
        shard.group,
        fault,
        lambda ranks: NumericsError(
            "attention got values that are not finite in q, k or v",
            f"on sequence ranks {ranks}",
            "look for the step before this one that made them",
        ),
    )


def _check_cross(
    mask: Mask,
    shard: SequenceShard,
    replicated: bool,
    documents: Documents,
    key_shard: KeyShard,
) -> None:
    """What keys with positions of their own cannot serve."""
    if mask.causal or mask.window is not None:
        raise MaskError(
            "causal and window masks need keys that share the queries' positions",
            f"{mask} with key_shard={'replicated' if replicated else 'another shard'}",
            "pass key_shard='same', or Mask(causal=False)",
        )
    if documents.count != shard.documents.count:
        raise MaskError(
            "document i of the queries sees document i of the keys, and the numbers differ",
            f"{shard.documents.count} query documents, {documents.count} key documents",
            "pass a key_shard with as many documents (replicated keys are one document)",
        )
    if isinstance(key_shard, SequenceShard) and (
        key_shard.layout.parts != shard.layout.parts or key_shard.group is not shard.group
    ):
        raise ShapeError(
            "queries and keys must be sharded over the same sequence ranks",
            f"{shard.layout.parts} ranks for queries, {key_shard.layout.parts} for keys",
            "make both shards from one mesh",
        )


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise ShapeError("attention needs q [B,n,H,D], k [B,m,G,D], v [B,m,G,E]", shapes)
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ShapeError(
            "q, k and v do not fit together",
            shapes,
            "k and v share batch, tokens and heads; q and k share batch and head dim",
        )
    heads, groups = q.shape[2], k.shape[2]
    if heads == 0 or groups == 0 or heads % groups:
        raise ShapeError(
            "query heads must be a multiple of key heads",
            f"{heads} query heads, {groups} key heads",
        )
    if q.shape[3] == 0:
        raise ShapeError("q and k need a head dim of at least 1", shapes)
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise ShapeError(
            "q, k and v must have one float dtype of 16, 32 or 64 bits",
            f"{q.dtype}, {k.dtype}, {v.dtype}",
            "cast them to one dtype, such as that of v",
        )
    devices = {x.device for x in (q, k, v, sinks) if x is not None}
    if len(devices) > 1:
        raise ShapeError(
            "q, k, v and sinks must be on one device", f"got {sorted(map(str, devices))}"
        )
    if sinks is not None and (sinks.shape != (heads,) or not sinks.dtype.is_floating_point):
        raise ShapeError(
            "sinks are one float per query head",
            f"got {tuple(sinks.shape)} of {sinks.dtype} for {heads} heads",
        )
