"""certify passes a correct module and catches every way in which a split can go wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import xdist
from xdist.certify import Report, certify, certify_config
from xdist.config import load
from xdist.errors import ConfigError, LaunchError, NumericsError
from xdist.rank import read_rank

ROOT = Path(__file__).resolve().parents[2]
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


def test_a_module_without_a_loss_gets_one(pool2) -> None:
    report = _certify(WithoutLoss, {2: pool2})
    assert report.passed, report.table()
    # That loss moves bytes too, and every parameter has a gradient.
    assert all(row.sent_bytes > 0 for row in report.rows)


def test_an_output_of_the_wrong_shape_is_named(pool2) -> None:
    with pytest.raises(ConfigError, match=r"tokens are \(2, 37\), the output is \(2, 13\)"):
        _certify(WrongShape, {2: pool2})


def wrong_plan(ranks: int, precision: str) -> list[int]:
    return [1] * ranks


def test_bytes_that_differ_from_the_plan_are_caught(pool2) -> None:
    report = _certify(Toy, {2: pool2}, planned=wrong_plan)
    assert not report.passed
    assert "the plan says [1, 1]; by move" in _texts(report)
    assert {f.what.split(" by ")[0] for f in report.findings} == {"sent bytes"}


def test_what_cannot_be_certified_is_refused(monkeypatch) -> None:
    with pytest.raises(ConfigError, match="knows no precision"):
        certify(Toy, vocab_size=VOCAB, length=8, dtypes=("float8",))
    with pytest.raises(ConfigError, match="at least one rank"):
        certify(Toy, vocab_size=VOCAB, length=0)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(LaunchError, match="inside a started rank"):
        certify(Toy, vocab_size=VOCAB, length=8)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.precision='bfloat16'", "model.ngram_orders=[2, 3]", "certify.length=131"],
        ["parallel.layout='zigzag'", "data.documents='separate'", "certify.length=97"],
    ],
)
def test_the_model_of_a_config_passes_with_its_planned_bytes(settings, pool2, pool3) -> None:
    config = load(ROOT / "configs" / "tiny.toml", [*settings, "certify.ranks=[1, 2, 3]"])
    report = certify_config(config, pools={2: pool2, 3: pool3})
    assert report.passed, report.table()
    assert {row.ranks for row in report.rows} == {1, 2, 3}
    assert all(row.sent_bytes == row.planned_bytes for row in report.rows)
    assert all(row.sent_bytes > 0 for row in report.rows if row.ranks > 1)


def test_the_command_prints_the_table_and_passes() -> None:
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "launchers"))
    arguments = ["configs/tiny.toml", "certify.length=64", "certify.ranks=[1, 2]"]
    result = subprocess.run(
        [sys.executable, "-m", "xdist_launchers.cli", "certify", *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "largest relative error" in result.stdout
    assert result.stdout.rstrip().endswith("passed")
