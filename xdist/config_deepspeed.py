"""Settings of the DeepSpeed engine: what [engine] allows, and the keys of `engine.deepspeed`.

DeepSpeed takes any misspelt key at the top of its configuration without a word, and several keys
that change nothing or change the gradient's scale. So every key it knows is listed here, with what
becomes of it: passed on, or refused with the setting of xdist that does the same. A test compares
the lists with the installed DeepSpeed. Nothing here imports it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from xdist.config_checks import Problem

if TYPE_CHECKING:
    from xdist.config import Config
    from xdist.config_text import Path

HERE: Path = ("engine", "deepspeed")
ZERO = "zero_optimization"


@dataclass(frozen=True)
class Passed:
    """A key that is handed on: the stages where it has an effect, and what it takes."""

    stages: tuple[int, ...]
    kind: type = bool
    least: int = 0
    even: bool = False


# Every one of them is set in a run of tests/multirank/test_engine_deepspeed.py.
PASSED = {
    "allgather_bucket_size": Passed((1, 2), int, 2, even=True),
    "contiguous_gradients": Passed((1, 2, 3)),
    "overlap_comm": Passed((2, 3)),
    "parameter_alignment": Passed((1, 2)),
    "reduce_bucket_size": Passed((1, 2, 3), int, 1),
    "reduce_scatter": Passed((1, 2, 3)),
    "round_robin_gradients": Passed((1, 2)),
    "stage3_max_live_parameters": Passed((3,), int),
    "stage3_max_reuse_distance": Passed((3,), int),
    "stage3_model_persistence_threshold": Passed((3,), int),
    "stage3_param_persistence_threshold": Passed((3,), int),
    "stage3_prefetch_bucket_size": Passed((3,), int),
    "sub_group_size": Passed((3,), int, 1),
    "use_multi_rank_bucket_allreduce": Passed((1, 2)),
}

_SCALE = (
    "the gradient is the sum over all ranks at every stage: there is nothing to set",
    "gradient_allreduce_op gradient_predivide_factor prescale_gradients",
)
_PRECISION = (
    "set train.precision; parameters and sums stay in float32",
    "amp bf16 bfloat16 communication_data_type data_types fp16 torch_autocast",
)
_BATCH = (
    "set train.curriculum and train.accumulation",
    "gradient_accumulation_steps managed_gradient_accumulation train_batch_size "
    "train_micro_batch_size_per_gpu",
)
_CLIPPING = ("set optimizer.clip_norm", "gradient_clipping")
_OPTIMIZER = (
    "set [optimizer]",
    "optimizer scheduler zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
)
_OUTPUT = (
    "a run records itself (metrics.jsonl, log.tensorboard); DeepSpeed is kept quiet",
    "comet comms_logger csv_monitor dump_state flops_profiler log_level memory_breakdown "
    "steps_per_print tensorboard timers wall_clock_breakdown wandb",
)
_CHECKPOINT = ("set [checkpoint]", "checkpoint datastates_ckpt")
_MEMORY = ("models of xdist recompute by train.tile_tokens", "activation_checkpointing")
_UNUSED = (
    "xdist does not use this part of DeepSpeed: leave it out",
    "aio autotuning compile compression_training curriculum_learning data_efficiency "
    "dataloader_drop_last disable_allgather disable_python_gc eigenvalue elasticity "
    "expert_parallel graph_harvesting hybrid_engine nebula pipeline progressive_layer_drop "
    "quantize_training sparse_attention sparse_gradients tensor_parallel "
    "use_data_before_expert_parallelism vocabulary_size weight_quantization",
)
# Refused at the top, each with what to do instead.
REFUSED = {
    key: remedy
    for remedy, keys in (
        _SCALE, _PRECISION, _BATCH, _CLIPPING, _OPTIMIZER, _OUTPUT, _CHECKPOINT, _MEMORY, _UNUSED,
    )
    for key in keys.split()
}  # fmt: skip

SEQUENCE_KEYS = (
    "data_parallel_size",
    "seq_parallel_communication_data_type",
    "sequence_parallel_size",
)
_SEQUENCE_WHY = (
    "DeepSpeed's own sequence parallelism adds gradients up over the sequence ranks at stages 0 to "
    "2 and averages them at stage 3; sequence_parallel_size alone is ignored but divides the batch "
    "size; with data_parallel_size stages 0 to 2 let the ranks drift apart"
)

_STAGE = ("set engine.zero_stage", "stage")
_OFFLOAD = (
    'set engine.offload_optimizer="cpu" or engine.offload_parameters="cpu"',
    "cpu_offload cpu_offload_param cpu_offload_use_pin_memory offload_optimizer offload_param",
)
_LOSSY = (
    "gradients and parameters travel in float32: leave it out",
    "zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights",
)
_ADAPTER = (
    "the engine of xdist decides it: leave it out",
    "allgather_partitions compute_grad_norm enable_sanity_checks ignore_unused_parameters "
    "leaf_module log_trace_cache_warnings memory_efficient_linear override_module_apply",
)
_SAVING = (
    "set [checkpoint]",
    "elastic_checkpoint load_from_fp32_weights pipeline_loading_checkpoint "
    "stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save",
)
_ABSENT = (
    "xdist does not use this part of DeepSpeed: leave it out",
    "legacy_stage1 mics_hierarchical_params_gather mics_shard_size "
    "save_muon_momentum_buffer_in_memory stage3_allgather_sequential "
    "stage3_module_granularity_threshold stage3_use_all_reduce_for_fetch_params zenflow "
    "zero_hpz_partition_size zeropp_loco_param",
)
# Refused inside zero_optimization.
REFUSED_ZERO = {
    key: remedy
    for remedy, keys in (_STAGE, _OFFLOAD, _LOSSY, _ADAPTER, _SAVING, _ABSENT)
    for key in keys.split()
}


def engine_problems(config: Config) -> list[Problem]:
    """Settings of [engine] that contradict each other, have no effect or must not be given."""
    if config.engine.name != "deepspeed":
        return list(_idle(config))
    return [*_unfit(config), *_offload(config), *_keys(config)]


def _idle(config: Config) -> Iterator[Problem]:
    """Settings of DeepSpeed that another engine would not read."""
    engine = config.engine
    default = type(engine)()
    for name in ("zero_stage", "offload_optimizer", "offload_parameters", "deepspeed"):
        if getattr(engine, name) != getattr(default, name):
            yield Problem(
                (("engine", name), ("engine", "name")),
                f'engine.{name} has no effect with engine.name = "{engine.name}"',
                "only the deepspeed engine reads it",
                f"set engine.name=deepspeed, or leave engine.{name} out",
            )


def _unfit(config: Config) -> Iterator[Problem]:
    """What the other sections ask for and DeepSpeed cannot do."""
    if config.optimizer.name == "muon":
        yield Problem(
            (("optimizer", "name"), ("engine", "name")),
            'optimizer.name = "muon" cannot be honoured by engine.name = "deepspeed"',
            "Muon works on whole matrices beside AdamW; DeepSpeed takes one optimizer and, from "
            "stage 1 on, cuts parameters into flat parts",
            "set optimizer.name=adamw, or engine.name=plain",
        )
    if config.model.dtype == "float64":
        yield Problem(
            (("model", "dtype"), ("engine", "name")),
            'model.dtype = "float64" cannot be honoured by engine.name = "deepspeed"',
            "DeepSpeed updates and adds up in float32",
            "set model.dtype=float32 with train.precision=float32, or engine.name=plain",
        )


def _offload(config: Config) -> Iterator[Problem]:
    engine = config.engine
    for name, least in (("offload_optimizer", 1), ("offload_parameters", 3)):
        if getattr(engine, name) != "none" and engine.zero_stage < least:
            yield Problem(
                (("engine", name), ("engine", "zero_stage")),
                f"engine.{name} has no effect at engine.zero_stage = {engine.zero_stage}",
                f"DeepSpeed moves them to the host from stage {least} on",
                f"set engine.zero_stage={least}, or engine.{name}=none",
            )


def _keys(config: Config) -> Iterator[Problem]:
    table: dict[str, Any] = config.engine.deepspeed
    for key, value in table.items():
        if key in SEQUENCE_KEYS:
            do = "set parallel.ring and parallel.ulysses"
            yield _refused((key,), _SEQUENCE_WHY, do)
        elif key in REFUSED:
            yield _refused((key,), "xdist decides it for every engine alike", REFUSED[key])
        elif key != ZERO:
            inside = {f"{ZERO}.{name}": name for name in (*PASSED, *REFUSED_ZERO)}
            moved = [name for name, inner in inside.items() if inner == key]
            yield _unknown((key,), [ZERO, *REFUSED, *SEQUENCE_KEYS], moved)
        elif not isinstance(value, dict):
            yield _wrong((key,), "must be a table", "write engine.deepspeed.zero_optimization.KEY")
        else:
            for inner, setting in value.items():
                yield from _zero_key(inner, setting, config.engine.zero_stage)


def _zero_key(key: str, value: Any, stage: int) -> Iterator[Problem]:
    path = (ZERO, key)
    passed, amount = PASSED.get(key), value
    if key in REFUSED_ZERO:
        yield _refused(path, "xdist decides it for every engine alike", REFUSED_ZERO[key])
    elif passed is None:
        yield _unknown(path, [*PASSED, *REFUSED_ZERO])
    elif stage not in passed.stages:
        stages = ", ".join(str(s) for s in passed.stages)
        yield _wrong(
            path,
            f"has no effect at engine.zero_stage = {stage}",
            f"DeepSpeed reads it at stage {stages}: leave it out",
        )
    elif not isinstance(value, passed.kind) or isinstance(value, bool) != (passed.kind is bool):
        kind = "true or false" if passed.kind is bool else "a whole number"
        yield _wrong(path, f"must be {kind}, got {value!r}", "correct it")
    elif amount < passed.least or (passed.even and amount % 2):
        wanted = f"at least {passed.least}" + (" and even" if passed.even else "")
        yield _wrong(path, f"= {value} must be {wanted}", "correct it")


def _where(path: tuple[str, ...]) -> tuple[Path, ...]:
    """The key in the file, else the tables that hold it."""
    whole: Path = (*HERE, *path)
    return tuple(whole[:length] for length in range(len(whole), 1, -1))


def _refused(path: tuple[str, ...], why: str, do: str) -> Problem:
    name = ".".join(path)
    return Problem(_where(path), f"engine.deepspeed.{name} is not for DeepSpeed to set", why, do)


def _unknown(path: tuple[str, ...], known: list[str], moved: list[str] | None = None) -> Problem:
    near = moved or get_close_matches(path[-1], known, 1)
    name = ".".join(("engine", "deepspeed", *path))
    remedy = (REFUSED | REFUSED_ZERO).get(near[0]) if near else None
    return Problem(
        _where(path),
        f"unknown key {name}" + (f"; did you mean {near[0]}?" if near else ""),
        "DeepSpeed would take it without a word and ignore it",
        remedy or "docs/deepspeed.md lists the keys that are passed on",
    )


def _wrong(path: tuple[str, ...], what: str, do: str) -> Problem:
    name = ".".join(path)
    return Problem(_where(path), f"engine.deepspeed.{name} {what}", "", do)
