"""certify of grids passes a correct module and catches what goes wrong with a split of a grid."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import xdist
from tests.end_to_end.grid_training import TEXT
from xdist.certify import Report, certify_config, certify_grids
from xdist.config import override, parse
from xdist.errors import NumericsError
from xdist.memory.loss import count_valid, sum_of_ranks
from xdist.models.vdt import SHARDINGS

SIZES, CLASSES, DIM = (3, 4, 5), 3, 6


class Toy(nn.Module):
    """Mixes along each dim in turn by a matrix of positions; a dim is switched to be whole."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(1, DIM)
        self.mixes = nn.ParameterList(torch.randn(size, size) for size in SIZES)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor, gshard: xdist.GridShard) -> Tensor:
        here, x = gshard, self.embedding(x)
        for dim, mix in enumerate(self.mixes):
            x, here = self.whole(x, here, dim)
            mixed = torch.tensordot(torch.tanh(x), mix, dims=([dim + 1], [1]))
            x = x + mixed.movedim(-1, dim + 1)
        return self.head(here.switch(x, gshard.dim)[0])

    def whole(self, x: Tensor, gshard: xdist.GridShard, dim: int) -> tuple[Tensor, xdist.GridShard]:
        return gshard.switch(x, (dim + 1) % len(SIZES))

    def loss(self, x: Tensor, labels: Tensor, gshard: xdist.GridShard) -> Tensor:
        logits = self(x, gshard).flatten(0, -2)
        own = nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        own = own / count_valid(labels, gshard, -100)
        return own + (self.total(own.detach(), gshard) - own.detach())

    def total(self, own: Tensor, gshard: xdist.GridShard) -> Tensor:
        return sum_of_ranks(gshard)(own)


class SwitchedWithoutGradient(Toy):
    """The forward is right; what came from other ranks has no backward."""

    def whole(self, x: Tensor, gshard: xdist.GridShard, dim: int) -> tuple[Tensor, xdist.GridShard]:
        found, here = super().whole(x, gshard, dim)
        return (found if gshard.size == 1 else found.detach()), here


class MixesItsOwnPart(Toy):
    """Of a dim that is sharded it mixes the positions of this rank alone."""

    def forward(self, x: Tensor, gshard: xdist.GridShard) -> Tensor:
        x = self.embedding(x)
        for dim, mix in enumerate(self.mixes):
            at = gshard.positions(dim)
            own = mix[at][:, at]
            x = x + torch.tensordot(torch.tanh(x), own, dims=([dim + 1], [1])).movedim(-1, dim + 1)
        return self.head(x)


class LosesItsSum(Toy):
    """Every rank returns the loss of its own positions."""

    def total(self, own: Tensor, gshard: xdist.GridShard) -> Tensor:
        return own


def _certify(factory: type[Toy], pools: dict[int, xdist.testing.RankPool]) -> Report:
    return certify_grids(
        factory, sizes=SIZES, classes=CLASSES, ranks=(1, *pools), dtypes=("float64",), pools=pools
    )


def test_a_correct_module_passes_sharded_first_along_each_dim(pool2, pool3, pool4) -> None:
    """Four ranks along a dim of three: one holds nothing."""
    report = _certify(Toy, {2: pool2, 3: pool3, 4: pool4})
    assert report.passed, report.table()
    assert [(row.ranks, row.dim) for row in report.rows] == [
        (1, 0), *((ranks, dim) for ranks in (2, 3, 4) for dim in range(3))
    ]  # fmt: skip
    assert "2 samples of 3 x 4 x 5 positions" in report.table()
    assert "4, dim 2" in report.table()


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        (SwitchedWithoutGradient, "sharded along dim 0: the gradient of"),
        (MixesItsOwnPart, "sharded along dim 2: outputs differ"),
        (LosesItsSum, "the loss by rank is"),
    ],
)
def test_a_broken_module_is_caught(factory: type[Toy], said: str, pool2) -> None:
    report = _certify(factory, {2: pool2})
    assert not report.passed
    assert said in "\n".join(map(str, report.findings)), report.table()
    with pytest.raises(NumericsError, match="certification failed"):
        report.raise_if_failed()


def _certified(kind: str, pools: dict[int, xdist.testing.RankPool], *settings: str) -> Report:
    text = TEXT["vdt" if kind == "vdt" else "mamba_nd"].replace('"mamba_nd"', f'"{kind}"')
    config = override(parse(text), ["model.head_dim=4", f"certify.ranks={[*pools]}", *settings])
    return certify_config(config, pools=pools)


def test_the_config_of_a_model_is_certified_with_its_bytes(pool2) -> None:
    """Outputs, loss and gradients of one rank, and the bytes that the plan says, along each dim;
    a stream in bfloat16 is left out in float64, and the table says so."""
    report = _certified("mamba_nd", {2: pool2}, 'model.options.stream="bfloat16"')
    assert report.passed, report.table()
    assert "without the narrow residual stream" in report.table()
    assert {(row.dim, row.dtype) for row in report.rows} == {
        (dim, dtype) for dim in range(3) for dtype in ("float64", "float32")
    }
    assert all(row.planned_bytes == row.sent_bytes > 0 for row in report.rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mamba_nd", "axial", "vdt"])
def test_every_model_of_grids_is_certified_on_2_3_and_4_ranks(
    kind: str, pool2, pool3, pool4
) -> None:
    report = _certified(kind, {2: pool2, 3: pool3, 4: pool4})
    assert report.passed, report.table()
    assert len(report.rows) == 3 * 3 * 2
    assert all(row.planned_bytes == row.sent_bytes > 0 for row in report.rows)


@pytest.mark.slow
@pytest.mark.parametrize("grid", SHARDINGS[1:])
def test_every_strategy_of_a_video_is_certified_with_its_bytes(grid: str, pool2, pool3) -> None:
    report = _certified("vdt", {2: pool2, 3: pool3}, f"parallel.grid={grid}")
    assert report.passed, report.table()
    assert len(report.rows) == 2 * 3 * 2
    assert all(row.planned_bytes == row.sent_bytes > 0 for row in report.rows)
