"""Inputs of the delta rule for which what crosses ranks matters: keys of low rank, small beta."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.multirank.recurrence_cases import Inputs, N, Op
from xdist_kernels.delta.reference import delta_rule_reference

BATCH, HEADS, KEY_DIM, WIDTH, RANK = 2, 4, 16, 3, 4


def draw(variant: str, generator: torch.Generator) -> Inputs:
    """variant: none, fixed, scalar or diagonal decay, and how many value heads share a key head.

    Random keys of full rank would forget everything within tens of tokens.
    """
    kind, shared = variant.split("/")
    keys = HEADS // int(shared)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    space, at = normal(BATCH, 1, keys, RANK, KEY_DIM), normal(BATCH, N, keys, 1, RANK)
    found = {
        "q": normal(BATCH, N, keys, KEY_DIM),
        "k": normalize((at @ space).squeeze(3), dim=-1),
        "v": normal(BATCH, N, HEADS, WIDTH),
        "beta": 0.05 + 0.15 * uniform(BATCH, N, HEADS),
    }
    shapes = {
        "fixed": (HEADS,),
        "scalar": (BATCH, N, HEADS),
        "diagonal": (BATCH, N, HEADS, KEY_DIM),
    }
    if kind != "none":
        found["log_decay"] = -0.02 * uniform(*shapes[kind])
    return found


def reference(
    inputs: Inputs, initial: Tensor | None, cuts: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    return delta_rule_reference(**inputs, initial_state=initial, cu_seqlens=cuts)


# DeltaNet, Gated DeltaNet (fixed, or a decay a token, without and with shared heads), KDA
OP = Op(
    "delta_rule",
    draw,
    reference,
    (BATCH, HEADS, KEY_DIM, WIDTH),
    variants=("none/2", "scalar/1", "diagonal/2", "fixed/1", "scalar/4"),
)
