"""Cases of law 1 for attention: drawing inputs, running them on ranks, and a dense reference.

The reference decides visibility from the words of the design (documents, chunks, prefix, causal,
window), not from `Mask.spans`, so that a mistake there shows too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

import xdist
from xdist.documents import Documents
from xdist.layout import Layout
from xdist.mask import Mask
from xdist.testing import relative_error

Segments = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Case:
    """One call. `keys` is None (same), "replicated", or the segments of the keys' own layout."""

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
        return replace(self, layout=(((0, self.n),),), keys=keys)


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


def shards(case: Case) -> tuple[xdist.SequenceShard, xdist.SequenceShard | str]:
    """The shard and key_shard of a case on this rank's mesh."""
    mesh = xdist.init_mesh(ring=len(case.layout))
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
    leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
    out = xdist.attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        shard,
        mask=case.mask,
        strategy=case.strategy,
        softcap=case.softcap,
        sinks=leaves.get("sinks"),
        key_shard=key_shard,
    )
    return out, leaves, whole["dout"][:, at]


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
    docs = Documents.of(case.documents, case.n)
    key_docs = docs if case.keys is None else Documents.of(case.key_documents, case.m)
    rows, columns = [], []
    for documents, found in ((docs, rows), (key_docs, columns)):
        for number in range(documents.count):
            start, stop = documents.cu_seqlens[number], documents.cu_seqlens[number + 1]
            found.extend((number, place) for place in range(stop - start))
    doc, place = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2).T.unsqueeze(2)
    key_doc, key_place = torch.tensor(columns, dtype=torch.int64).reshape(-1, 2).T.unsqueeze(1)
    same = doc == key_doc
    if case.mask.chunk is not None:
        same = same & (place // case.mask.chunk == key_place // case.mask.chunk)
    found = []
    for head in range(case.heads):
        left, right = case.mask.sides(head)
        near = torch.ones_like(same)
        if left is not None:
            near &= key_place >= place - left
        if right is not None:
            near &= key_place <= place + right
        found.append(same & (near | (key_place < case.mask.prefix)))
    return torch.stack(found)


@lru_cache(maxsize=64)
def reference(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """out and every gradient by plain dense softmax in float64; `scale_dsinks` is sum |terms|."""
    whole = draw(case, seed)
    dout = whole.pop("dout")
    leaves = {name: x.requires_grad_() for name, x in whole.items()}
    shared = case.heads // case.groups
    k, v = (leaves[name].repeat_interleave(shared, dim=2) for name in ("k", "v"))
    scores = torch.einsum("bihd,bjhd->bhij", leaves["q"], k) * case.dim**-0.5
    if case.softcap is not None:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    seen = visible(case)
    some = seen.any(-1)[None, :, :, None]
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(~some, 0.0)
    if case.sinks:
        sink = leaves["sinks"][None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : case.key_tokens] * some
    out = torch.einsum("bhij,bjhe->bihe", weights, v)
    grads = torch.autograd.grad(out, list(leaves.values()), dout, materialize_grads=True)
    found = {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}
    if case.sinks:
        left = (1 - weights.sum(-1)).transpose(1, 2) * some[..., 0].transpose(1, 2)
        found["scale_dsinks"] = (left * (out * dout).sum(-1)).abs().sum((0, 1)).detach()
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
