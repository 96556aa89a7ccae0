"""Stacks of layers for checkpoint_grid, their results without checkpoints, and what is kept."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import xdist
from xdist.memory.grid import checkpoint_grid
from xdist.nn import RMSNorm, build_mixer
from xdist.testing import relative_error

N, DIM, BATCH = 37, 16, 2
DOCUMENTS = (0, 5, 6, 6, 20, N)
# One name for each kind of recurrence: no, scalar and diagonal decay; delta rule without, with
# scalar and with diagonal decay; state-space models; a softmax over the prefix.
KINDS = (
    "linear",
    "gated_linear",
    "gla",
    "deltanet",
    "gated_deltanet",
    "kda",
    "mamba2",
    "mamba",
    "prefix",
)
GRIDS = ((4, 2), (64, 1), (7, 3))


class Residual(nn.Module):
    """x + mixer(norm(x)), and an MLP's worth of work behind it."""

    def __init__(self, mixer: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm, self.mixer, self.after = RMSNorm(dim), mixer, nn.Linear(dim, dim)

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        h = x + self.mixer(self.norm(x), shard)
        return h + torch.tanh(self.after(h))


class TwiceLinear(nn.Module):
    """Two recurrences in one layer, the second fed by the first; `late` puts a convolution behind
    the first."""

    def __init__(self, dim: int, *, late: bool = False) -> None:
        super().__init__()
        self.late = late
        self.qkv = nn.Linear(dim, 3 * dim)
        self.keys = nn.Linear(dim, 2 * dim)
        self.taps = nn.Parameter(torch.randn(dim, 3))

    def forward(self, x: Tensor, shard: Any = None) -> Tensor:
        if not self.late:
            x = xdist.causal_conv1d(x, self.taps, None, shard, activation="silu")
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).unbind(2)
        decay = -torch.sigmoid(x[..., :2])
        first = xdist.linear_attention(q, k, v, shard, log_decay=decay).flatten(2)
        if self.late:
            first = xdist.causal_conv1d(first, self.taps, None, shard)
        q, k = torch.tanh(self.keys(first)).unflatten(-1, (2, 2, -1)).unbind(2)
        beta = torch.sigmoid(first[..., :2])
        k = torch.nn.functional.normalize(k, dim=-1)
        return x + xdist.delta_rule(q, k, v, beta, shard).flatten(2)


class Weighted(nn.Module):
    """A head: <projection(y), weights of the tokens>."""

    def __init__(self, dim: int, weights: Tensor) -> None:
        super().__init__()
        self.weights, self.projection = weights, nn.Linear(dim, dim)

    def forward(self, y: Tensor, at: slice) -> Tensor:
        return (self.projection(y) * self.weights[:, at]).sum()


@dataclass(frozen=True)
class Case:
    """A stack by the names of its mixers, joined by "+"; a grid; documents or not."""

    stack: str
    chunk_tokens: int | None
    group_layers: int | None
    packed: bool = False
    layout: tuple[Any, ...] | None = None

    @property
    def documents(self) -> tuple[int, ...] | None:
        return DOCUMENTS if self.packed else None


def build(stack: str, dim: int = DIM, dtype: torch.dtype = torch.float64) -> list[nn.Module]:
    """The layers of a stack, always with the same values."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for name in stack.split("+"):
        if name in ("twice", "late"):
            layers.append(TwiceLinear(dim, late=name == "late"))
        else:
            options = {} if name == "mamba" else {"head_dim": 8}
            layers.append(Residual(build_mixer(name, dim, **options), dim))
    return [layer.to(dtype) for layer in layers]


def draw() -> tuple[Tensor, Tensor]:
    """Inputs and output gradients of the whole sequence."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, N, DIM, generator=generator, dtype=torch.float64)
    return x, torch.randn(x.shape, generator=generator, dtype=torch.float64)


def plain(layers: Sequence[nn.Module], x: Tensor, shard: xdist.SequenceShard | None) -> Tensor:
    """The stack without checkpoints."""
    for layer in layers:
        x = layer(x, shard)
    return x


def gradients(y: Tensor, dy: Tensor, x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """Of x and of every parameter, zeros where there is none."""
    wanted = [x, *(p for layer in layers for p in layer.parameters())]
    found = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    return [
        torch.zeros(w.shape, dtype=w.dtype) if g is None else g.contiguous()
        for w, g in zip(wanted, found, strict=True)
    ]


def one_rank(documents: Sequence[int] | None) -> xdist.SequenceShard | None:
    """The whole sequence on one device, in documents."""
    if documents is None:
        return None
    mesh = xdist.mesh.Mesh.one_rank()
    return xdist.SequenceShard(mesh, xdist.Layout.contiguous(N, 1), documents)


def expected(case: Case) -> list[Tensor]:
    """Output, gradient of x and of every parameter on one device without checkpoints."""
    layers, (x, dy) = build(case.stack), draw()
    x.requires_grad_()
    y = plain(layers, x, one_rank(case.documents))
    return [y.detach(), *gradients(y, dy, x, layers)]


def found(case: Case, shard: xdist.SequenceShard | None) -> list[Tensor]:
    """The same by checkpoint_grid: this rank's tokens, and this rank's part of parameters."""
    layers, (x, dy) = build(case.stack), draw()
    if shard is not None:
        x, dy = x[:, shard.positions], dy[:, shard.positions]
    x.requires_grad_()
    y = checkpoint_grid(
        layers, x, shard, chunk_tokens=case.chunk_tokens, group_layers=case.group_layers
    )
    return [y.detach(), *gradients(y, dy, x, layers)]


def worst(values: Sequence[Tensor], references: Sequence[Tensor]) -> float:
    """The largest relative error, an absolute one where the reference is nothing but rounding."""
    return max(
        relative_error(a, b) if float(b.abs().max()) > 1e-12 else float(a.abs().max())
        for a, b in zip(values, references, strict=True)
    )


def run_cases(cases: Sequence[Case]) -> list[list[Tensor]]:
    """On one rank: every case in turn."""
    results = []
    for case in cases:
        assert case.layout is not None
        mesh = xdist.init_mesh(ring=len(case.layout))
        layout = xdist.Layout.from_segments(N, case.layout)
        results.append(found(case, xdist.SequenceShard(mesh, layout, case.documents)))
    return results


def live_bytes() -> int:
    """Bytes of all memory that Python's tensors hold, each piece once."""
    gc.collect()
    held = {}
    for thing in gc.get_objects():
        # By type: isinstance asks objects for __class__, which warns for some of torch's, and
        # other tests may leave tensors without memory (of the meta device, of tracers).
        if type(thing) in (Tensor, nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def kept_beside(layers: Sequence[nn.Module], x: Tensor, shard: Any, **grid: Any) -> int:
    """Bytes that checkpoint_grid keeps for backward, its output aside."""
    before = live_bytes()
    y = checkpoint_grid(layers, x, shard, **grid)
    return live_bytes() - before - y.nbytes
