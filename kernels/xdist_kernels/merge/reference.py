"""Merging partial softmax results, one row at a time, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge_reference(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention over the union of the keys of `parts`, each (out `[rows,E]`, lse `[rows]`).

    (1) Z = sum_p exp(lse_p);  (2) o = sum_p exp(lse_p) / Z * o_p;  (3) lse = log Z.
    A part with lse -inf has no keys; a row with no keys in any part is 0 with lse -inf.
    """
    outs, logs = [], []
    for row in range(parts[0][1].shape[0]):
        top = max(float(lse[row]) for _, lse in parts)
        if top == -math.inf:
            outs.append(torch.zeros(parts[0][0].shape[1], dtype=torch.float64))
            logs.append(-math.inf)
            continue
        weights = [math.exp(float(lse[row]) - top) for _, lse in parts]
        total = sum(weights)  # (1), relative to the largest
        rows = torch.stack([out[row].double() for out, _ in parts])
        outs.append(torch.tensor(weights, dtype=torch.float64) / total @ rows)  # (2)
        logs.append(top + math.log(total))  # (3)
    return torch.stack(outs), torch.tensor(logs, dtype=torch.float64)
