"""The interface by which one driver serves every recurrence; its use: docs/add_a_recurrence.md.

A recurrence carries a state [B, H, K, V] along the sequence: S_out = M S_in + E for a run of
tokens, and outputs that depend on S_in and the run's own tokens. The driver cuts a rank's share
into *tiles* of some thousand tokens, keeps one state a tile, moves states between ranks and calls
the methods below on one tile at a time. A new recurrence needs `state_shape`, `transition_of` and
`run`; the other methods have defaults made of these by autograd, to be replaced where they are
slow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xdist.comm.scan import Transition
from xdist.cost.recurrent import Shares, shared_heads, split_heads

Inputs = Sequence[Tensor | None]

# Tokens of a tile: enough for the matrix products, small enough for a cache with 8 rows of batch x
# heads; with more rows fewer, down to the least.
TILE_TOKENS, LEAST_TILE_TOKENS = 4096, 2048


def state_dtype(inputs: Inputs) -> torch.dtype:
    """float64 where the inputs are, else float32."""
    first = next(x for x in inputs if x is not None)
    return torch.float64 if first.dtype == torch.float64 else torch.float32


class Recurrence(ABC):
    """One recurrence. `inputs` are tensors [B, n, heads, ...] (or None where left out), tokens in
    dim 1 and heads in dim 2, but for those whose index is in `whole`: they are the same on every
    rank, have no tokens, and heads in dim 0.

    transition: the kind of M. marks_documents: whether `prepare` takes `starts`; else tiles are
    cut where a document starts. kernel_tile_tokens: tokens of a tile where the kernels work best
    with a number of their own, as on a GPU; None elsewhere.
    """

    transition: Transition = "diagonal"
    whole: frozenset[int] = frozenset()
    marks_documents: bool = False

    @property
    def kernel_tile_tokens(self) -> int | None:
        return None

    # --- shapes --------------------------------------------------------------------------------

    @abstractmethod
    def state_shape(self, inputs: Inputs) -> tuple[int, int, int, int]:
        """(B, H, K, V) of a state."""

    def value_dim(self, inputs: Inputs) -> int:
        """V of the outputs [B, n, H, V]."""
        return self.state_shape(inputs)[3]

    def output_dtype(self, inputs: Inputs) -> torch.dtype:
        """Dtype of the outputs."""
        return next(x for x in inputs if x is not None).dtype

    def identity(self, inputs: Inputs) -> Tensor:
        """The state before a document's first token, and the gradient where nothing follows."""
        first = next(x for x in inputs if x is not None)
        return first.new_zeros(self.state_shape(inputs), dtype=state_dtype(inputs))

    def rates_of(self, inputs: Inputs) -> Tensor | None:
        """[H, K] by which a travelling logarithm [B, H] is multiplied; None: it travels whole."""
        return None

    def shares(self, inputs: Inputs, ranks: int) -> tuple[Shares, tuple[Shares | None, ...]]:
        """Heads of each rank under strategy switch: of outputs and states, and of each input.

        An input with fewer heads than the outputs shares each among equally many of them.
        """
        heads = self.state_shape(inputs)[1]
        values = split_heads(heads, ranks)
        found: list[Shares | None] = []
        for index, x in enumerate(inputs):
            own = 0 if x is None else x.shape[0 if index in self.whole else 2]
            found.append(None if x is None else shared_heads(values, max(1, heads // max(own, 1))))
        return values, tuple(found)

    def tile_tokens(self, inputs: Inputs) -> int:
        """Tokens of a tile; one state is kept for each."""
        if self.kernel_tile_tokens is not None:
            return self.kernel_tile_tokens
        batch, heads, _, _ = self.state_shape(inputs)
        fitting = 8 * TILE_TOKENS // max(1, batch * heads)
        return min(TILE_TOKENS, max(LEAST_TILE_TOKENS, fitting))

    def row_tile_tokens(self, inputs: Inputs) -> int:
        """The same where the batch is many rows of a grid, of which some thousand tokens in all are
        worked on at once."""
        return self.tile_tokens(inputs)

    # --- one tile forward ----------------------------------------------------------------------

    def prepare(self, inputs: Inputs, starts: Tensor | None) -> Any:
        """What of a tile needs no state: any (nested) tuple of tensors.

        starts: bool [T], True where a document starts inside the tile (never its first token); None
        where none does.
        """
        return tuple(inputs)

    @abstractmethod
    def transition_of(self, tile: Any) -> Tensor | None:
        """M of a tile of one document, as it travels: None for "none" and "logsumexp", log M [B, H]
        for "scalar" and where there are rates, log M [B, H, K] for "diagonal", M [B, H, K, K]."""

    def advance(self, tile: Any, state: Tensor) -> Tensor:
        """The state after the tile."""
        return self.run(tile, state)[1]

    def summarised(
        self, tile: Any, state: Tensor, *, through: bool
    ) -> tuple[Any, Tensor, Tensor | None]:
        """The tile, with what was found that later calls need too; `advance`; and with `through`
        also `transition_of`, else None."""
        return tile, self.advance(tile, state), self.transition_of(tile) if through else None

    def ahead(self, tile: Any) -> Any:
        """The tile with the part of its outputs that needs no state; made while states travel."""
        return tile

    @abstractmethod
    def run(self, tile: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, H, V] and the state after the tile."""

    def run_into(self, tile: Any, state: Tensor, out: Tensor) -> Tensor:
        """`run` with its outputs written to `out`, a part of a larger tensor; the state after."""
        found, after = self.run(tile, state)
        out.copy_(found)
        return after

    # --- one tile backward ---------------------------------------------------------------------

    def adjoint(self, tile: Any, state: Tensor, dout: Tensor, dstate: Tensor) -> Tensor:
        """Gradient of the state before the tile, from those of outputs and of the state after."""
        return self._gradients(tile, state, dout, dstate, of_inputs=False)[1]

    def summarised_back(
        self, tile: Any, state: Tensor, dout: Tensor, dstate: Tensor
    ) -> tuple[Any, Tensor]:
        """The tile, with what was found that its `backward` needs too; and `adjoint`."""
        return tile, self.adjoint(tile, state, dout, dstate)

    def backward_ahead(self, tile: Any, state: Tensor, dout: Tensor) -> Any:
        """The tile with what of `backward` needs no dstate; made while gradients travel."""
        return tile

    def backward(
        self, tile: Any, state: Tensor, dout: Tensor, dstate: Tensor
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        """Gradients of the inputs (None where an input is None), and of the state before."""
        return self._gradients(tile, state, dout, dstate, of_inputs=True)

    def _gradients(
        self, tile: Any, state: Tensor, dout: Tensor, dstate: Tensor, *, of_inputs: bool
    ) -> tuple[list[Tensor | None], Tensor]:
        """By autograd through `run`; for recurrences whose `prepare` is the default."""
        with torch.enable_grad():
            before = state.detach().requires_grad_()
            given = [None if x is None else x.detach().requires_grad_(of_inputs) for x in tile]
            results = self.run(tuple(given), before)
            wanted = [before, *(x for x in given if x is not None and of_inputs)]
            made = zip(results, (dout, dstate), strict=True)
            reached = [(r, g.to(r.dtype)) for r, g in made if r.requires_grad]
            outputs, grads = zip(*reached, strict=True)
            found = torch.autograd.grad(outputs, wanted, grads, allow_unused=True)
        own = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
        rest = iter(own[1:])
        return [None if x is None or not of_inputs else next(rest) for x in given], own[0]
