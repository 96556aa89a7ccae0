"""DeepSpeed's stages train as the plain engine on one rank does, and leave nothing behind."""

from __future__ import annotations

import math
from functools import cache

import pytest
from torch import Tensor

from tests.multirank import deepspeed_cases as cases
from tests.multirank.deepspeed_cases import ENGINES, settings
from tests.multirank.engine_cases import OPTIMIZERS, Case, Trained, whole_tensors
from tests.multirank.test_engines import _compare, largest_error
from xdist.config_deepspeed import PASSED
from xdist.cost.zero import micro_step, optimizer_step
from xdist.plan.step import library_moves
from xdist.plan.zero import groups_of
from xdist.testing import RankFailed, RankPool, run_ranks

STAGES = [name for name in ENGINES if "host" not in name]
HOST = [name for name in ENGINES if "host" in name]
SGD, ADAMW = OPTIMIZERS["sgd"], OPTIMIZERS["adamw"]


def _cases(engines: list[str], sizes: tuple[int, int, int], optimizer: str) -> dict[str, Case]:
    return {
        f"{engine} {sizes} {optimizer}": Case(sizes, OPTIMIZERS[optimizer] + ENGINES[engine])
        for engine in engines
    }


@pytest.mark.timeout(600)
def test_20_steps_of_every_stage_on_two_sequence_ranks(pool2: RankPool) -> None:
    _compare(pool2, _cases(STAGES, (1, 2, 1), "sgd"), "sgd")


def test_20_steps_with_offloading_on_two_data_ranks(pool2: RankPool) -> None:
    _compare(pool2, _cases(HOST[-1:], (2, 1, 1), "adamw"), "adamw")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_stage_at_every_degree(pool2: RankPool, pool4: RankPool, optimizer: str) -> None:
    """20 steps, (data, sequence) of (1,2), (2,1), (2,2) and (1,4), float32."""
    for sizes in ((1, 1, 2), (2, 1, 1)):
        _compare(pool2, _cases(STAGES, sizes, optimizer), optimizer)
    for sizes in ((2, 2, 1), (1, 2, 2)):
        _compare(pool4, _cases(STAGES, sizes, optimizer), optimizer)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_offloading_on_data_and_sequence_ranks(pool4: RankPool) -> None:
    _compare(pool4, _cases(HOST, (2, 1, 2), "sgd"), "sgd")


def test_the_gradient_is_the_sum_over_ranks_at_every_stage(pool2: RankPool) -> None:
    """DeepSpeed divides by the number of ranks at each stage; one factor makes up for it."""
    runs = [Case((1, 2, 1), SGD + ENGINES[name]) for name in ENGINES]
    reference = cases.Setting(Case((1, 1, 1), SGD), alone=True)
    reference.step(0)
    wanted = reference.engine.finish()
    for norms in pool2.run(cases.raw_norms, runs):
        for name, (raw, given) in zip(ENGINES, norms, strict=True):
            assert raw * 2 == pytest.approx(wanted, rel=1e-5), name
            assert given == pytest.approx(wanted, rel=1e-5), name


@pytest.mark.timeout(600)
def test_a_dropped_step_leaves_nothing_behind(pool2: RankPool) -> None:
    """Bit for bit, with evaluations in between."""
    runs = [Case((1, 2, 1), ADAMW + ENGINES[name]) for name in ENGINES]
    for rank in pool2.run(cases.with_and_without_a_dropped_step, runs):
        for name, (calm, disturbed) in zip(ENGINES, rank, strict=True):
            assert calm.keys() == disturbed.keys()
            for key, piece in calm.items():
                assert piece.values.equal(disturbed[key].values), f"{name}: {key}"


def test_a_parameter_that_a_step_does_not_use_is_not_updated_by_old_gradients(
    pool2: RankPool,
) -> None:
    """DeepSpeed keeps the gradient of the step before in its buffers (stage 3, offloading)."""
    one_rank = ("optimizer.learning_rate=0.05", "optimizer.clip_norm=3.0", *SGD[:2])
    names = list(ENGINES)
    runs = [Case((2, 1, 1), (*one_rank, *ENGINES[name])) for name in names]
    plain: list[list[Trained]] = pool2.run(cases.toy_steps, [Case((2, 1, 1), one_rank)])
    wanted = whole_tensors([plain[0][0].pieces])
    by_rank = pool2.run(cases.toy_steps, runs)
    for index, name in enumerate(names):
        ranks = [results[index] for results in by_rank]
        assert ranks[0].norms == pytest.approx(plain[0][0].norms, rel=1e-5), name
        found = whole_tensors([rank.pieces for rank in ranks])
        assert largest_error(found, wanted, "model/") <= 1e-5, name
        assert largest_error(found, wanted, "optimizer/") <= 1e-5, name


def test_a_gradient_that_is_not_finite_is_told_by_the_rank_that_made_it(pool2: RankPool) -> None:
    runs = [Case((2, 1, 1), ADAMW + ENGINES[name]) for name in ENGINES]
    first, last = pool2.run(cases.bad_numbers, runs)
    for name, mine, bad in zip(ENGINES, first, last, strict=True):
        assert not math.isfinite(mine[0]), name
        assert not math.isfinite(bad[0]), name
        assert (mine[1], bad[1]) == ("", "inner.weight"), name
        assert (mine[2], bad[2]) == ("", ""), name


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["stage 2", pytest.param("stage 3", marks=pytest.mark.slow)])
def test_a_lost_rank_is_named_inside_deepspeeds_exchanges(name: str) -> None:
    case = Case((2, 1, 1), ADAMW + ENGINES[name])
    with pytest.raises(RankFailed) as caught:
        run_ranks(cases.lose_a_peer, 2, case)
    assert caught.value.results == {0: (1, "deepspeed")}


def test_deepspeed_makes_no_process_group(pool2: RankPool) -> None:
    """A group of its own would have torch's time limit instead of the run's."""
    runs = [Case((1, 2, 1), ADAMW + ENGINES[name]) for name in ENGINES]
    assert pool2.run(cases.groups_made, runs) == [[0] * len(runs)] * 2


# --- checkpoints ---------------------------------------------------------------------------------


@cache
def _plain() -> tuple[dict[str, Tensor], list[float]]:
    pieces, losses = cases.first_steps(Case((1, 1, 1), ADAMW), alone=True)
    return whole_tensors([pieces]), losses


def _check_resumed(found: list[Trained], whole: dict[str, Tensor], name: str) -> None:
    again = whole_tensors([rank.pieces for rank in found])
    assert again.keys() == whole.keys()
    for key, values in whole.items():
        assert again[key].equal(values), f"{name}: {key} is not what was loaded"
    for rank in found:
        assert rank.losses == pytest.approx(_plain()[1], rel=0, abs=1e-5), name


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_stage_resumes_what_plain_wrote_on_one_rank(
    request: pytest.FixtureRequest, ranks: int
) -> None:
    """Once afresh, once over another state; on three ranks all parts are uneven."""
    pool = request.getfixturevalue(f"pool{ranks}")
    whole, _ = _plain()
    jobs = [
        (Case((1, ranks, 1), ADAMW + ENGINES[name]), whole, "host" in name or name == "stage 3")
        for name in ENGINES
    ]
    by_rank = pool.run(cases.resumed, jobs)
    for index, name in enumerate(ENGINES):
        _check_resumed([results[index] for results in by_rank], whole, name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_plain_and_other_stages_resume_what_every_stage_wrote(
    pool2: RankPool, pool3: RankPool
) -> None:
    """Written on two ranks; read by plain on one, and by another stage on three."""
    saved = {}
    for name in ENGINES:
        results = pool2.run(cases.first_steps, Case((2, 1, 1), ADAMW + ENGINES[name]))
        saved[name] = whole_tensors([pieces for pieces, _ in results])
        assert largest_error(saved[name], _plain()[0], "") <= 1e-4, name
        assert results[0][1] == pytest.approx(_plain()[1], rel=0, abs=1e-5), name
    plain = [(Case((1, 1, 1), ADAMW), whole, False) for whole in saved.values()]
    for name, found in zip(ENGINES, cases.resumed(plain, alone=True), strict=True):
        _check_resumed([found], saved[name], f"{name} to plain")
    # Each is read by the stage after it in the list.
    after = [*list(ENGINES)[1:], next(iter(ENGINES))]
    jobs = [
        (Case((1, 3, 1), ADAMW + ENGINES[other]), saved[name], False)
        for name, other in zip(ENGINES, after, strict=True)
    ]
    by_rank = pool3.run(cases.resumed, jobs)
    for index, name in enumerate(ENGINES):
        _check_resumed([results[index] for results in by_rank], saved[name], f"{name} to the next")


def test_on_one_rank_it_is_the_plain_engine() -> None:
    # In a process of its own: DeepSpeed wants a process group there too.
    for losses in run_ranks(cases.losses_on_one_rank, 1)[0]:
        assert losses[3:] == pytest.approx(_plain()[1], rel=0, abs=1e-5)


# --- what it moves -------------------------------------------------------------------------------


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_traffic_is_that_of_the_formulas(request: pytest.FixtureRequest, ranks: int) -> None:
    """Bytes of c10d operations, less those in the ledger, of each micro-step and step."""
    names = [*ENGINES, "stage 3, small ones kept"]
    kept = {"stage 3, small ones kept": settings(3, f"{cases.ZERO}.{PERSIST}=300")}
    runs = [Case((1, ranks, 1), ADAMW + (ENGINES | kept)[name]) for name in names]
    groups = groups_of(runs[0].config)
    pool = request.getfixturevalue(f"pool{ranks}")
    for moved in pool.run(cases.moved_bytes, runs):
        for index, name in enumerate(names):
            stage, persistent = int(name[6]), 300 if "kept" in name else 0
            micro = tuple(micro_step(stage, groups, ranks, persistent=persistent))
            step = tuple(
                optimizer_step(stage, groups, ranks, persistent=persistent, offload="host" in name)
            )
            # Stage 3 learns the order of modules in the first two passes.
            assert moved[index]["micro"][2:] == [micro] * 4, name
            assert moved[index]["step"] == [step] * 3, name
            planned = library_moves(runs[index].config, 0)
            assert planned == tuple(2 * m + s for m, s in zip(micro, step, strict=True)), name


PERSIST = "stage3_param_persistence_threshold"


# --- keys that are passed on ---------------------------------------------------------------------

# A value of each that differs from DeepSpeed's default and changes what small models do.
VALUES = {
    "allgather_bucket_size": "600",
    "contiguous_gradients": "false",
    "overlap_comm": "false",
    "parameter_alignment": "true",
    "reduce_bucket_size": "700",
    "reduce_scatter": "false",
    "round_robin_gradients": "true",
    "stage3_max_live_parameters": "0",
    "stage3_max_reuse_distance": "0",
    "stage3_model_persistence_threshold": "500",
    "stage3_param_persistence_threshold": "300",
    "stage3_prefetch_bucket_size": "0",
    "sub_group_size": "400",
    "use_multi_rank_bucket_allreduce": "false",
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_keys_that_are_passed_on_change_no_result(pool3: RankPool) -> None:
    """Each key at each stage that reads it: five steps, and what is saved, as without it."""
    assert VALUES.keys() == PASSED.keys()
    runs = {
        f"{key} at stage {stage}": Case(
            (1, 3, 1), ADAMW + settings(stage, f"{cases.ZERO}.{key}={VALUES[key]}"), steps=6
        )
        for key, passed in PASSED.items()
        for stage in passed.stages
    }
    for name, case in runs.items():
        results = pool3.run(cases.first_steps, case)
        saved = whole_tensors([pieces for pieces, _ in results])
        assert largest_error(saved, _plain()[0], "") <= 1e-4, name
        assert results[0][1] == pytest.approx(_plain()[1], rel=0, abs=1e-5), name
