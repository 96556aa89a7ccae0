"""The dictionary that DeepSpeed is given: plain values, and every default of its that matters.

Pure: no import of DeepSpeed or torch. docs/deepspeed.md gives the reason of each line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xdist.config import Engine
from xdist.config_deepspeed import ZERO

# DeepSpeed's own default, elements; it allocates one float32 bucket of this size.
BUCKET_ELEMENTS = 500_000_000


def render(settings: Engine, *, elements: int) -> dict[str, Any]:
    """The configuration of DeepSpeed for a model with `elements` trained parameters.

    The batch size is a formality: xdist cuts batches itself, and the unmanaged accumulation means
    that a step ends where xdist says so. The mean that DeepSpeed takes over the ranks is undone
    by the engine, in one place.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "gradient_clipping": 0.0,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "disable_python_gc": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "log_level": "error",
        ZERO: _zero(settings, elements),
    }


def _zero(settings: Engine, elements: int) -> dict[str, Any]:
    stage = settings.zero_stage
    found: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": max(1, min(BUCKET_ELEMENTS, elements)),
        # DeepSpeed allows it with unmanaged accumulation only where gradients are partitioned.
        "overlap_comm": stage >= 2,
        # It would replace torch.nn.functional.linear.
        "memory_efficient_linear": False,
    }
    if stage in (1, 2) and settings.offload_optimizer == "none":
        # The engine takes the norm itself; with offloading DeepSpeed insists on its own.
        found["compute_grad_norm"] = False
    if settings.offload_optimizer == "cpu":
        found["offload_optimizer"] = {"device": "cpu"}
    if settings.offload_parameters == "cpu":
        found["offload_param"] = {"device": "cpu"}
    passed: Mapping[str, Any] = settings.deepspeed.get(ZERO, {})
    return found | dict(passed)
