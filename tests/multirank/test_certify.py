"""certify passes a correct module and catches every way in which a split can go wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import xdist
from xdist.certify import Report, certify
from xdist.errors import NumericsError
from xdist.rank import read_rank

VOCAB, DIM, HEADS = 13, 8, 2


class Toy(nn.Module):
    """Embedding, causal convolution, linear attention, head: looks back near and far."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.taps = nn.Parameter(torch.randn(DIM, 3) * 0.5)
        self.project = nn.Linear(DIM, 3 * DIM)
        self.head = nn.Linear(DIM, VOCAB)

    def forward(self, tokens: Tensor, shard: xdist.SequenceShard) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.convolution(x, shard)
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        x = x + self.mix(q, k, v, shard).flatten(-2)
        return self.head(x)

    def convolution(self, x: Tensor, shard: xdist.SequenceShard) -> Tensor:
        return xdist.causal_conv1d(x, self.taps, None, shard, activation="silu")

    def mix(self, q: Tensor, k: Tensor, v: Tensor, shard: xdist.SequenceShard) -> Tensor:
        return xdist.linear_attention(q, k, v, shard)

    def loss(self, tokens: Tensor, labels: Tensor, shard: xdist.SequenceShard) -> Tensor:
        x = self(tokens, shard)
        eye = torch.eye(VOCAB, dtype=x.dtype)
        return xdist.cross_entropy(x, eye, labels, shard)


class WithoutLoss(nn.Module):
    """A wrapper without `loss`: certify then takes a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Toy()

    def forward(self, tokens: Tensor, shard: xdist.SequenceShard) -> Tensor:
        return self.inner(tokens, shard)


class ForgetsHalo(Toy):
    """The convolution sees this rank's tokens only."""

    def convolution(self, x: Tensor, shard: xdist.SequenceShard) -> Tensor:
        return xdist.causal_conv1d(x, self.taps, None, None, activation="silu")


class AveragesGradients(Toy):
    """As data-parallel wrappers do: each rank's part is divided by the number of ranks."""

    def forward(self, tokens: Tensor, shard: xdist.SequenceShard) -> Tensor:
        logits = super().forward(tokens, shard)
        size = shard.mesh.sequence_size
        if logits.requires_grad:
            logits.register_hook(lambda grad: grad / size)
        return logits


class CountsEveryToken(Toy):
    """The loss is right on every rank, and every rank backpropagates all of it."""

    def loss(self, tokens: Tensor, labels: Tensor, shard: xdist.SequenceShard) -> Tensor:
        value = super().loss(tokens, labels, shard)
        scaled = value * shard.mesh.sequence_size
        return value.detach() + scaled - scaled.detach()


class MeanOfMeans(Toy):
    """Every rank returns the mean over its own tokens."""

    def loss(self, tokens: Tensor, labels: Tensor, shard: xdist.SequenceShard) -> Tensor:
        return nn.functional.cross_entropy(self(tokens, shard).flatten(0, 1), labels.flatten())


class SeesTheFuture(Toy):
    """Attention without a causal mask: wrong on one rank too."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, shard: xdist.SequenceShard) -> Tensor:
        return xdist.attention(q, k, v, shard, mask=xdist.Mask(causal=False))


class IgnoresDocuments(Toy):
    """Makes a shard of its own that has lost the documents."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, shard: xdist.SequenceShard) -> Tensor:
        return xdist.linear_attention(q, k, v, xdist.SequenceShard(shard.mesh, shard.layout))


class DetachedMove(Toy):
    """The forward is right; what came from other ranks has no backward."""

    def convolution(self, x: Tensor, shard: xdist.SequenceShard) -> Tensor:
        local = xdist.causal_conv1d(x, self.taps, None, None, activation="silu")
        whole = xdist.causal_conv1d(x, self.taps, None, shard, activation="silu")
        return local + (whole - local).detach()


class DrawsByRank(Toy):
    """Initial weights depend on the rank."""

    def __init__(self) -> None:
        torch.manual_seed(xdist.init_mesh(ring=read_rank().world_size).sequence_rank)
        super().__init__()


class DeadOutput(Toy):
    """Its output does not depend on its tokens."""

    def forward(self, tokens: Tensor, shard: xdist.SequenceShard) -> Tensor:
        return super().forward(torch.zeros_like(tokens), shard)


class WrongShape(Toy):
    """Answers with one vector a sequence."""

    def forward(self, tokens: Tensor, shard: xdist.SequenceShard) -> Tensor:
        return super().forward(tokens, shard).mean(dim=1)


def _certify(factory, pools, **options) -> Report:
    settings = {"vocab_size": VOCAB, "length": 37, "ranks": tuple(pools), **options}
    return certify(factory, pools=pools, **settings)


def _texts(report: Report, ranks: int | None = None) -> str:
    found = [f for f in report.findings if ranks is None or f.ranks == ranks]
    return "\n".join(str(finding) for finding in found)


def test_a_correct_module_passes(pool2, pool3) -> None:
    pools = {2: pool2, 3: pool3}
    for options in (
        {"ranks": (1, 2, 3)},
        {"layout": "zigzag", "documents": (0, 5, 5, 20, 37)},
        {"length": 2},  # one rank of three holds nothing
    ):
        report = _certify(Toy, pools, **options)
        assert report.passed, report.table()
    report = _certify(Toy, pools, ranks=(1, 2, 3))
    assert [(row.ranks, row.dtype) for row in report.rows] == [
        (count, dtype) for count in (1, 2, 3) for dtype in ("float64", "float32")
    ]
    assert all(row.leak == 0.0 for row in report.rows if row.ranks == 1)
    assert "passed" in report.table()
    report.raise_if_failed()


@pytest.mark.parametrize(
    ("factory", "options", "expected"),
    [
        (ForgetsHalo, {}, "outputs differ"),
        (AveragesGradients, {}, "gradients were averaged"),
        (CountsEveryToken, {}, "each rank counted every token"),
        (MeanOfMeans, {}, "the loss by rank is"),
        (SeesTheFuture, {}, "reaches an earlier token"),
        (IgnoresDocuments, {"documents": (0, 9, 18, 37)}, "reaches another document"),
        (DetachedMove, {}, "the gradient of taps differs"),
        (DrawsByRank, {}, "start from other weights"),
        (DeadOutput, {}, "changes no output"),
    ],
)
def test_a_broken_module_is_caught(factory, options, expected, pool3) -> None:
    report = _certify(factory, {3: pool3}, **options)
    assert not report.passed
    assert expected in _texts(report, ranks=3), report.table()
    with pytest.raises(NumericsError, match=r"certification failed"):
        report.raise_if_failed()
