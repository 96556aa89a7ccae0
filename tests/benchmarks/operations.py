"""Inputs of every recurrence, drawn block by block so that a rank draws no more than its share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import xdist

BLOCK_TOKENS = 1024


@dataclass(frozen=True)
class Sizes:
    """Heads and their dims; selective_scan has heads x width channels of state_dim."""

    heads: int = 2
    key_dim: int = 16
    width: int = 16
    state_dim: int = 16


Draw = Callable[[int, Sizes, torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Operation:
    """One operation of `xdist`: tokens (n, sizes, generator) -> inputs [1, n, ...], whole (the
    same) -> inputs that every rank holds; like: the input that has the outputs' shape."""

    name: str
    tokens: Draw
    whole: Draw = lambda n, sizes, generator: {}
    like: str = "v"


def _linear(kind: str) -> Draw:
    def draw(n: int, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
        found = {
            "q": torch.randn(1, n, sizes.heads, sizes.key_dim, generator=generator),
            "k": torch.randn(1, n, sizes.heads, sizes.key_dim, generator=generator),
            "v": torch.randn(1, n, sizes.heads, sizes.width, generator=generator),
        }
        shape = {"scalar": (1, n, sizes.heads), "diagonal": (1, n, sizes.heads, sizes.key_dim)}.get(
            kind
        )
        if shape is not None:
            found["log_decay"] = -0.01 * torch.rand(shape, generator=generator)
        return found

    return draw


def _delta(kind: str) -> Draw:
    inner = _linear(kind)

    def draw(n: int, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
        found = inner(n, sizes, generator)
        # Keys of rank 4 of 16, of length 1, and small steps: what crosses ranks then stays.
        basis = torch.randn(4, sizes.key_dim, generator=torch.Generator().manual_seed(7))
        low = torch.randn(1, n, sizes.heads, 4, generator=generator) @ basis
        found["k"] = normalize(low, dim=-1)
        found["beta"] = 0.05 * torch.rand(1, n, sizes.heads, generator=generator)
        return found

    return draw


def _ssd(n: int, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "x": torch.randn(1, n, sizes.heads, sizes.width, generator=generator),
        "dt": 0.001 + 0.1 * torch.rand(1, n, sizes.heads, generator=generator),
        "B": torch.randn(1, n, 1, sizes.key_dim, generator=generator),
        "C": torch.randn(1, n, 1, sizes.key_dim, generator=generator),
    }


def _ssd_whole(n: int, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "A": -torch.rand(sizes.heads, generator=generator) - 0.1,
        "D": torch.randn(sizes.heads, generator=generator),
    }


def _selective(n: int, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "u": torch.randn(1, n, sizes.heads * sizes.width, generator=generator),
        "delta": 0.001 + 0.1 * torch.rand(1, n, sizes.heads * sizes.width, generator=generator),
        "B": torch.randn(1, n, sizes.state_dim, generator=generator),
        "C": torch.randn(1, n, sizes.state_dim, generator=generator),
    }


def _selective_whole(n: int, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    rates = torch.arange(1.0, sizes.state_dim + 1).repeat(sizes.heads * sizes.width, 1)
    return {"A": -0.2 * rates, "D": torch.randn(sizes.heads * sizes.width, generator=generator)}


def _prefix(n: int, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: torch.randn(1, n, sizes.heads, sizes.key_dim, generator=generator)
        for name in ("k", "v")
    }


def _prefix_whole(n: int, sizes: Sizes, generator: torch.Generator) -> dict[str, Tensor]:
    return {"q": torch.randn(sizes.heads, sizes.key_dim, generator=generator)}


SMALL = Sizes()
OPERATIONS = {
    "linear_attention, no decay": Operation("linear_attention", _linear("none")),
    "linear_attention, scalar": Operation("linear_attention", _linear("scalar")),
    "linear_attention, diagonal": Operation("linear_attention", _linear("diagonal")),
    "ssd": Operation("ssd", _ssd, _ssd_whole, "x"),
    "delta_rule, no decay": Operation("delta_rule", _delta("none")),
    "delta_rule, scalar": Operation("delta_rule", _delta("scalar")),
    "delta_rule, diagonal": Operation("delta_rule", _delta("diagonal")),
    "selective_scan": Operation("selective_scan", _selective, _selective_whole, "u"),
    "prefix_attention": Operation("prefix_attention", _prefix, _prefix_whole),
}


def share(
    operation: Operation, start: int, stop: int, dtype: torch.dtype, sizes: Sizes = SMALL
) -> tuple[dict[str, Tensor], Tensor]:
    """(inputs, gradient of the outputs) of positions [start, stop), with values of `dtype`, in
    float32; both ends are multiples of BLOCK_TOKENS."""
    blocks: list[dict[str, Tensor]] = []
    for block in range(start // BLOCK_TOKENS, stop // BLOCK_TOKENS):
        generator = torch.Generator().manual_seed(block)
        found = operation.tokens(BLOCK_TOKENS, sizes, generator)
        found["dout"] = torch.randn(found[operation.like].shape, generator=generator)
        blocks.append(found)
    inputs = {name: torch.cat([block[name] for block in blocks], 1) for name in blocks[0]}
    inputs.update(operation.whole(0, sizes, torch.Generator().manual_seed(1 << 40)))
    rounded = {name: x.to(dtype).float() for name, x in inputs.items()}
    dout = rounded.pop("dout")
    return rounded, dout


def call(operation: Operation, shard: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Outputs."""
    return getattr(xdist, operation.name)(**inputs, shard=shard, **options)
