"""Every way to run one attention over ranks that the benchmark compares, behind one signature.

A method is built once on each rank, outside of what is timed, and called with this rank's q
`[B,n,H,D]`, k and v `[B,n,G,D]`; it gives the output `[B,n,H,D]`. Peers get torch's fused attention
wherever they take a local attention, document by document where they take a function of ours.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import xdist
from xdist.mesh import Mesh

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """One causal attention: global tokens, query and key heads, head dim, packed documents."""

    tokens: int
    heads: int
    groups: int
    dim: int = 64
    documents: int = 1

    @property
    def cu_seqlens(self) -> list[int]:
        """Bounds of the documents, all of one length."""
        length = self.tokens // self.documents
        return list(range(0, self.tokens + 1, length))


@dataclass(frozen=True)
class Method:
    """`like` names the method of xdist that a peer is compared with, "" for xdist's own;
    `scores_bytes` what its score-sized tensors take on one rank, where it keeps such tensors."""

    build: Callable[[Sizes, Mesh], Attention]
    like: str = ""
    zigzag: bool = False
    scores_bytes: Callable[[Sizes, int], int] | None = None


def layout_of(method: str, sizes: Sizes, parts: int) -> xdist.Layout:
    """Which tokens each rank holds when `method` runs."""
    make = xdist.Layout.zigzag if METHODS[method].zigzag else xdist.Layout.contiguous
    return make(sizes.tokens, parts)


def _ours(strategy: str, zigzag: bool) -> Callable[[Sizes, Mesh], Attention]:
    def build(sizes: Sizes, mesh: Mesh) -> Attention:
        make = xdist.Layout.zigzag if zigzag else xdist.Layout.contiguous
        layout = make(sizes.tokens, mesh.sequence_size)
        shard = xdist.SequenceShard(mesh, layout, documents=sizes.cu_seqlens)
        mask = xdist.Mask(causal=True)
        return lambda q, k, v: xdist.attention(q, k, v, shard, mask=mask, strategy=strategy)

    return build


def _packed(cu_seqlens: Sequence[int]) -> Callable[..., Tensor]:
    """Torch's fused causal attention over `[B,N,H,D]`, one call a document."""

    def one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        gqa = q.shape[2] != k.shape[2]
        out = scaled_dot_product_attention(q_, k_, v_, is_causal=True, enable_gqa=gqa)
        return out.transpose(1, 2)

    def local(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        if len(cu_seqlens) == 2:
            return one(q, k, v)
        parts = [one(q[:, a:z], k[:, a:z], v[:, a:z]) for a, z in pairwise(cu_seqlens)]
        return torch.cat(parts, dim=1)

    return local


def _deepspeed() -> None:
    """DeepSpeed's own communication over the process group that is there."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It looks for compilers and builds an all-reduce for CPUs; neither is used here.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    deepspeed.utils.logger.setLevel("ERROR")
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def _distributed_attention(sizes: Sizes, mesh: Mesh) -> Attention:
    _deepspeed()
    from deepspeed.sequence.layer import DistributedAttention

    whole = DistributedAttention(
        _packed(sizes.cu_seqlens), mesh.sequence_group, scatter_idx=2, gather_idx=1
    )
    return lambda q, k, v: whole(q, k, v, 0)


def _ulysses_hf(sizes: Sizes, mesh: Mesh) -> Attention:
    _deepspeed()
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    share = sizes.tokens // mesh.sequence_size
    whole = UlyssesSPAttentionHF(
        attn=sdpa_attention_forward, batch_size=1, attn_head_count=sizes.heads,
        attn_head_size=sizes.dim, kv_head_count=sizes.groups, num_hidden_layers=1,
        process_group=mesh.sequence_group, local_seq_length=share, global_seq_length=sizes.tokens,
    )  # fmt: skip
    layer = _layer(sizes)
    first = mesh.sequence_rank * share
    length = sizes.tokens // sizes.documents
    positions = (torch.arange(first, first + share) % length).unsqueeze(0)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer.num_key_value_groups = sizes.heads // sizes.groups
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        out, _ = whole(layer, *heads_first, None, position_ids=positions)
        found: Tensor = out.view(q.shape)
        return found

    return run


def _layer(sizes: Sizes) -> Any:
    """What attention functions of Transformers read of the layer that calls them."""
    return SimpleNamespace(
        num_key_value_groups=sizes.heads // sizes.groups, is_causal=True, training=True
    )


def _ringmaster(
    backend: str, *, rotate: str = "allgather", balance: str = "none", all_to_all: bool = False
) -> Callable[[Sizes, Mesh], Attention]:
    """`all_to_all`: its exchange for accelerators over gloo, which it replaces by a gather there
    though gloo has had the operation for long."""

    def build(sizes: Sizes, mesh: Mesh) -> Attention:
        import ringmaster
        from ringmaster import comm
        from ringmaster.strategies.ring import make_ring_attention
        from ringmaster.strategies.ulysses import make_ulysses_attention

        config = ringmaster.RingmasterConfig(
            size=mesh.sequence_size,
            backend=ringmaster.Backend(backend),
            rotate_method=ringmaster.RotateMethod(rotate),
            load_balance=ringmaster.LoadBalance(balance),
        )
        config.normalize(num_kv_heads=sizes.groups, intra_node_size=None)
        runtime = ringmaster.CPRuntime(config=config, cp_group=mesh.sequence_group)
        ulysses = backend == "ulysses"
        setattr(runtime, "ulysses_group" if ulysses else "ring_group", mesh.sequence_group)
        if sizes.documents > 1:
            cu_seqlens = torch.tensor(sizes.cu_seqlens, dtype=torch.int32)
            runtime.varlen = (cu_seqlens, sizes.tokens // sizes.documents)
        function = (
            make_ulysses_attention("sdpa")
            if ulysses
            else make_ring_attention("math", "math", config.rotate_method)
        )
        layer = _layer(sizes)
        shown = SimpleNamespace(**vars(dist))
        shown.get_backend = lambda group=None: "an accelerator's"

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            ringmaster.set_runtime(runtime)
            comm.dist = shown if all_to_all else dist
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            out, _ = function(layer, *heads_first, None, is_causal=True)
            found: Tensor = out.reshape(q.shape)
            return found

        return run

    return build


def _square(copies: int) -> Callable[[Sizes, int], int]:
    """`copies` float32 tensors of the scores of a rank's share with one share of keys."""
    return lambda s, parts: copies * 4 * s.heads * (s.tokens // parts) ** 2


def _half(copies: int) -> Callable[[Sizes, int], int]:
    """The same of one of the two blocks of tokens that a zigzag share is made of."""
    return lambda s, parts: copies * 4 * s.heads * (s.tokens // (2 * parts)) ** 2


def _wide(copies: int) -> Callable[[Sizes, int], int]:
    """The same with all keys."""
    return lambda s, parts: copies * 4 * s.heads * (s.tokens // parts) * s.tokens


def _mask(whole: bool) -> Callable[[Sizes, int], int]:
    """The mask a packed row gets, in bool and as torch widens it; nothing without documents."""

    def count(s: Sizes, parts: int) -> int:
        return 5 * s.tokens * (s.tokens if whole else s.tokens // parts) * (s.documents > 1)

    return count


def _either(packed: Callable[[Sizes, int], int], dense: Callable[[Sizes, int], int]) -> Any:
    return lambda s, parts: (packed if s.documents > 1 else dense)(s, parts)


METHODS: dict[str, Method] = {
    "xdist ulysses": Method(_ours("ulysses", False)),
    "xdist ring": Method(_ours("ring", True), zigzag=True),
    "DeepSpeed DistributedAttention": Method(_distributed_attention, "xdist ulysses"),
    "DeepSpeed UlyssesSPAttentionHF": Method(_ulysses_hf, "xdist ulysses"),
    "ringmaster Ulysses": Method(
        _ringmaster("ulysses"), "xdist ulysses", scores_bytes=_mask(whole=True)
    ),
    "ringmaster Ulysses by all-to-all": Method(
        _ringmaster("ulysses", all_to_all=True), "xdist ulysses", scores_bytes=_mask(whole=True)
    ),
    "ringmaster ring, p2p": Method(
        _ringmaster("ring", rotate="alltoall"),
        "xdist ring",
        scores_bytes=_either(_mask(whole=False), _square(4)),
    ),
    "ringmaster ring, all-gather": Method(
        _ringmaster("ring"), "xdist ring", scores_bytes=_either(_mask(whole=False), _wide(3))
    ),
    "ringmaster distflash": Method(
        _ringmaster("ring", balance="distflash"), "xdist ring", scores_bytes=_square(4)
    ),
    "ringmaster zigzag": Method(
        _ringmaster("ring", balance="head_tail"),
        "xdist ring",
        zigzag=True,
        scores_bytes=_half(3),
    ),
}
