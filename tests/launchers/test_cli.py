"""The command line as a user meets it: messages, exit codes, the clash with pytest-xdist."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import tomllib

import pytest

from tests.launchers.conftest import PATHS, ROOT

XDIST = (sys.executable, "-P", "-m", "xdist_launchers.cli")


def xdist(
    *arguments: str, cwd: pathlib.Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of xdist to its end."""
    return subprocess.run(
        [*XDIST, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": PATHS, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def config(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "train.toml"
    file.write_text('[run]\nname = "small"\n[parallel]\nulysses = 2\n[data]\nstore = "no.zarr"\n')
    return file


def test_show_prints_the_whole_config_resolved(config: pathlib.Path) -> None:
    done = xdist("show", str(config), "train.accumulation=3", "--ranks", "4")
    assert done.returncode == 0, done.stderr
    tree = tomllib.loads(done.stdout)
    assert tree["parallel"]["ulysses"] == 2
    assert tree["train"]["accumulation"] == 3
    assert tree["launch"]["ranks"] == 4
    assert tree["optimizer"]["betas"] == [0.9, 0.95]
    assert done.stderr == ""


@pytest.mark.parametrize("command", [["show"], ["train"], ["launch", "local"], ["plan"]])
def test_failure_1_misspelt_keys_end_every_command_with_2(
    command: list[str], tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "train.toml"
    file.write_text("[parallel]\nrign = 2\n[run]\nseed = 'x'\n")
    done = xdist(*command, str(file), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == f"xdist: {file}: 2 settings are wrong"
    assert lines[1].strip() == (
        f"unknown key parallel.rign in {file}:2; did you mean parallel.ring?"
    )
    assert lines[2].strip().startswith(f"{file}:4: run.seed must be a whole number")
    assert len(lines) == 4
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (
            ["launch", "local", "CONFIG", "--ranks", "3"],
            ["3 ranks do not fit", "3 ranks / (ring 1 x ulysses 2) = 3/2", "launch.ranks=2"],
        ),
        (
            ["launch", "local", "CONFIG", "--ranks", "6", "train.curriculum.0.batch=4"],
            ["stage 0 cannot share 4 sequences among 3 data ranks", "remainder 1", "batch=3"],
        ),
        (
            ["launch", "local", "CONFIG", "model.window=none"],
            ['"none" cannot be honoured: every query', "one window of keys", "model.window=256"],
        ),
        (
            ["launch", "local", "CONFIG", "parallel.attention=ulysses"],
            ['"ulysses" cannot be honoured', "cross ranks by halo", "parallel.attention=auto"],
        ),
        (
            ["train", "CONFIG"],
            ["needs 2 ranks, and 1 is running", "ulysses 2", "xdist launch local CONFIG --ranks 2"],
        ),
    ],
)
def test_failure_2_impossible_geometry_ends_with_2_and_settings_that_hold(
    arguments: list[str], parts: list[str], config: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = [str(config) if word == "CONFIG" else word for word in arguments]
    done = xdist(*words, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("xdist: ")
    for line, part in zip(lines, parts, strict=True):
        assert part in line
    assert not (tmp_path / "runs").exists()


def test_torchruns_world_counts_and_contradictions_end_with_3(config: pathlib.Path) -> None:
    env = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = xdist("train", str(config), **env)
    assert done.returncode == 2
    assert "needs 2 ranks, and 3 are running" in done.stderr
    done = xdist("train", str(config), RANK="5", WORLD_SIZE="2")
    assert done.returncode == 3
    assert "WORLD_SIZE=2" in done.stderr
    # An error that all ranks raise alike is told by rank 0 alone.
    silent = xdist("train", str(config), **(env | {"RANK": "1"}))
    assert (silent.returncode, silent.stderr) == (2, "")


def test_a_missing_config_and_a_missing_run_say_what_there_is(
    config: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    done = xdist("show", str(tmp_path / "trian.toml"))
    assert done.returncode == 2
    assert f"did you mean {config}?" in done.stderr
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "status.json").write_text("{}")
    done = xdist("report", "runs/two", cwd=tmp_path)
    assert done.returncode == 2
    assert "runs here: runs/one" in done.stderr
    done = xdist("launch", "local")
    assert done.returncode == 2
    assert "no config was given" in done.stderr


def test_training_without_a_store_says_how_to_make_one(config: pathlib.Path) -> None:
    for command in (["train"], ["launch", "local"]):
        done = xdist(*command, str(config), 'data.store=""', "parallel.ulysses=1")
        assert done.returncode == 2
        assert done.stderr.splitlines()[0] == "xdist: data.store is not set"
        assert "xdist prepare text" in done.stderr


def test_print_starts_nothing_and_does_without_a_config(tmp_path: pathlib.Path) -> None:
    done = xdist("launch", "local", "--print", "parallel.ulysses=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("LOCAL_RANK=") == 2
    assert '"${1:?give the path of a config}" parallel.ulysses=2 launch.ranks=2' in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_doctor_lists_versions_and_exits_0_or_3() -> None:
    done = xdist("doctor")
    assert done.returncode in (0, 3)
    for word in ("python ", "cores ", "memory ", "device ", "torch ", "zarr "):
        assert f"\n{word}" in f"\n{done.stdout}"


def test_help_of_every_command_starts_without_torch() -> None:
    code = (
        "import sys\nfrom xdist_launchers.cli import app\n"
        "for words in ([], ['train'], ['launch', 'local'], ['prepare', 'text'], ['certify']):\n"
        "    try:\n        app([*words, '--help'])\n"
        "    except SystemExit as stop:\n        assert not stop.code\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_another_xdist_in_front_is_named_in_one_line(tmp_path: pathlib.Path) -> None:
    (tmp_path / "xdist").mkdir()
    (tmp_path / "xdist" / "__init__.py").write_text("__all__ = ['get_xdist_worker_id']\n")
    done = xdist("show", "x.toml", PYTHONPATH=f"{tmp_path}:{PATHS}")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "pytest-xdist owns the name `xdist` in this environment" in done.stderr
    assert str(tmp_path / "xdist") in done.stderr
    assert "pip uninstall -y pytest-xdist" in done.stderr


BODY = """
import sys
from xdist_launchers import cli
def body():
    {body}
try:
    cli.guarded(body)
except cli.typer.Exit as stop:
    sys.stdout.flush()
    raise SystemExit(stop.exit_code)
"""


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("raise KeyboardInterrupt", 130, "xdist: interrupted"),
        ("raise ValueError('odd')", 1, "ValueError: odd"),
        (
            "from xdist.errors import CheckpointError; raise CheckpointError('a', 'b', 'c')",
            4,
            "c",
        ),
    ],
)
def test_exceptions_end_with_their_code_and_one_message(body: str, code: int, last: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BODY.format(body=body)],
        env=os.environ | {"PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code
    assert done.stderr.rstrip().endswith(last)
    assert ("Traceback" in done.stderr) == (code == 1)


def test_a_reader_that_leaves_is_no_error(config: pathlib.Path) -> None:
    process = subprocess.Popen(
        [*XDIST, "show", str(config)],
        env=os.environ | {"PYTHONPATH": PATHS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    message = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 128 + signal.SIGPIPE
    assert message == ""


def test_the_table_of_failures_holds_every_exit_code() -> None:
    from xdist import errors

    page = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
    kinds = [k for k in vars(errors).values() if isinstance(k, type)]
    for code in {kind.exit_code for kind in kinds if issubclass(kind, errors.XdistError)}:
        assert f"| {code} |" in page
