"""The DeepSpeed engine where DeepSpeed is absent or of another release, and what it is told."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from xdist.config import parse
from xdist.config_deepspeed import ZERO
from xdist.errors import LaunchError
from xdist.mesh import Mesh
from xdist.train.engines.build import build_engine
from xdist.train.engines.deepspeed_config import BUCKET_ELEMENTS, render


def _build() -> None:
    config = parse("", overrides=["engine.name=deepspeed"])
    build_engine(config, nn.Linear(2, 2), Mesh.one_rank(torch.device("cpu")))


def test_absent_it_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(LaunchError, match=r"xdist-train\[deepspeed\]") as caught:
        _build()
    assert caught.value.exit_code == 3


def test_another_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other, accelerator = types.ModuleType("deepspeed"), types.ModuleType("deepspeed.accelerator")
    other.__version__ = "0.18.1"  # type: ignore[attr-defined]
    accelerator.get_accelerator = None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deepspeed", other)
    monkeypatch.setitem(sys.modules, "deepspeed.accelerator", accelerator)
    with pytest.raises(LaunchError, match=r"DeepSpeed 0\.18\.1 is not the release"):
        _build()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_deepspeed_is_told(stage: int) -> None:
    """No clipping, no mean but the one that the engine undoes, buckets of the model's size."""
    settings = ["engine.name=deepspeed", f"engine.zero_stage={stage}"]
    told = render(parse("", overrides=settings).engine, elements=1000)
    assert told["gradient_clipping"] == 0.0
    assert told["gradient_allreduce_op"] == "mean"
    assert told["managed_gradient_accumulation"] is False
    assert told[ZERO]["stage"] == stage
    assert told[ZERO]["reduce_bucket_size"] == 1000
    assert "offload_optimizer" not in told[ZERO]


def test_offloading_and_passed_keys_are_told() -> None:
    settings = ["engine.name=deepspeed", "engine.zero_stage=3", "engine.offload_optimizer=cpu"]
    settings += ["engine.offload_parameters=cpu", f"engine.deepspeed.{ZERO}.sub_group_size=7"]
    told = render(parse("", overrides=settings).engine, elements=10**12)[ZERO]
    assert told["offload_optimizer"] == told["offload_param"] == {"device": "cpu"}
    assert told["sub_group_size"] == 7
    assert told["reduce_bucket_size"] == BUCKET_ELEMENTS
