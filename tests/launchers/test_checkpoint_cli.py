"""`xdist checkpoint verify | export | import`: what they say, what they refuse, how they end."""

from __future__ import annotations

import argparse
import ast
import json
import os
import pathlib
import stat
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from tests.end_to_end.training import config_of, losses, make_store, run_here
from xdist.checkpoint import load_latest
from xdist.config import Config
from xdist.train import run
from xdist.train.setup import build_model
from xdist_launchers.cli import app

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILE = "rank-00000-model-00001.safetensors"


def _xdist(*words: object) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, words)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A store, and a finished run with checkpoints of steps 4 and 6."""
    made = tmp_path_factory.mktemp("cli")
    make_store(made)
    assert run(config_of(made, "done")) == 0
    return made


def _run(folder: pathlib.Path, name: str = "done") -> pathlib.Path:
    return config_of(folder, name).run_directory


def test_verify_says_which_checkpoints_are_whole(folder: pathlib.Path) -> None:
    done = _xdist("verify", _run(folder))
    assert done.exit_code == 0
    first, second = done.output.splitlines()
    assert first.startswith("step-00000006 is whole: ")
    assert second.startswith("step-00000004 is whole: ")
    assert "tensors" in first
    one = _xdist("verify", _run(folder) / "checkpoints" / "step-00000004")
    assert (one.exit_code, one.output) == (0, second + "\n")


def test_verify_ends_with_4_for_a_flipped_bit_and_for_nothing(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert run(config_of(folder, "flipped")) == 0
    path = _run(folder, "flipped") / "checkpoints" / "step-00000004" / FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = _xdist("verify", _run(folder, "flipped"))
    assert done.exit_code == 4
    assert "step-00000006 is whole" in done.output
    assert f"step-00000004 is damaged: {FILE} sha256 mismatch (want " in done.output
    nothing = _xdist("verify", tmp_path)
    assert nothing.exit_code == 4
    assert f"no checkpoint at {tmp_path}" in nothing.output


@pytest.mark.parametrize("max_file_bytes", [5 << 30, 4096])
def test_export_is_the_layout_that_huggingface_reads(
    folder: pathlib.Path, tmp_path: pathlib.Path, max_file_bytes: int
) -> None:
    out = tmp_path / "out"
    done = _xdist("export", _run(folder), out, "--max-file-bytes", max_file_bytes)
    assert done.exit_code == 0, done.output
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert files == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    assert (count > 1) == (max_file_bytes == 4096)
    names = {*files, "config.json", "model.safetensors.index.json"}
    assert {path.name for path in out.iterdir()} == names
    config = config_of(folder, "done")
    assert json.loads((out / "config.json").read_text()) == config.model.model_dump(mode="json")
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        held = load_file(out / file)
        assert all(index["weight_map"][name] == file for name in held)
        tensors |= held
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    # They are the parameters, under the model's own names.
    found = load_latest(_run(folder) / "checkpoints")
    assert found is not None
    model = build_model(config)
    model.load_state_dict(tensors)
    for name, value in model.state_dict().items():
        assert torch.equal(value, found.tensors[f"model/{name}"])
    again = _xdist("export", _run(folder), out)
    assert again.exit_code == 4
    assert "exists" in again.output


def test_export_takes_the_newest_whole_checkpoint_and_says_so(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    assert run(config_of(folder, "newest")) == 0
    (_run(folder, "newest") / "checkpoints" / "step-00000006" / FILE).unlink()
    done = _xdist("export", _run(folder, "newest"), tmp_path / "out")
    assert done.exit_code == 0
    assert f"step-00000006 rejected: {FILE} is missing" in done.output
    assert "tensors of step-00000004" in done.output
    bad = _xdist(
        "export", _run(folder, "newest") / "checkpoints" / "step-00000006", tmp_path / "two"
    )
    assert bad.exit_code == 4
    assert not (tmp_path / "two").exists()


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, marker: pathlib.Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_is_refused_without_the_flag_and_never_run(tmp_path: pathlib.Path) -> None:
    marker, file = tmp_path / "owned", tmp_path / "weights.pt"
    torch.save({"a": Malicious(marker)}, file)
    done = _xdist("import", file, tmp_path / "run")
    assert done.exit_code == 4
    assert "a pickle is a program" in done.output
    assert "--trust-pickle" in done.output
    assert not marker.exists()
    assert not (tmp_path / "run").exists()
    # The danger is real: that is what the flag says.
    done = _xdist("import", file, tmp_path / "run", "--trust-pickle")
    assert marker.exists()
    assert done.exit_code == 4
    assert "more than tensors" in done.output


def _parameters(config: Config, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {name: tensor.detach() for name, tensor in build_model(config).state_dict().items()}


@pytest.mark.parametrize("kind", ["plain", "deepspeed", "bfloat16"])
def test_a_run_starts_from_imported_parameters(folder: pathlib.Path, kind: str) -> None:
    """As if it had been initialised with them; the optimizer begins anew."""
    config = config_of(folder, f"import-{kind}")
    given = _parameters(config, seed=7)
    content: dict[str, Any] = given
    if kind == "deepspeed":
        content = {
            "module": {f"module.{name}": tensor for name, tensor in given.items()},
            "ds_config": argparse.Namespace(zero=3),
            "global_steps": 11,
        }
    if kind == "bfloat16":
        content = {name: tensor.to(torch.bfloat16) for name, tensor in given.items()}
        given = {name: tensor.float() for name, tensor in content.items()}
    file = folder / f"{kind}.pt"
    torch.save(content, file)
    done = _xdist("import", file, config.run_directory, "--trust-pickle")
    assert done.exit_code == 0, done.output
    assert ("was unpickled in full" in done.output) == (kind == "deepspeed")
    checkpoints = config.run_directory / "checkpoints"
    assert stat.S_IMODE(checkpoints.stat().st_mode) == 0o700
    assert run(config) == 0

    def build(config: Config) -> torch.nn.Module:
        model = build_model(config)
        model.load_state_dict(given)
        return model

    direct = config_of(folder, f"direct-{kind}")
    assert run(direct, build=build) == 0
    assert losses(config) == losses(direct)
    again = _xdist("import", file, config.run_directory, "--trust-pickle")
    assert again.exit_code == 4
    assert "holds checkpoints" in again.output


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([1, 2], "holds no state dict"),
        ({}, "holds no state dict"),
        ({"a": torch.zeros(1), "step": 3}, "not tensors: step"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: pathlib.Path, content: Any, text: str) -> None:
    file = tmp_path / "file.pt"
    torch.save(content, file)
    done = _xdist("import", file, tmp_path / "run", "--trust-pickle")
    assert done.exit_code == 4
    assert text in done.output
    file.write_bytes(b"no pickle at all")
    done = _xdist("import", file, tmp_path / "run", "--trust-pickle")
    assert done.exit_code == 4
    assert "cannot be read" in done.output


def test_imported_parameters_of_another_model_are_refused(folder: pathlib.Path) -> None:
    config = config_of(folder, "import-other")
    torch.save({"alien": torch.zeros(3)}, folder / "other.pt")
    done = _xdist("import", folder / "other.pt", config.run_directory, "--trust-pickle")
    assert done.exit_code == 0
    code, message = run_here(str(folder), "import-other")
    assert code == 4
    assert "1 unknown" in message


def test_one_file_alone_unpickles() -> None:
    """`torch.load` and the words of the flag stand in the files of the import and nowhere else."""
    calls, flags = set(), set()
    for top in ("xdist", "kernels", "launchers"):
        for path in (ROOT / top).rglob("*.py"):
            text = path.read_text()
            if "trust_pickle" in text or "trust-pickle" in text:
                flags.add(path.name)
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                    "torch.load",
                    "torch.serialization.load",
                    "np.load",
                ):
                    calls.add((path.name, ast.unparse(node)))
    unpickling = {file for file, call in calls if call != "np.load"}
    assert unpickling == {"checkpoint_import.py"}
    assert flags == {"checkpoint_cli.py", "checkpoint_import.py"}
