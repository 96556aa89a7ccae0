"""Cross entropy over tiles of tokens: head, loss and their gradients in one sweep.

The logits of a tile ([T, vocab]) exist only while the tile is worked on. The gradient of the
hidden states is made in the same sweep and replaces them for backward, so that the memory beyond
inputs and gradients does not depend on the sequence length.

    what is sharded   tokens, before and after; the head is whole on every rank
    what moves        two float64 numbers: valid tokens and the sum of the losses (reduce)
    kept for backward the gradients of hidden and head, for a gradient of 1
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from xdist.comm.first_order import first_order
from xdist.comm.reduce import start_reduce
from xdist.errors import ShapeError, StrategyError
from xdist.memory.answers import count_answers
from xdist.memory.normalise import normalised, normalised_backward
from xdist_kernels import backend as kernels_backend
from xdist_kernels import cross_entropy as tiles
from xdist_kernels.autocast import in_given_dtypes
from xdist_kernels.errors import KernelError

# Of a tile's gradients in float16, whose smallest number is above 1 / (tokens of a long batch):
# they get this weight, which no sum over a tile takes out of its range, and the rest in backward.
_FLOAT16_WEIGHT = 2.0**-6


class TiledCrossEntropy(torch.autograd.Function):
    """hidden [B, n, C], head [V, C], norm [C] or None -> the global mean loss, a 0-dim tensor.

    valid: the number of valid tokens of the global batch; total: adds a 0-dim tensor over all
    data x sequence ranks; dtype: of the matrix products; overwrite: the gradient of hidden may
    take its place (a caller that owns it saves [B, n, C]); backend: of the loss of a tile.
    """

    @staticmethod
    @in_given_dtypes
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        norm: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        valid: float,
        total: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        overwrite: bool,
        backend: str = "auto",
    ) -> Tensor:
        form = form_of(backend, hidden.device, dtype)
        sweep = _Sweep(hidden, head, norm, dtype, overwrite, form)
        weight = 1.0 / valid if valid else 0.0
        own = sweep.run(labels, ignore_index, weight)
        ctx.sweep = sweep
        loss = total(own.to(torch.float64)) * weight
        return loss.to(hidden.dtype if hidden.dtype.itemsize > 4 else torch.float32)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        sweep, ctx.sweep = ctx.sweep, None
        if sweep is None:
            raise RuntimeError(
                "cross_entropy: backward was called twice; its gradients are made once, in forward"
            )
        return (*sweep.gradients(grad), None, None, None, None, None, None, None)


class _Sweep:
    """The tiles of one loss: logits, loss and gradients of each in turn."""

    def __init__(
        self,
        hidden: Tensor,
        head: Tensor,
        norm: Tensor | None,
        dtype: torch.dtype,
        overwrite: bool,
        form: ModuleType,
    ) -> None:
        self.form = form
        self.hidden: Tensor | None = hidden
        self.head = head
        self.norm = norm
        self.dtype = dtype
        self.folded = (head if norm is None else head * norm).to(dtype)
        wide = torch.float64 if head.dtype == torch.float64 else torch.float32
        self.dfolded = torch.zeros(head.shape, dtype=wide, device=head.device)
        self.dhidden = hidden if overwrite else torch.empty_like(hidden)

    def run(self, labels: Tensor, ignore_index: int, weight: float) -> Tensor:
        """The sum of this rank's losses; dhidden and dfolded hold `weight` x their gradients, or
        what `late` x them is that."""
        assert self.hidden is not None
        inside = weight if self.dtype != torch.float16 else _FLOAT16_WEIGHT
        self.late = 1.0 if inside == weight else weight / inside
        own = torch.zeros((), dtype=torch.float64, device=self.head.device)
        rows, tokens = labels.shape
        longest = min(self.form.TILE_TOKENS, tokens)
        # Every tile's logits lie in the same memory.
        buffer = self.form.empty_tile(longest, len(self.head), self.dtype, self.head.device)
        for row in range(rows):
            for start in range(0, tokens, self.form.TILE_TOKENS):
                tile = slice(start, min(start + self.form.TILE_TOKENS, tokens))
                h, answers = self.hidden[row, tile], labels[row, tile]
                hn = h if self.norm is None else normalised(h)
                hn_ = hn.to(self.dtype)
                logits = torch.mm(hn_, self.folded.t(), out=buffer[: len(h)])
                count_answers(logits, answers, answers != ignore_index)
                total, dlogits = self.form.tile_loss(logits, answers, ignore_index, inside)
                own += total
                self.dfolded += dlogits.t() @ hn_
                dhn = (dlogits @ self.folded).to(h.dtype)
                dh = dhn if self.norm is None else normalised_backward(h, hn, dhn)
                self.dhidden[row, tile] = dh
        self.hidden = None
        return own

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of hidden, head and norm for the gradient `grad` of the loss."""
        # Reading `grad` saves two passes, and costs nothing where the host computes; a card's host
        # would wait for all that is queued, longer than the passes take.
        if self.late != 1.0 or grad.device.type != "cpu" or float(grad) != 1.0:
            factor = grad * self.late
            self.dhidden.mul_(factor)
            self.dfolded.mul_(factor)
        if self.norm is None:
            return self.dhidden, self.dfolded.to(self.head.dtype), None
        dhead = self.dfolded * self.norm
        return self.dhidden, dhead, (self.dfolded * self.head).sum(0)


def cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    shard: Any = None,
    *,
    ignore_index: int = -100,
    valid_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """`xdist.cross_entropy`: see there."""
    _check(hidden, head_weight, labels, shard)
    # Raises before anything is sent.
    form_of(backend, hidden.device, hidden.dtype)
    valid = count_valid(labels, shard, ignore_index) if valid_tokens is None else valid_tokens
    return TiledCrossEntropy.apply(
        hidden, head_weight, None, labels, ignore_index, valid, sum_of_ranks(shard),
        hidden.dtype, False, backend,
    )  # fmt: skip


def form_of(backend: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The kernels of a tile's loss that `backend` means for logits of `dtype` on `device`.

    Raises:
        StrategyError: no such backend, or Triton is forced and cannot serve.
    """
    try:
        name = kernels_backend.choose(
            "cross_entropy", backend, device, lambda: tiles.refusal(device, dtype)
        )
    except KernelError as error:
        what, _, rest = str(error).partition("\n")
        why, _, do = rest.partition("\n")
        raise StrategyError(what, why, do) from error
    return tiles.kernels(name)


def count_valid(labels: Tensor, shard: Any, ignore_index: int) -> int:
    """Labels other than `ignore_index`, over data x sequence ranks."""
    own = (labels != ignore_index).sum().to(torch.float64)
    return int(sum_of_ranks(shard)(own))


def sum_of_ranks(shard: Any) -> Callable[[Tensor], Tensor]:
    """What adds a 0-dim tensor over the data x sequence ranks of a shard (None: one rank)."""
    group = None if shard is None else shard.mesh.parameter_group
    return lambda own: start_reduce(own, group).wait()


def _check(hidden: Tensor, head: Tensor, labels: Tensor, shard: Any) -> None:
    given = (
        f"hidden {tuple(hidden.shape)} {hidden.dtype}, head_weight {tuple(head.shape)} "
        f"{head.dtype}, labels {tuple(labels.shape)} {labels.dtype}"
    )
    fits = hidden.dim() == 3 and head.dim() == 2 and hidden.shape[2] == head.shape[1]
    if not fits or labels.shape != hidden.shape[:2]:
        raise ShapeError(
            "cross_entropy: shapes do not fit", given,
            "hidden is [B, n, C], head_weight [vocab, C], labels [B, n]",
        )  # fmt: skip
    if labels.dtype != torch.int64 or hidden.dtype != head.dtype or not head.is_floating_point():
        raise ShapeError(
            "cross_entropy: dtypes do not fit", given,
            "hidden and head_weight share a floating dtype, labels are int64",
        )  # fmt: skip
    if shard is not None and hidden.shape[1] != shard.local_length:
        raise ShapeError(
            "cross_entropy: hidden is not this rank's share of the sequence",
            f"{hidden.shape[1]} tokens were given, the shard holds {shard.local_length}",
            "pass this rank's part of hidden and of labels",
        )
