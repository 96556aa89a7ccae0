"""Settings of the DeepSpeed engine: what is refused, before torch or DeepSpeed is imported."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xdist.config import Config, parse
from xdist.config_deepspeed import PASSED, REFUSED, REFUSED_ZERO, SEQUENCE_KEYS, ZERO
from xdist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ON = 'engine.name="deepspeed"'


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse("", overrides=overrides)
    return str(caught.value)


def test_a_misspelt_key_is_named_with_the_known_one() -> None:
    text = refused(ON, "engine.deepspeed.gradient_cliping=1.0")
    assert "unknown key engine.deepspeed.gradient_cliping; did you mean gradient_clipping?" in text
    assert "set optimizer.clip_norm" in text
    text = refused(ON, "engine.deepspeed.zero_optimisation.overlap_comm=true")
    assert "did you mean zero_optimization?" in text
    text = refused(ON, f"engine.deepspeed.{ZERO}.reduce_bucket_sise=4")
    assert f"unknown key engine.deepspeed.{ZERO}.reduce_bucket_sise" in text
    assert "did you mean reduce_bucket_size?" in text
    text = refused(ON, "engine.deepspeed.reduce_bucket_size=4")
    assert f"did you mean {ZERO}.reduce_bucket_size?" in text


def test_all_wrong_keys_are_listed_at_once_with_their_lines() -> None:
    text = """
[engine]
name = "deepspeed"
[engine.deepspeed]
gradient_cliping = 1.0
train_batch_size = 4
[engine.deepspeed.zero_optimization]
stage = 3
"""
    with pytest.raises(ConfigError) as caught:
        parse(text, "run.toml")
    message = str(caught.value)
    assert "3 settings are wrong" in message
    for line, key in ((5, "gradient_cliping"), (6, "train_batch_size"), (8, "stage")):
        assert any(f"run.toml:{line}: " in m and key in m for m in message.splitlines())


@pytest.mark.parametrize("key", SEQUENCE_KEYS)
def test_sequence_keys_of_deepspeed_are_refused_with_the_reason(key: str) -> None:
    text = refused(ON, f"engine.deepspeed.{key}=2")
    assert "at stages 0 to 2 and averages them at stage 3" in text
    assert "set parallel.ring and parallel.ulysses" in text


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("train_batch_size=8", "train.curriculum"),
        ("gradient_accumulation_steps=2", "train.accumulation"),
        ("gradient_clipping=1.0", "optimizer.clip_norm"),
        ("fp16.enabled=true", "train.precision"),
        ("optimizer.type='Adam'", "[optimizer]"),
        ("gradient_allreduce_op='sum'", "sum over all ranks at every stage"),
        ("wandb.enabled=true", "kept quiet"),
        (f"{ZERO}.stage=3", "engine.zero_stage"),
        (f"{ZERO}.offload_optimizer.device='cpu'", "engine.offload_optimizer"),
        (f"{ZERO}.zero_quantized_gradients=true", "float32"),
    ],
)
def test_what_xdist_decides_is_refused_with_its_own_setting(key: str, remedy: str) -> None:
    text = refused(ON, f"engine.deepspeed.{key}")
    assert "is not for DeepSpeed to set" in text
    assert remedy in text


def test_values_and_stages_of_passed_keys_are_checked() -> None:
    inside = f"engine.deepspeed.{ZERO}"
    assert "must be a whole number" in refused(ON, f"{inside}.reduce_bucket_size=true")
    assert "must be true or false" in refused(ON, f"{inside}.overlap_comm=1")
    assert "at least 2 and even" in refused(ON, f"{inside}.allgather_bucket_size=3")
    assert "has no effect at engine.zero_stage = 2" in refused(ON, f"{inside}.sub_group_size=10")
    assert "must be a table" in refused(ON, f"engine.deepspeed.{ZERO}=3")


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["engine.zero_stage=3"], 'has no effect with engine.name = "plain"'),
        (["engine.offload_optimizer=cpu"], 'has no effect with engine.name = "plain"'),
        (["engine.name=fsdp", "engine.deepspeed.steps=1"], 'no effect with engine.name = "fsdp"'),
        ([ON, "engine.zero_stage=0", "engine.offload_optimizer=cpu"], "engine.zero_stage=1"),
        ([ON, "engine.zero_stage=2", "engine.offload_parameters=cpu"], "engine.zero_stage=3"),
        ([ON, "optimizer.name=muon"], "Muon works on whole matrices"),
        ([ON, "model.dtype=float64", "train.precision=float64"], "adds up in float32"),
    ],
)
def test_settings_without_effect_are_refused(overrides: list[str], why: str) -> None:
    assert why in refused(*overrides)


def test_passed_keys_are_accepted_at_their_stages() -> None:
    for key, passed in PASSED.items():
        value = "false" if passed.kind is bool else "1000"
        for stage in passed.stages:
            config = parse(
                "",
                overrides=[
                    ON,
                    f"engine.zero_stage={stage}",
                    f"engine.deepspeed.{ZERO}.{key}={value}",
                ],
            )
            assert key in config.engine.deepspeed[ZERO]


def test_the_command_exits_2_before_torch_is_imported(tmp_path: Path) -> None:
    """`xdist train` with a misspelt DeepSpeed key, where neither torch nor DeepSpeed is there."""
    config = tmp_path / "run.toml"
    config.write_text('[engine]\nname = "deepspeed"\n[engine.deepspeed]\nzero_optimisation = {}\n')
    code = (
        "import sys\n"
        f"sys.path[:0] = {[str(ROOT), str(ROOT / 'kernels'), str(ROOT / 'launchers')]!r}\n"
        "sys.modules['torch'] = sys.modules['deepspeed'] = None\n"
        f"sys.argv = ['xdist', 'train', {str(config)!r}]\n"
        "from xdist_launchers.cli import main\nmain()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "did you mean zero_optimization?" in done.stderr
    assert f"{config}:4" in done.stderr


# --- the lists against the installed DeepSpeed ---------------------------------------------------


class _Asked(dict[str, Any]):
    """A configuration that remembers which keys were looked up."""

    seen: set[str]

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.seen.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> _Asked:
        return self


def test_the_lists_hold_every_key_of_the_installed_deepspeed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A release of DeepSpeed with a key more or less fails here, not in a run."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS, DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    asked = _Asked(train_micro_batch_size_per_gpu=1)
    asked.seen = set()
    DeepSpeedConfig(asked)
    known = {ZERO, *REFUSED}
    unknown = asked.seen - known - {*SEQUENCE_KEYS}
    assert unknown == set(), "DeepSpeed reads keys that xdist does not know"
    assert known - asked.seen == set(), "xdist lists keys that DeepSpeed does not read"

    fields = DeepSpeedZeroConfig.model_fields
    zero = {field.alias or name for name, field in fields.items()} | set(_REMOVED_ZERO_CONFIG_KEYS)
    assert zero == {*PASSED, *REFUSED_ZERO}
    # The sequence keys are read outside the configuration class.
    source = inspect.getsource(deepspeed) + inspect.getsource(DeepSpeedConfig)
    for key in SEQUENCE_KEYS:
        assert key in source or key.upper() in source
    assert not {*PASSED} & {*REFUSED_ZERO}
    assert not {*REFUSED} & {*SEQUENCE_KEYS}


def test_defaults_of_the_engine_section_need_no_deepspeed() -> None:
    assert Config().engine.name == "plain"
