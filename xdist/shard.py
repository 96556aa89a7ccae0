"""One rank's share of one batch: mesh, layout and documents together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._guards import detect_fake_mode

from xdist.comm.checks import disagreeing_ranks
from xdist.comm.collectives import ProcessGroup
from xdist.comm.first_order import first_order
from xdist.comm.gather import start_gather, start_reduce_scatter
from xdist.documents import Documents
from xdist.errors import DesyncError, LayoutError, ShapeError
from xdist.layout import Layout
from xdist.mesh import Mesh

T = TypeVar("T")
# How many different calls a shard remembers; a model makes a few.
MOST_KEPT = 32


class SequenceShard:
    """What this rank holds of sequences of `layout.length` tokens.

    `documents` are packed sequences: cu_seqlens as a list or integer tensor, Documents, or None
    for one document. Every rank of a sequence group makes it with the same layout and documents;
    their fingerprints are compared (32 control bytes to each other rank).

    Raises:
        LayoutError: the layout is for another number of ranks.
        DocumentsError: cu_seqlens do not describe the sequence.
        DesyncError: the ranks of the sequence group have different layouts or documents.
    """

    def __init__(self, mesh: Mesh, layout: Layout, documents: Any = None) -> None:
        if layout.parts != mesh.sequence_size:
            raise LayoutError(
                f"the layout is for {layout.parts} ranks, the mesh has {mesh.sequence_size} "
                "sequence ranks",
                f"ring x ulysses = {mesh.ring_size} x {mesh.ulysses_size}",
                f"make the layout with parts={mesh.sequence_size}",
            )
        self.mesh = mesh
        self.layout = layout
        self.packed = documents is not None
        """Whether documents were given; states then have a dim of documents."""
        self.documents = Documents.of(documents, layout.length)
        self._compare()
        self._positions: dict[str, Tensor] = {}
        self._kept: dict[Hashable, Any] = {}

    def _compare(self) -> None:
        held = [self.layout.segments(rank) for rank in range(self.layout.parts)]
        cuts = self.documents.cu_seqlens if self.packed else None
        agree(
            self.mesh.sequence_group,
            [(self.layout.length, held), cuts],
            "the ranks of one sequence have different layouts or documents",
            "make layout and documents the same way on every rank; data ranks may differ",
        )

    @property
    def rank(self) -> int:
        """This rank's place among the sequence ranks."""
        return self.mesh.sequence_rank

    @property
    def size(self) -> int:
        """How many ranks share the sequence."""
        return self.mesh.sequence_size

    @property
    def group(self) -> ProcessGroup | None:
        """The process group of the sequence ranks; None where there is one."""
        return self.mesh.sequence_group

    @property
    def local_length(self) -> int:
        """How many tokens this rank holds."""
        return self.layout.local_length(self.rank)

    @property
    def positions(self) -> Tensor:
        """Global position of each local token, int64 `[n]`, on the mesh's device."""
        return self._integers("positions", lambda: self.layout.positions(self.rank))

    @property
    def document_positions(self) -> Tensor:
        """Position of each local token inside its document, int64 `[n]`."""
        positions = self.layout.positions(self.rank)
        return self._integers("inside", lambda: positions - self.documents.starts(positions))

    def _integers(self, name: str, make: Callable[[], NDArray[np.int64]]) -> Tensor:
        """What `make` gives on the mesh's device, made once."""
        if not may_keep():
            return _on_device(make(), self.mesh.device)
        if name not in self._positions:
            with torch.inference_mode(False):  # autograd may save them later
                self._positions[name] = _on_device(make(), self.mesh.device)
        return self._positions[name]

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceShard:
        # A copy of a module shares the shard it holds: it never changes, what is kept of its calls
        # is found by identity, and its ranks are not compared again.
        return self

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made by the first layer that asks for `name` and kept with this shard.

        For what follows from layout, documents and `name` alone. The `MOST_KEPT` newest names are
        kept; nothing of a tracing mode is.
        """
        if not may_keep():
            return make()
        if name not in self._kept:
            if len(self._kept) >= MOST_KEPT:
                self._kept.pop(next(iter(self._kept)), None)
            with torch.inference_mode(False):  # autograd may save it later
                self._kept[name] = make()
        found: T = self._kept[name]
        return found

    def scatter(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of the whole `x`, in its segments' order. Nothing moves.

        Backward: this rank's slice, zero elsewhere.
        """
        if x.shape[dim] != self.layout.length:
            raise ShapeError(
                f"x has {x.shape[dim]} tokens along dim {dim}",
                f"the sequence has {self.layout.length}",
                "scatter takes the whole sequence",
            )
        return _Scatter.apply(x, self, dim % x.dim())

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole sequence in global order, from each rank's part `x`; on every rank.

        Moves as comm.gather: forward (P-1) x own part sent, backward a reduce-scatter (sum).
        """
        if x.shape[dim] != self.local_length:
            raise ShapeError(
                f"x has {x.shape[dim]} tokens along dim {dim}",
                f"rank {self.rank} of {self.size} holds {self.local_length}",
                "gather takes this rank's part",
            )
        return _Gather.apply(x, self, dim % x.dim())

    def slice(self, x: Tensor, dim: int) -> Tensor:
        """`scatter` without autograd: a view where this rank holds one segment."""
        parts = [x.narrow(dim, a, b - a) for a, b in self.layout.segments(self.rank)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def in_global_order(self, x: Tensor, dim: int) -> Tensor:
        """All ranks' parts one after another, put in position order."""
        starts = [0]
        for length in self.layout.local_lengths:
            starts.append(starts[-1] + length)
        pieces = self.layout.pieces
        if all(starts[p.rank] + p.offset == p.start for p in pieces):
            return x
        return torch.cat(
            [x.narrow(dim, starts[p.rank] + p.offset, p.stop - p.start) for p in pieces], dim
        )

    def in_rank_order(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of `in_global_order`."""
        runs = [run for rank in range(self.size) for run in self.layout.segments(rank)]
        if runs == sorted(runs):
            return x
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in runs], dim)


def may_keep() -> bool:
    """Whether tensors made now can serve later calls: those of a tracing mode hold no data."""
    return detect_fake_mode() is None


def _on_device(values: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def resolve(shard: SequenceShard | None, length: int, documents: Any = None) -> SequenceShard:
    """`shard`, or for None the shard of one rank that holds the whole sequence of `length`."""
    if shard is not None:
        return shard
    return SequenceShard(Mesh.one_rank(), Layout.contiguous(length, 1), documents)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SequenceShard, dim: int) -> Tensor:
        ctx.shard, ctx.dim, ctx.shape = shard, dim, x.shape
        part = shard.slice(x, dim)
        return part.clone() if part._base is not None or part is x else part

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        whole = grad.new_zeros(ctx.shape)
        offset = 0
        for start, stop in ctx.shard.layout.segments(ctx.shard.rank):
            part = grad.narrow(ctx.dim, offset, stop - start)
            whole.narrow(ctx.dim, start, stop - start).copy_(part)
            offset += stop - start
        return whole, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shard: SequenceShard, dim: int) -> Tensor:
        ctx.shard, ctx.dim, ctx.dtype = shard, dim, x.dtype
        sizes = shard.layout.local_lengths
        whole = shard.in_global_order(
            start_gather(x, shard.group, dim=dim, sizes=sizes).wait(), dim
        )
        return whole.view_as(whole)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        shard: SequenceShard = ctx.shard
        ordered = shard.in_rank_order(grad, ctx.dim)
        part = start_reduce_scatter(
            ordered, shard.group, dim=ctx.dim, sizes=shard.layout.local_lengths
        ).wait()
        return part.to(ctx.dtype), None, None


class DerivedShard(SequenceShard):
    """A shard that follows from one whose ranks were compared: nothing is exchanged."""

    def _compare(self) -> None:
        """All ranks made the first shard alike, and this one of it."""


def agree(group: ProcessGroup | None, facts: Sequence[object], what: str, remedy: str) -> None:
    """Raises DesyncError where the ranks of `group` do not hold the same `facts`.

    16 control bytes a fact go to each other rank.
    """
    if group is None:
        return
    digests = [hashlib.sha256(repr(fact).encode()).digest()[:16] for fact in facts]
    other = disagreeing_ranks(group, b"".join(digests))
    if other:
        raise DesyncError(what, f"sequence ranks {other} differ from sequence rank 0", remedy)
