"""Cases of law 1 for attention: drawing inputs, running them on ranks, and comparing.

The reference (`attention_dense`) decides visibility from the words of the design, not from
`Mask.spans`, so that a mistake there shows too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

import xdist
from tests.multirank.attention_dense import dense, kept_pairs, visible_pairs
from xdist.comm.collectives import group_of
from xdist.layout import Layout
from xdist.mask import Mask, PerHead
from xdist.mesh import Mesh
from xdist.testing import relative_error

Segments = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Case:
    """One call. `keys` is None (same), "replicated", or the segments of the keys' own layout.

    `ulysses` is the inner degree of the mesh, the outer one the ranks of `layout` over it.
    `strided` inputs lie in memory as [B, heads, n, dim]. `few` is for who runs the case: kernels
    then work in blocks of few tokens.
    """

    strategy: str
    layout: Segments
    mask: Mask
    n: int
    heads: int = 4
    groups: int = 2
    documents: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    softcap: float | None = None
    sinks: bool = False
    keys: str | Segments | None = None
    key_documents: tuple[int, ...] | None = None
    m: int = 0
    batch: int = 2
    dim: int = 4
    value_dim: int = 3
    ulysses: int = 1
    scale: float | None = None
    dropout: xdist.Dropout | None = None
    head_chunks: int = 1
    strided: bool = False
    few: bool = False

    @property
    def key_tokens(self) -> int:
        return self.n if self.keys is None else self.m

    @property
    def q_layout(self) -> Layout:
        return Layout.from_segments(self.n, self.layout)

    @property
    def k_layout(self) -> Layout | None:
        """None where every rank holds all keys."""
        if self.keys is None:
            return self.q_layout
        return None if self.keys == "replicated" else Layout.from_segments(self.m, self.keys)

    def on_one_rank(self) -> Case:
        keys = self.keys if isinstance(self.keys, str | None) else (((0, self.m),),)
        return replace(self, layout=(((0, self.n),),), keys=keys, ulysses=1)


def segments(layout: Layout) -> Segments:
    return tuple(tuple(layout.segments(rank)) for rank in range(layout.parts))


def draw(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Whole q, k, v, dout (and sinks) in float64, with values that the case's dtype holds."""
    made = torch.Generator().manual_seed(seed)
    shapes = {
        "q": (case.batch, case.n, case.heads, case.dim),
        "k": (case.batch, case.key_tokens, case.groups, case.dim),
        "v": (case.batch, case.key_tokens, case.groups, case.value_dim),
        "dout": (case.batch, case.n, case.heads, case.value_dim),
    }
    if case.sinks:
        shapes["sinks"] = (case.heads,)
    found = {
        name: torch.randn(s, generator=made, dtype=torch.float64) for name, s in shapes.items()
    }
    return {name: x.to(case.dtype).double() for name, x in found.items()}


def mesh_of(parts: int, ulysses: int = 1) -> Mesh | None:
    """The mesh of the first `parts` ranks of this world; None on the ranks beyond."""
    world = xdist.init_mesh()
    if parts == world.world_size:
        return xdist.init_mesh(ring=parts // ulysses, ulysses=ulysses)
    # The others make a group too: torch names a group by how many its members made before.
    member = world.world_rank < parts
    ranks = range(parts) if member else range(parts, world.world_size)
    group = group_of(ranks, "part")
    if not member:
        return None
    return Mesh(
        1,
        parts // ulysses,
        ulysses,
        world.world_rank,
        world.device,
        sequence_group=group if parts > 1 else None,
    )


def shards(case: Case) -> tuple[xdist.SequenceShard, xdist.SequenceShard | str]:
    """The shard and key_shard of a case on this rank's mesh."""
    mesh = mesh_of(len(case.layout), case.ulysses)
    assert mesh is not None, "this rank has no part in the case"
    shard = xdist.SequenceShard(mesh, case.q_layout, case.documents)
    if case.keys is None:
        return shard, "same"
    if case.k_layout is None:
        return shard, "replicated"
    return shard, xdist.SequenceShard(mesh, case.k_layout, case.key_documents)


def call(case: Case, seed: int = 0) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Runs the forward on this rank: (out, leaves, dout)."""
    shard, key_shard = shards(case)
    whole = {name: x.to(case.dtype) for name, x in draw(case, seed).items()}
    at = torch.from_numpy(case.q_layout.positions(shard.rank))
    leaves = {"q": whole["q"][:, at], "k": whole["k"], "v": whole["v"]}
    if case.k_layout is not None:
        key_at = torch.from_numpy(case.k_layout.positions(shard.rank))
        leaves.update(k=whole["k"][:, key_at], v=whole["v"][:, key_at])
    if case.sinks:
        leaves["sinks"] = whole["sinks"]
    leaves = {name: x.clone() for name, x in leaves.items()}
    dout = whole["dout"][:, at]
    if case.strided:
        dout = dout.transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("q", "k", "v"):
            leaves[name] = leaves[name].transpose(1, 2).contiguous().transpose(1, 2)
    for x in leaves.values():
        x.requires_grad_()
    out = xdist.attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        shard,
        mask=case.mask,
        strategy=case.strategy,
        scale=case.scale,
        softcap=case.softcap,
        sinks=leaves.get("sinks"),
        key_shard=key_shard,
        dropout=case.dropout,
        head_chunks=case.head_chunks,
    )
    return out, leaves, dout


def results(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """out and the gradient of every leaf, on this rank."""
    out, leaves, dout = call(case, seed)
    assert out.dtype == case.dtype
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    found = {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), **found}


def run_cases(cases: list[Case], seeds: tuple[int, ...] = (0,)) -> list[list[dict[str, Tensor]]]:
    """On one rank: every case with every seed."""
    return [[results(case, seed) for seed in seeds] for case in cases]


def joined(case: Case, ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' results as one device would give them, in float64; parts are summed."""
    found: dict[str, Tensor] = {}
    for name in ranks[0]:
        layout = case.k_layout if name in ("dk", "dv") else case.q_layout
        if layout is None or name == "dsinks":
            found[name] = torch.stack([part[name].double() for part in ranks]).sum(0)
            continue
        tokens = [part[name].double() for part in ranks]
        whole = torch.full((tokens[0].shape[0], layout.length, *tokens[0].shape[2:]), torch.nan)
        whole = whole.double()
        for rank, part in enumerate(tokens):
            whole[:, torch.from_numpy(layout.positions(rank))] = part
        found[name] = whole
    return found


def visible(case: Case) -> Tensor:
    """Bool `[H, N, M]` from the definition of Mask in the design."""
    cuts = case.documents or (0, case.n)
    key_cuts = cuts if case.keys is None else case.key_documents or (0, case.m)
    window = case.mask.window
    return visible_pairs(
        case.heads,
        cuts,
        key_cuts,
        causal=case.mask.causal,
        windows=window.windows if isinstance(window, PerHead) else [window],
        prefix=case.mask.prefix,
        chunk=case.mask.chunk,
    )


def factors(case: Case) -> Tensor | None:
    """`[B, H, N, M]`: what dropout multiplies the probabilities by."""
    drop = case.dropout
    if drop is None:
        return None
    rows = range(drop.first_row, drop.first_row + case.batch)
    seeds = (drop.seed, drop.step, drop.layer)
    kept = kept_pairs(drop.rate, seeds, rows, case.heads, case.n, case.key_tokens)
    return kept.double() / (1 - drop.rate)


@lru_cache(maxsize=64)
def reference(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """out and every gradient by plain dense softmax in float64; `scale_dsinks` is sum |terms|."""
    whole = draw(case, seed)
    dout = whole.pop("dout")
    leaves = {name: x.requires_grad_() for name, x in whole.items()}
    out, taken = dense(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        leaves.get("sinks"),
        seen=visible(case),
        scale=case.dim**-0.5 if case.scale is None else case.scale,
        softcap=case.softcap,
        factors=factors(case),
    )
    grads = torch.autograd.grad(out, list(leaves.values()), dout, materialize_grads=True)
    found = {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    if case.sinks:
        found["scale_dsinks"] = (taken * (out * dout).sum(-1)).abs().sum((0, 1)).detach()
    return {"out": out.detach(), **found}


def errors(case: Case, ranks: list[dict[str, Tensor]], seed: int = 0) -> dict[str, float]:
    """Relative error of every tensor against the dense reference."""
    # How the sequence is split does not matter to one device: one reference for all splits.
    want = reference(replace(case.on_one_rank(), strategy=""), seed)
    found = {}
    for name, ours in joined(case, ranks).items():
        if name == "dsinks":
            size = float(want["scale_dsinks"].max())
            gap = float((ours - want[name]).abs().max())
            found[name] = gap / size if size else gap
        elif float(want[name].abs().max() if want[name].numel() else 0) < 1e-12:
            # Where every query sees one key, dq and dk are zero up to rounding.
            found[name] = float(ours.abs().max()) if ours.numel() else 0.0
        else:
            found[name] = relative_error(ours, want[name])
    return found
