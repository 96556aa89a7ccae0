"""What one rank measures: runs inside each rank's process, compares nothing."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import xdist
from xdist.comm import ledger
from xdist.errors import ConfigError
from xdist.layout import Layout
from xdist.ops import mean
from xdist.rank import read_rank
from xdist.shard import SequenceShard
from xdist.train.gradients import reduce_gradients

# Parameters' dtype by precision; in bfloat16 only matrix products are narrower.
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.float32}
# Standard deviation of what replaces constant initial values.
SPREAD = 0.1


@dataclass(frozen=True)
class Request:
    """What every rank is asked to run; the same on all ranks.

    length: tokens of one sequence over all ranks; batch: rows; layout: "contiguous" or "zigzag";
    documents: `cu_seqlens` or None; causal: whether an output may depend on earlier tokens only;
    degrees: (ring, ulysses) by number of ranks, where a count
    that is not listed runs as ring = count.
    """

    length: int
    vocab_size: int
    batch: int = 2
    seed: int = 0
    layout: str = "contiguous"
    documents: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] = ("float64", "float32")
    degrees: tuple[tuple[int, int, int], ...] = ()
    causal: bool = True
    # Positions perturbed by the leak probe: row b of the batch is perturbed at probes[b].
    probes: tuple[int, ...] = ()

    @property
    def told(self) -> str:
        """For the table's title."""
        documents = len(self.documents) - 1 if self.documents else 1
        return (
            f"{self.batch} sequences of {self.length} tokens, layout {self.layout}, "
            f"{documents} document(s)"
        )

    def degrees_of(self, ranks: int) -> tuple[int, int]:
        """(ring, ulysses) on this many ranks."""
        return next(((r, u) for count, r, u in self.degrees if count == ranks), (ranks, 1))

    def make_layout(self, ranks: int) -> Layout:
        """The layout on this many ranks."""
        if self.layout == "zigzag":
            return Layout.zigzag(self.length, ranks)
        return Layout.contiguous(self.length, ranks)


@dataclass
class Measurement:
    """One rank's results in one dtype. Tensors are on the CPU.

    positions: int64 [n]; outputs, probed: [B, n] the fixed random functional of the module's
    output at this rank's positions, before and after the probes' perturbation; gradients: by
    parameter, after the sum over ranks, on rank 0 only; digests: the same on every rank.
    """

    positions: Tensor
    outputs: Tensor
    probed: Tensor
    loss: float
    gradients: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    weights: str = ""
    sent_bytes: int = 0
    sent_by_move: dict[str, int] = field(default_factory=dict)


def measure(factory: Callable[..., nn.Module], request: Request) -> dict[str, Measurement]:
    """Measures on this rank, once per dtype; called on every rank of the world."""
    world = read_rank().world_size
    ring, ulysses = request.degrees_of(world)
    mesh = xdist.init_mesh(data=1, ring=ring, ulysses=ulysses)
    shard = SequenceShard(mesh, request.make_layout(world), request.documents)
    return {name: _measure_one(factory, request, shard, name) for name in request.dtypes}


def make_module(factory: Callable[..., nn.Module], precision: str, seed: int) -> nn.Module:
    """The module in one precision, from the same initial values in each.

    A factory with a parameter `precision` gets it and answers for the dtypes inside; otherwise the
    module is converted. Parameters that start constant are drawn: behind an output projection of
    zeros every gradient is zero, and nothing wrong would show.
    """
    torch.manual_seed(seed)
    takes = "precision" in inspect.signature(factory).parameters
    module = factory(precision=precision) if takes else factory()
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = torch.randn(parameter.shape, generator=generator) * SPREAD
            if parameter.numel() and bool((parameter == parameter.reshape(-1)[0]).all()):
                parameter.add_(drawn.to(parameter.device, parameter.dtype))
    return module.to(DTYPES[precision])


def _measure_one(
    factory: Callable[..., nn.Module], request: Request, shard: SequenceShard, precision: str
) -> Measurement:
    module = make_module(factory, precision, request.seed)
    tokens, labels = draw_tokens(request)
    local_tokens, local_labels = shard.scatter(tokens), shard.scatter(labels)
    with torch.no_grad():
        outputs = functional(module(local_tokens, shard), local_tokens, request.seed)
        perturbed = shard.scatter(perturb(tokens, request))
        probed = functional(module(perturbed, shard), perturbed, request.seed)
    module.zero_grad(set_to_none=True)
    with ledger() as moved:
        loss = _loss(module, local_tokens, local_labels, shard, request.seed)
        loss.backward()
        reduce_gradients(module, shard.mesh)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        for name, p in module.named_parameters()
        if p.requires_grad
    }
    return Measurement(
        positions=torch.as_tensor(shard.positions).clone(),
        outputs=outputs,
        probed=probed,
        loss=float(loss.detach()),
        gradients=gradients if shard.mesh.sequence_rank == 0 else {},
        digests={name: digest_of([grad]) for name, grad in gradients.items()},
        weights=digest_of([p.detach() for p in module.parameters()]),
        sent_bytes=moved.sent_bytes,
        sent_by_move={move: traffic.sent_bytes for move, traffic in moved.by_move.items()},
    )


def draw_tokens(request: Request) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, N], int64: drawn from the seed, equal on every rank.

    Labels are the next tokens, shifted by global position; the last token of a document has none
    (-100).
    """
    generator = torch.Generator().manual_seed(request.seed)
    shape = (request.batch, request.length)
    tokens = torch.randint(0, request.vocab_size, shape, generator=generator)
    labels = torch.roll(tokens, -1, dims=1)
    stops = request.documents[1:] if request.documents else (request.length,)
    labels[:, [stop - 1 for stop in stops if stop > 0]] = -100
    return tokens, labels


def perturb(tokens: Tensor, request: Request) -> Tensor:
    """Tokens [B, N] with row b changed at position probes[b]."""
    changed = tokens.clone()
    for row, position in enumerate(request.probes):
        changed[row, position] = (tokens[row, position] + 1) % request.vocab_size
    return changed


def functional(output: Any, tokens: Tensor, seed: int) -> Tensor:
    """[B, n]: for each token one number, a fixed random weighting of its output features.

    A module's output may be wide (logits); comparing one random functional of each position
    finds any difference (but for a set of measure zero) at the cost of one number a token.
    """
    if not isinstance(output, Tensor) or output.shape[:2] != tokens.shape:
        found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            "the module's output does not answer for its tokens",
            f"tokens are {tuple(tokens.shape)}, the output is {found}",
            "return one tensor [B, n, ...] for tokens [B, n]",
        )
    # A share may be empty, so that -1 would be ambiguous.
    flat = output.reshape(*tokens.shape, math.prod(output.shape[2:]))
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(flat.shape[-1], generator=generator, dtype=torch.float64)
    return (flat.double() @ weight.to(flat.device)) / max(1, flat.shape[-1]) ** 0.5


def _loss(
    module: nn.Module, tokens: Tensor, labels: Tensor, shard: SequenceShard, seed: int
) -> Tensor:
    """The module's own `loss(tokens, labels, shard)`, or the global mean of the functional.

    The functional alone would be linear in the output; its square is taken too, so that a wrong
    output also shows in the gradients.
    """
    loss = getattr(module, "loss", None)
    if callable(loss):
        return loss(tokens, labels, shard)
    value = functional(module(tokens, shard), tokens, seed)
    return mean(value + value.square(), shard)


def digest_of(tensors: list[Tensor]) -> str:
    """sha256 of the tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
