"""`xdist train` with decoders of HuggingFace Transformers: the losses of two ranks are one's."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from tests.end_to_end.training import held_out, lines_of, losses, make_store
from xdist.certify import certify_config
from xdist.config import Config, load, override, parse
from xdist.config_text import toml_value
from xdist.dry_run import dry_run
from xdist.errors import ConfigError, XdistError
from xdist.testing import RankPool
from xdist.train import run

ROOT = pathlib.Path(__file__).resolve().parents[2]
LLAMA = ROOT / "configs" / "transformers" / "llama.toml"
SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
}  # fmt: skip
# Models by their configuration class, with what each needs beside the sizes.
MODELS: dict[str, dict[str, Any]] = {
    "LlamaConfig": {},
    "MistralConfig": {"sliding_window": 20},
    "Qwen2Config": {"head_dim": None},
    "Qwen3Config": {"tie_word_embeddings": True},
    "Gemma2Config": {"sliding_window": 12, "final_logit_softcapping": "none"},
    "Gemma3TextConfig": {
        "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"],
    },
    "GptOssConfig": {
        "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}  # fmt: skip
SETTINGS = (
    "train.curriculum=[{length=61,batch=1,steps=3},{length=96,batch=1,steps=3}]",
    "train.accumulation=2", "optimizer.warmup_steps=2",
    "evaluate.tokens=250", "evaluate.length=100",
    "log.every_steps=1000", "data.documents=separate", "launch.ranks=auto",
)  # fmt: skip


def model_of(name: str) -> str:
    """The section [model] of a tiny model of this configuration class."""
    options = {k: v for k, v in (SIZES | MODELS[name]).items() if v is not None}
    return (
        f'[model]\nkind = "transformers"\nconfig_class = "{name}"\n'
        f"options = {toml_value(options)}\n"
    )


def config_of(folder: str, name: str, run_name: str, *settings: str) -> Config:
    chosen = [f"run.directory={folder}/runs", f"data.store={folder}/store.zarr"]
    keyed = {
        item.partition("=")[0]: item
        for item in (*chosen, f"run.name={run_name}", *SETTINGS, *settings)
    }
    return override(parse(model_of(name)), list(keyed.values()))


def train_all(folder: str, cases: list[tuple[str, str, tuple[str, ...]]]) -> list[int]:
    """Train each of (configuration class, name of the run, settings); their exit codes."""
    return [run(config_of(folder, name, named, *settings)) for name, named, settings in cases]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    made = tmp_path_factory.mktemp("transformers")
    make_store(made)
    return made


ENGINES = {
    "plain": ("parallel.ring=2", "parallel.layout=zigzag"),
    "fsdp": ("parallel.ulysses=2", "engine.name=fsdp"),
    "data": (
        "parallel.data=2",
        "engine.name=fsdp",
        "model.recompute=false",
        "train.accumulation=1",
        "train.curriculum=[{length=61,batch=2,steps=3},{length=96,batch=2,steps=3}]",
    ),
}


SHORT = (
    (("evaluate.tokens=201",), "set evaluate.tokens=200, another length"),
    (("train.curriculum=[{length=60,batch=1,steps=1},{length=1,batch=1,steps=1}]",), "set another"),
)


def _refused(folder: str) -> list[tuple[type, str, str]]:
    found = []
    for number, (settings, _) in enumerate(SHORT):
        whole = ("parallel.ulysses=2", "train.accumulation=1", *settings)
        config = config_of(folder, "LlamaConfig", f"short-{number}", *whole)
        with pytest.raises(XdistError) as caught:
            run(config)
        metrics = (config.run_directory / "metrics.jsonl").read_text()
        found.append((type(caught.value), str(caught.value), metrics))
    return found


def test_a_sequence_too_short_for_the_ranks_is_refused_before_the_first_step(
    folder: pathlib.Path, pool2: RankPool
) -> None:
    for rank in pool2.run(_refused, str(folder)):
        for (kind, message, metrics), (_, remedy) in zip(rank, SHORT, strict=True):
            assert kind is ConfigError
            assert "a sequence of 1 tokens" in message
            assert remedy in message.splitlines()[-1]
            assert metrics == ""


@pytest.mark.slow
def test_llama_trains_on_two_ranks_as_on_one_under_every_engine(
    folder: pathlib.Path, pool2: RankPool
) -> None:
    exact = ("model.dtype=float64", "train.precision=float64")
    cases = [("LlamaConfig", key, (*exact, *settings)) for key, settings in ENGINES.items()]
    assert pool2.run(train_all, str(folder), cases) == [[0] * len(cases)] * 2
    one = ("LlamaConfig", "one", exact)
    assert train_all(str(folder), [one]) == [0]
    alone = config_of(str(folder), *one[:2], *exact)
    for name, named, settings in cases:
        config = config_of(str(folder), name, named, *settings)
        assert losses(config) == pytest.approx(losses(alone), rel=1e-7), named
        assert held_out(config) == pytest.approx(held_out(alone), rel=1e-7), named


@pytest.mark.slow
def test_each_tested_family_trains_on_two_ranks_as_on_one(
    folder: pathlib.Path, pool2: RankPool
) -> None:
    cases = [(name, f"{name}-2", ("parallel.ring=2", "parallel.layout=zigzag")) for name in MODELS]
    assert pool2.run(train_all, str(folder), cases) == [[0] * len(cases)] * 2
    for name in MODELS:
        alone = config_of(str(folder), name, f"{name}-1")
        assert run(alone) == 0
        two = config_of(str(folder), name, f"{name}-2", "parallel.ring=2")
        assert losses(two) == pytest.approx(losses(alone), rel=1e-4), name
        assert losses(two)[-1] < losses(two)[0], name


@pytest.mark.slow
def test_dropout_inside_attention_falls_the_same_on_one_and_two_ranks(
    folder: pathlib.Path, pool2: RankPool
) -> None:
    options = toml_value(SIZES | {"attention_dropout": 0.4})
    exact = ("model.dtype=float64", "train.precision=float64")
    drops = (*exact, f"model.options={options}", "evaluate.tokens=100")
    cases = [("LlamaConfig", f"drops-{key}", (*drops, *ENGINES[key])) for key in ("plain", "data")]
    assert pool2.run(train_all, str(folder), cases) == [[0] * 2] * 2
    one = ("LlamaConfig", "drops-one", drops)
    none = ("LlamaConfig", "drops-none", (*exact, "evaluate.tokens=100"))
    assert train_all(str(folder), [one, none]) == [0, 0]
    wanted = losses(config_of(str(folder), *one[:2]))
    for _, named, settings in cases:
        found = losses(config_of(str(folder), "LlamaConfig", named, *settings))
        assert found == pytest.approx(wanted, rel=1e-7), named
    assert losses(config_of(str(folder), *none[:2])) != pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_the_bytes_of_a_step_are_the_planned_ones(folder: pathlib.Path, pool2: RankPool) -> None:
    """Where documents are joined: kept separate, the plan is the most that can move."""
    joined = ("data.documents=join",)
    cases = [
        ("MistralConfig", "joined-ring", (*joined, "parallel.ring=2", "parallel.layout=zigzag")),
        ("LlamaConfig", "joined-fsdp", (*joined, "parallel.ulysses=2", "engine.name=fsdp")),
    ]
    assert pool2.run(train_all, str(folder), cases) == [[0] * len(cases)] * 2
    for name, named, settings in cases:
        steps = [
            line
            for line in lines_of(config_of(str(folder), name, named, *settings))
            if "eval" not in line
        ]
        assert len(steps) == 6
        for line in steps:
            assert line["sent_bytes"] == line["planned_bytes"], named
            assert min(line["sent_bytes"]) > 0


@pytest.mark.slow
def test_a_checkpoint_goes_on_under_another_engine_and_number_of_ranks(
    folder: pathlib.Path, pool2: RankPool
) -> None:
    saved = ("checkpoint.every_steps=3", "checkpoint.keep=9")
    fsdp = (*saved, "parallel.ring=2", "engine.name=fsdp")
    whole = [("Qwen3Config", "kept", fsdp)]
    assert pool2.run(train_all, str(folder), whole) == [[0], [0]]
    config = config_of(str(folder), "Qwen3Config", "kept", *saved)
    wanted = losses(config)
    last = sorted((config.run_directory / "checkpoints").glob("step-*"))[-1]
    for path in sorted(last.iterdir()):
        path.unlink()
    last.rmdir()
    assert run(config) == 0
    assert losses(config) == pytest.approx(wanted, rel=1e-4)
    facts = json.loads((config.run_directory / "run.json").read_text())
    assert facts["ranks"] == 1


@pytest.mark.slow
def test_the_example_certifies_and_passes_a_dry_run(pool2: RankPool) -> None:
    config = override(load(LLAMA), ["certify.ranks=[1,2]", "certify.length=96"])
    packed = override(config, ["data.documents=separate"])
    report = certify_config(packed, pools={2: pool2})
    assert report.passed, report.table()
    assert all(row.planned_bytes == row.sent_bytes for row in report.rows)
    short = override(config, ["train.curriculum=[{length=256,batch=2,steps=2}]"])
    assert dry_run(short).differing == []
