"""The fsdp engine: odd parameters, bytes moved, checkpoints, what cannot be partitioned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.multirank.engine_cases import ENGINES, OPTIMIZERS, Case, train, train_all, whole_tensors
from tests.multirank.fsdp_cases import (
    SGD,
    bytes_of_model,
    bytes_of_odd,
    carried_over,
    freed_in_forward,
    odd_parameters,
    rank_1_dies,
)
from xdist.cost.fsdp import evaluation, micro_step, rows_of_rank, share_elements
from xdist.errors import ConfigError
from xdist.mesh import init_mesh
from xdist.testing import RankFailed, RankPool, run_ranks
from xdist.train.engines.fsdp import FsdpEngine
from xdist.train.engines.fsdp_units import _ReduceScatter


@pytest.mark.parametrize("reshard", [True, False])
def test_odd_parameters_train_as_with_the_plain_engine(pool3: RankPool, reshard: bool) -> None:
    """Rows that 3 does not divide, fewer rows than ranks, none; tied, frozen and unused
    parameters; gradients that are None on some ranks or on all; a dropped step."""
    plain = pool3.run(odd_parameters, True)
    found = pool3.run(odd_parameters, False, reshard)
    a = whole_tensors([pieces for pieces, _ in found])
    b = whole_tensors([pieces for pieces, _ in plain])
    assert a.keys() == b.keys()
    assert {"model/tied", "model/seen", "model/layers.0.scale", "optimizer/momentum/empty"} <= set(
        a
    )
    for name in b:
        assert torch.allclose(a[name].double(), b[name].double(), rtol=1e-5, atol=1e-7), name
    assert not torch.equal(b["model/layers.0.one"], torch.linspace(0, 1, 5))
    for _, norms in found:
        assert norms[:2] == pytest.approx(plain[0][1][:2], rel=1e-5)
        assert norms[2] != norms[2]
        assert norms[:2] + norms[3:] == found[0][1][:2] + found[0][1][3:]


def test_float64_gradients_are_those_of_one_rank(pool4: RankPool) -> None:
    """Blocks stream tiles and recompute; parameters come and go in between."""
    exact = (*OPTIMIZERS["sgd"], "model.dtype=float64", "train.precision=float64")
    reference = train(Case((1, 1, 1), exact, steps=3), alone=True)
    wanted = whole_tensors([reference.pieces])
    cases = [Case((2, 2, 1), exact + ENGINES[name], 3) for name in ("fsdp", "fsdp kept whole")]
    by_rank = pool4.run(train_all, cases)
    for index in range(len(cases)):
        ranks = [results[index] for results in by_rank]
        assert ranks[0].losses == pytest.approx(reference.losses, rel=1e-12, abs=0)
        assert ranks[0].norms == pytest.approx(reference.norms, rel=1e-10, abs=0)
        found = whole_tensors([rank.pieces for rank in ranks])
        # The momentum is the gradients of three steps, clipped alike.
        for name, b in ((n, t) for n, t in wanted.items() if t.numel()):
            assert float((found[name] - b).abs().max()) <= 1e-10 * float(b.abs().max()), name


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_are_the_formula_and_those_of_c10d(
    request: pytest.FixtureRequest, ranks: int, reshard: bool
) -> None:
    pool: RankPool = request.getfixturevalue(f"pool{ranks}")
    for result in pool.run(bytes_of_odd, reshard):
        blocks, rest = result["held"]
        assert result["train"] == [tuple(micro_step(blocks, rest, ranks, reshard=reshard))] * 2
        assert result["evaluate"] == [tuple(evaluation(blocks, rest, ranks))] * 2
        assert result["moves"] == {"fsdp gather", "fsdp reduce-scatter"}
        # The norm: one float64 number, the same move as the plain engine's gradients.
        assert result["clip"][0] == {"reduce"}
        assert result["clip"][1] <= 8 * ranks
        assert result["free"], "an evaluation leaves nothing gathered"


@pytest.mark.parametrize("reshard", [True, False])
def test_a_block_is_freed_when_it_has_run(pool3: RankPool, reshard: bool) -> None:
    """With reshard, before the next block runs; between steps a rank holds its rows alone."""
    by_rank = pool3.run(freed_in_forward, reshard)
    assert [shares for shares, _ in by_rank[0]] == [reshard] * 2
    # 7 + 2 rows of 3, and twice 5 of one, in shares of 3 + 1 rows and 2; rank 0 has the buffers.
    assert [rank[0][1] for rank in by_rank] == [16 + 6, 16, 5]


def test_a_lost_rank_is_named_in_the_middle_of_a_backward_pass() -> None:
    with pytest.raises(RankFailed) as caught:
        run_ranks(rank_1_dies, 3)
    assert caught.value.rank == 1
    told = [what + why for what, why in caught.value.results.values()]
    assert any("rank 1" in text and "fsdp" in text for text in told), told


def test_bytes_of_the_streamed_model(pool4: RankPool) -> None:
    """A block is gathered twice with reshard and once without; the rest of the model once."""
    for name, gathers in (("fsdp", 2 * 2 + 1), ("fsdp kept whole", 2 + 1)):
        case = Case((2, 2, 1), OPTIMIZERS["sgd"] + ENGINES[name])
        for result in pool4.run(bytes_of_model, case):
            blocks, rest = result["held"]
            assert len(blocks) == 2
            wanted = micro_step(blocks, rest, 4, reshard=name == "fsdp").sent_bytes
            assert result["fsdp"] == wanted
            assert result["all"][0] == result["all"][1] > wanted
            assert result["calls"] == {"fsdp gather": gathers, "fsdp reduce-scatter": 3}


def test_the_state_goes_to_plain_and_back_to_the_bit(pool2: RankPool) -> None:
    cases = [Case((1, 2, 1), o + ENGINES["fsdp"]) for o in OPTIMIZERS.values()]
    for case in cases:
        for results in pool2.run(carried_over, case):
            assert results == [True] * 8


def test_rows_cover_every_parameter_once() -> None:
    for rows in range(12):
        for ranks in range(1, 7):
            cuts = [rows_of_rank(rows, ranks, rank) for rank in range(ranks)]
            assert [i for a, b in cuts for i in range(a, b)] == list(range(rows))
            assert max(b - a for a, b in cuts) == share_elements((rows,), ranks)


class Scalar(nn.Module):
    """A parameter without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


class Mixed(nn.Module):
    """Two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Parameter(torch.ones(2))
        self.wide = nn.Parameter(torch.ones(2, dtype=torch.float64))


def _refused(kind: type[nn.Module], name: str) -> None:
    mesh = init_mesh(device="cpu")
    FsdpEngine(kind(), SGD.model_copy(update={"name": name}), mesh)


@pytest.mark.parametrize(
    ("kind", "optimizer", "words"),
    [
        (Scalar, "sgd", "cannot cut the parameter gain into rows"),
        (Mixed, "sgd", "differ in dtype"),
        (Scalar, "muon", "needs whole matrices"),
    ],
)
def test_what_has_no_rows_is_refused(
    pool2: RankPool, kind: type[nn.Module], optimizer: str, words: str
) -> None:
    with pytest.raises(RankFailed, match=words) as caught:
        pool2.run(_refused, kind, optimizer)
    assert caught.value.kind == "ConfigError"


def test_a_missing_gradient_is_named_where_torch_leaves_it_out() -> None:
    """Before 2.13 torch sums only the gradients that are there: sizes would differ by rank."""
    move = _ReduceScatter(elements=12)
    with pytest.raises(ConfigError, match="got no gradient on this rank") as caught:
        move(torch.empty(4), torch.empty(8), None, None)  # type: ignore[arg-type]
    assert "8 of 12 elements" in caught.value.why
