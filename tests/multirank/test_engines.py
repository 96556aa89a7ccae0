"""Every engine trains as the plain one on one rank does: losses, norms, parameters, state.

The whole matrix of engines, optimizers and degrees is slow; a subset that touches each optimizer
and each kind of degree runs in `make test`. DeepSpeed's rows are in test_engine_deepspeed.py.
"""

from __future__ import annotations

from functools import cache

import pytest
from torch import Tensor

from tests.multirank.engine_cases import (
    ENGINES,
    OPTIMIZERS,
    Case,
    Trained,
    train,
    train_all,
    whole_tensors,
)
from xdist.testing import RankPool

# (data, ring, ulysses): the degrees (data, sequence) of (1,2), (2,1), (2,2) and (1,4).
TWO = [(1, 2, 1), (1, 1, 2), (2, 1, 1)]
FOUR = [(2, 2, 1), (1, 2, 2), (1, 4, 1), (2, 1, 2)]


@cache
def _reference(optimizer: str, *more: str) -> tuple[Trained, dict[str, Tensor]]:
    found = train(Case((1, 1, 1), OPTIMIZERS[optimizer] + more), alone=True)
    wanted = whole_tensors([found.pieces])
    # Where a gradient is zero but for rounding, AdamW would blow up the rounding.
    kept = {"sgd": "momentum", "adamw": "exp_avg"}[optimizer]
    for name, moment in wanted.items():
        if name.startswith(f"optimizer/{kept}/") and moment.numel():
            assert float(moment.abs().max()) > 1e-5, f"{name}: a null gradient"
    return found, wanted


def largest_error(found: dict[str, Tensor], wanted: dict[str, Tensor], prefix: str) -> float:
    """Over the tensors under `prefix`: max|a - b| / max|b| of the worst."""
    assert found.keys() == wanted.keys()
    errors = [0.0]
    for name, b in wanted.items():
        assert (found[name].shape, found[name].dtype) == (b.shape, b.dtype), name
        if name.startswith(prefix) and b.numel():
            errors.append(float((found[name] - b).abs().max() / b.abs().max().clamp_min(1e-12)))
    return max(errors)


def _compare(pool: RankPool, cases: dict[str, Case], optimizer: str) -> None:
    reference, wanted = _reference(optimizer)
    assert reference.losses[-1] < 0.95 * reference.losses[0], "nothing was learned"
    by_rank = pool.run(train_all, list(cases.values()))
    for index, name in enumerate(cases):
        ranks = [results[index] for results in by_rank]
        for rank in ranks:
            assert rank.losses == pytest.approx(reference.losses, rel=0, abs=1e-5), name
            # The same on all ranks to the last bit, or one would clip what others do not.
            assert rank.norms == ranks[0].norms, name
        assert ranks[0].norms == pytest.approx(reference.norms, rel=1e-4), name
        found = whole_tensors([rank.pieces for rank in ranks])
        assert largest_error(found, wanted, "model/") <= 1e-4, name
        assert found["optimizer/updates/head"] == 20 if optimizer == "adamw" else True


def _cases(engines: list[str], degrees: list[tuple[int, int, int]], optimizer: str) -> dict:
    return {
        f"{engine} {sizes} {optimizer}": Case(sizes, OPTIMIZERS[optimizer] + ENGINES[engine])
        for engine in engines
        for sizes in degrees
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_20_steps_on_two_ranks(pool2: RankPool, optimizer: str) -> None:
    """Sequence ranks for SGD, data ranks for AdamW."""
    engine, degrees = {"sgd": ("fsdp", TWO[0]), "adamw": ("fsdp kept whole", TWO[2])}[optimizer]
    _compare(pool2, _cases([engine], [degrees], optimizer), optimizer)


def test_20_steps_on_data_and_sequence_ranks(pool4: RankPool) -> None:
    """Parameters are partitioned over data x sequence ranks together."""
    _compare(pool4, _cases(["fsdp"], [FOUR[0]], "adamw"), "adamw")


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_at_every_degree(
    pool2: RankPool, pool4: RankPool, engine: str, optimizer: str
) -> None:
    """20 steps, (data, sequence) of (1,2), (2,1), (2,2) and (1,4), float32."""
    _compare(pool2, _cases([engine], TWO, optimizer), optimizer)
    _compare(pool4, _cases([engine], FOUR, optimizer), optimizer)
