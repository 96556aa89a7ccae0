"""mixer_lm: the same on any number of ranks, with the bytes that the plan says."""

from __future__ import annotations

from pathlib import Path

import pytest

from xdist.certify import certify_config
from xdist.config import Config, load, override, parse
from xdist.config_pattern import MIXERS
from xdist.plan import pass_bytes
from xdist.testing import RankPool

ROOT = Path(__file__).resolve().parents[2]
HYBRIDS = sorted((ROOT / "configs" / "hybrid").glob("*.toml"))
# Where the state is small the scan is cheap; long shares of few tokens make switch cheap.
SIZES = """
[model]
kind = "mixer_lm"
vocab_size = 11
dim = 8
head_dim = 4
pattern = "{pattern}"
window = {window}
options = {{ {options} }}
[parallel]
layout = "{layout}"
attention = "{attention}"
recurrent = "{recurrent}"
[data]
documents = "{documents}"
[certify]
length = {length}
ranks = [1, {ranks}]
"""
OPTIONS = {
    "mamba2": "mamba2 = { state_dim = 4, head_dim = 4 }",
    "mamba": "mamba = { state_dim = 3 }",
    "sse": "sse = { partitions = 3, top_k = 2 }",
}


def config_of(pattern: str, **changes: object) -> Config:
    given = [text for name, text in OPTIONS.items() if name in pattern.split(",")]
    values = {
        "window": '"none"', "layout": "contiguous", "attention": "auto", "recurrent": "auto",
        "documents": "join", "length": 41, "ranks": 3, "options": ", ".join(given),
    }  # fmt: skip
    return parse(SIZES.format(pattern=pattern, **{**values, **changes}))


CASES = [
    config_of(",".join(["mlp", *MIXERS])),
    config_of("gla,attention,mlp", layout="zigzag", documents="separate", window=5),
    config_of("mamba2,kda,mamba,attention", documents="separate", recurrent="switch"),
    config_of("linear,gated_deltanet", length=5, layout="zigzag", recurrent="scan"),
    config_of("attention,hgrn2", attention="gather"),
]


@pytest.mark.parametrize("config", CASES, ids=lambda config: config.model.pattern[:24])
def test_a_model_of_any_mixers_is_certified_with_planned_bytes(
    config: Config, pool3: RankPool
) -> None:
    report = certify_config(config, pools={3: pool3})
    assert report.passed, report.table()
    assert [row.ranks for row in report.rows] == [1, 1, 3, 3]
    moved = report.rows[-1]
    assert moved.sent_bytes == moved.planned_bytes > 0
    assert sum(pass_bytes(config, 41, 2, precision="float32")) == 0


def certify_hybrid(path: Path, pool: RankPool) -> None:
    config = override(load(path), ["parallel.ring=3"])
    assert 3 in config.certify.ranks
    report = certify_config(config, pools={3: pool})
    assert report.passed, report.table()
    assert report.rows[-1].sent_bytes == report.rows[-1].planned_bytes > 0


def test_the_first_hybrid_config_is_certified_on_3_ranks(pool3: RankPool) -> None:
    certify_hybrid(ROOT / "configs" / "hybrid" / "deltanet_window.toml", pool3)


@pytest.mark.slow
@pytest.mark.parametrize("path", HYBRIDS, ids=lambda path: path.stem)
def test_every_hybrid_config_is_certified_on_3_ranks(path: Path, pool3: RankPool) -> None:
    certify_hybrid(path, pool3)


def test_the_hybrid_configs_have_the_published_shares() -> None:
    shares = {}
    for path in HYBRIDS:
        layers = load(path).model.layers
        shares[path.stem] = {kind: layers.count(kind) for kind in dict.fromkeys(layers)}
    assert shares == {
        "deltanet_global": {"deltanet": 4, "mlp": 6, "attention": 2},
        "deltanet_window": {"deltanet": 2, "mlp": 4, "attention": 2},
        "gated_deltanet_3to1": {"gated_deltanet": 3, "mlp": 4, "attention": 1},
        "gated_deltanet_6to1": {"gated_deltanet": 6, "mlp": 7, "attention": 1},
        "hgrn2_3to1": {"hgrn2": 3, "mlp": 4, "attention": 1},
        "hgrn2_6to1": {"hgrn2": 6, "mlp": 7, "attention": 1},
        # 43 %, 7 % and 50 % of 14 layers.
        "mamba2_hybrid": {"mamba2": 6, "mlp": 7, "attention": 1},
    }
    windows = {path.stem: load(path).model.window for path in HYBRIDS}
    assert windows.pop("deltanet_window") == 16
    assert set(windows.values()) == {None}
