"""Final states of a recurrence that gives its states in another dtype than the call's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import xdist
from xdist.testing import RankPool


class Sum(xdist.Recurrence):
    """A running sum over tokens, whose state comes back in the dtype of x."""

    transition = "none"

    def state_shape(self, inputs: Any) -> tuple[int, int, int, int]:
        batch, _, heads, dim = inputs[0].shape
        return batch, heads, 1, dim

    def value_dim(self, inputs: Any) -> int:
        return int(inputs[0].shape[3])

    def transition_of(self, inputs: Any) -> None:
        return None

    def run(self, inputs: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        x = inputs[0]
        out = (x.float().cumsum(1) + state.transpose(1, 2)).to(x.dtype)
        return out, out[:, -1, :, None]


def final_states(strategy: str) -> tuple[torch.dtype, list[float]]:
    mesh = xdist.init_mesh(ring=2, timeout_s=20)
    shard = xdist.SequenceShard(mesh, xdist.Layout.contiguous(8, 2), (0, 3, 8))
    x = shard.scatter(torch.ones(1, 8, 2, 1, dtype=torch.bfloat16))
    _, final = xdist.recurrence(
        Sum(), x, shard=shard, output_final_state=True, strategy=strategy
    )  # fmt: skip
    return final.dtype, final.flatten().tolist()


def test_final_states_have_the_dtype_of_states_on_every_rank(pool2: RankPool) -> None:
    # One rank owns the last document's state, and the other must expect what it sends.
    for strategy in ("scan", "switch"):
        assert pool2.run(final_states, strategy) == [(torch.float32, [3.0, 3.0, 5.0, 5.0])] * 2
