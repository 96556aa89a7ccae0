"""Settings: types, unknown keys, overrides, all errors at once, the round trip, no torch."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from xdist.config import Config, load, override, parse, parse_pattern, to_toml
from xdist.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _error(text: str, overrides: tuple[str, ...] = ()) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text, "train.toml", overrides)
    return caught.value


def test_empty_text_gives_the_defaults() -> None:
    assert parse("") == Config()
    assert Config().run_directory == pathlib.Path("runs/run")
    assert Config().ranks == 1
    assert Config().model.layers == ("linear", "linear", "linear", "attention")


def test_config_is_frozen_and_hashable() -> None:
    config = Config()
    with pytest.raises(ValueError, match="frozen"):
        config.model.dim = 3  # type: ignore[misc]
    assert hash(config) == hash(Config())


def test_unknown_key_names_file_line_and_near_key() -> None:
    error = _error("[model]\ndim = 64\n\n[parallel]\n# degrees\nlayout = 'zigzag'\nrign = 2\n")
    assert error.what == "unknown key parallel.rign in train.toml:7; did you mean parallel.ring?"
    assert error.exit_code == 2
    assert "ulysses" in error.why
    assert "docs/config.md" in error.do


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("[train]\nseed = 3\n", "train.toml:2; did you mean run.seed?"),
        ("[trian]\nsteps = 3\n", "train.toml:1; did you mean train?"),
        ("seed = 3\n", "train.toml:1; did you mean run.seed?"),
        (
            "[train]\ncurriculum = [\n  { length = 4 },\n  { lenght = 4 },\n]\n",
            "train.toml:4; did you mean train.curriculum.1.length?",
        ),
        (
            "[[train.curriculum]]\nlength = 4\n[[train.curriculum]]\nbacth = 2\n",
            "train.toml:4; did you mean train.curriculum.1.batch?",
        ),
        ("train.precison = 1\n", "train.toml:1; did you mean train.precision?"),
    ],
)
def test_hints_look_in_other_sections_lists_and_dotted_keys(text: str, hint: str) -> None:
    assert hint in _error(text).what


def test_all_errors_are_listed_at_once_in_file_order() -> None:
    text = """
[parallel]
rign = 2
ulysses = 3
[model]
dim = "64"
head_dim = 32.5
[launch]
ranks = 4
[train]
precision = "float16"
"""
    error = _error(text, ("evaluate.tokens=7", "nonsense"))
    lines = error.why.splitlines()
    assert error.what == "train.toml: 7 settings are wrong"
    assert [line.strip() for line in lines] == lines_in_order(lines)
    for part in (
        "unknown key parallel.rign in train.toml:3",
        'train.toml:6: model.dim must be a whole number, got "64" (text)',
        "train.toml:7: model.head_dim must be a whole number, got 32.5 (number)",
        "train.toml:9: 4 ranks do not fit the degrees of [parallel]",
        "train.toml:11: train.precision cannot be \"float16\"; did you mean 'bfloat16'?",
        "evaluate.length = 262144 > evaluate.tokens = 7",
        "'nonsense': not of the form key=value",
    ):
        assert part in error.why


def lines_in_order(lines: list[str]) -> list[str]:
    """The lines sorted by the number after `train.toml:`, overrides first or last as they are."""
    placed = [line for line in lines if "train.toml:" in line]
    numbers = [int(line.split("train.toml:")[1].split(":")[0].split(";")[0]) for line in placed]
    assert numbers == sorted(numbers)
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nseed = true\n", "run.seed must be a whole number, got true (true/false)"),
        ("[run]\nname = 3\n", 'run.name must be text in quotes ("..."), got 3 (whole number)'),
        ("[run]\nname = '../x'\n", 'run.name = "../x" must match'),
        ("[log]\ntensorboard = 'yes'\n", 'log.tensorboard must be true or false, got "yes" (text)'),
        ("[optimizer]\neps = '1e-3'\n", 'optimizer.eps must be a number, got "1e-3" (text)'),
        ("[optimizer]\neps = inf\n", "optimizer.eps must be a finite number, got inf"),
        ("[optimizer]\nbetas = [0.9]\n", "optimizer.betas.1 is missing"),
        ("[optimizer]\nbetas = [0.9, 1.0]\n", "optimizer.betas.1 = 1.0 must be less than 1.0"),
        ("[certify]\nranks = []\n", "certify.ranks = [] needs at least 1 item"),
        ("[certify]\nranks = [1, 0]\n", "certify.ranks.1 = 0 must be at least 1"),
        ("[train]\ncurriculum = 3\n", "train.curriculum must be a list"),
        ("model = 3\n", "model must be a table, got 3"),
        ("[parallel]\ndata = 'all'\n", 'parallel.data must be a whole number, got "all"'),
    ],
)
def test_wrong_types_and_ranges(text: str, message: str) -> None:
    error = _error(text)
    line = text.count("\n")
    assert error.what.startswith(f"train.toml:{line}: ")
    assert message in error.what


def test_whole_numbers_are_decimals_too() -> None:
    assert parse("[optimizer]\neps = 1\n").optimizer.eps == 1.0


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("[run]\nname = 'a'\nname = 'b'\n", 3, "given twice"),
        ("[run]\nseed = 1\n[model]\ndim = 32\n[run]\nthreads = 1\n", 5, "given twice"),
        ("[run]\nname = quick\n", 2, "not valid TOML"),
        ("[train]\ncurriculum = [ { length = 3,\n batch = 3 } ]\n", 2, "not valid TOML"),
        ("[run\n", 1, "not valid TOML"),
        ("[run]\nname = 'a", 2, "not valid TOML"),
    ],
)
def test_broken_and_duplicate_toml_names_the_line(text: str, line: int, part: str) -> None:
    assert f"train.toml:{line}: " in _error(text).what
    assert part in _error(text).what


def test_overrides_take_toml_values_bare_text_and_list_items() -> None:
    config = parse(
        "[train]\ncurriculum = [{ length = 8, batch = 2, steps = 3 }]\n",
        overrides=[
            "run.name=second",
            "data.store=/a path/with [brackets]",
            "optimizer.betas=[0.5, 0.75]",
            "optimizer.eps=1e-6",
            "train.curriculum.0.steps=5",
            "certify.ranks.1=4",
            "parallel.data=auto",
            "model.window=none",
            "log.tensorboard=true",
            'model.pattern="linear*2"',
        ],
    )
    assert config.run.name == "second"
    assert config.data.store == "/a path/with [brackets]"
    assert config.optimizer.betas == (0.5, 0.75)
    assert config.optimizer.eps == 1e-6
    assert config.train.curriculum[0].steps == 5
    assert config.train.curriculum[0].length == 8
    assert config.certify.ranks == (1, 4, 3)
    assert config.parallel.data is None
    assert config.model.window is None
    assert config.log.tensorboard is True
    assert config.model.pattern == "linear*2"


def test_override_reaches_into_a_default_list() -> None:
    assert parse("", overrides=["train.curriculum.0.batch=2"]).train.curriculum[0].length == 4096


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train.curriculum.3.steps=5", "train.curriculum has no item 3"),
        ("model.dim.x=5", "model.dim is one value, not a section"),
        ("model.dim=", "not a TOML value"),
        ("certify.ranks=[1,2", "not a TOML value"),
        ("--ranks", "not of the form key=value"),
        ("model.dims=64", "unknown key model.dims; did you mean model.dim?"),
        ("model=4", "model must be a table"),
        ("run.name=a\nb", "run.name"),
        ("model.kind=hybrid", "model.kind cannot be \"hybrid\"; did you mean 'hybrid_lm'?"),
    ],
)
def test_bad_overrides_name_themselves(text: str, message: str) -> None:
    error = _error("", (text,))
    assert error.what.startswith(f"override {text!r}: ")
    assert message in error.what


def test_an_override_given_twice_is_an_error() -> None:
    assert "overridden twice" in _error("", ("run.seed=1", "run.seed=2")).what


def test_override_wins_over_the_file_and_repairs_it() -> None:
    assert parse("[run]\nseed = 'x'\n", overrides=["run.seed=2"]).run.seed == 2


def test_override_of_a_config_checks_again() -> None:
    config = override(Config(), ["parallel.ulysses=2"])
    assert config.ranks == 2
    with pytest.raises(ConfigError, match="do not fit the degrees"):
        override(config, ["launch.ranks=3"])


def test_round_trip_is_exact() -> None:
    config = parse(
        "",
        overrides=[
            'run.directory="a \\"quoted\\"\\t\\\\ ü \\u007F path"',
            "optimizer.learning_rate=0.30000000000000004",
            "optimizer.eps=5e-324",
            "optimizer.clip_norm=1e300",
            "model.ngram_orders=[2, 3]",
            "train.curriculum=[{length=9, batch=6, steps=1}, {length=70000000000, batch=3}]",
            "parallel.data=3",
            "model.window=none",
            "model.pattern=linear",
        ],
    )
    text = to_toml(config)
    assert parse(text) == config
    assert to_toml(parse(text)) == text


def test_every_config_of_the_tree_is_valid() -> None:
    files = sorted((ROOT / "configs").glob("*.toml"))
    assert files
    for file in files:
        config = load(file)
        assert parse(to_toml(config)) == config


def test_missing_file_names_a_near_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / "quickstart.toml").write_text("")
    with pytest.raises(ConfigError, match=r"did you mean .*quickstart\.toml"):
        load(tmp_path / "quikstart.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not text in UTF-8"):
        load(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("linear", ("linear",)),
        (" linear * 2 , attention", ("linear", "linear", "attention")),
    ],
)
def test_pattern(pattern: str, layers: tuple[str, ...]) -> None:
    assert parse_pattern(pattern) == layers


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("linaer*2", "did you mean 'linear'?"),
        ("", "known layers"),
        ("linear*", "no count"),
        ("linear*0", "no count"),
        ("linear*-1", "no count"),
        ("linear,,attention", "known layers"),
    ],
)
def test_bad_pattern(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_pattern(pattern)
    assert message in str(caught.value)
    assert "model.pattern" in _error("", (f'model.pattern="{pattern}"',)).what


def test_the_reference_page_is_true() -> None:
    from xdist.config_reference import reference

    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference(), "run: python -m xdist.config_reference > docs/config.md"


def test_every_setting_has_a_description() -> None:
    for section in Config.model_fields.values():
        for name, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, name


def test_a_bad_config_fails_before_torch(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "train.toml"
    file.write_text("[parallel]\nrign = 2\n")
    code = (
        "import sys\nfrom xdist_launchers.cli import main\n"
        f"sys.argv = ['xdist', sys.argv[1], {str(file)!r}]\n"
        "import os\n"
        "def left(code):\n"
        "    print('torch' in sys.modules, flush=True)\n"
        "    raise SystemExit(code)\n"
        "os._exit = left\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    left(stop.code)\n"
    )
    for command in ("train", "show"):
        done = subprocess.run(
            [sys.executable, "-c", code, command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PYTHONPATH": ":".join(str(ROOT / p) for p in (".", "kernels", "launchers"))},
        )
        assert done.returncode == 2, done.stderr
        assert "False" in done.stdout
        assert f"unknown key parallel.rign in {file}:2; did you mean parallel.ring?" in done.stderr
        assert "Traceback" not in done.stderr
