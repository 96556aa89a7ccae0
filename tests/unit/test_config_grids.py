"""Settings of models of grids: what is needed, what is refused, and with which words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.end_to_end.grid_training import TEXT
from xdist.config import override, parse
from xdist.errors import ConfigError, GeometryError


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("mamba_nd", ["data.kind=text"], "it needs volume data"),
        ("mamba_nd", ["model.sizes=[]", "data.slab=[]"], "model.sizes is not set"),
        ("mamba_nd", ["model.patch=[2]"], "model.patch = [2] has 1 dims"),
        ("mamba_nd", ["certify.sizes=[2,2]"], "certify.sizes = [2, 2] has 2 dims"),
        ("mamba_nd", ["parallel.dim=3"], "nearest valid settings: parallel.dim=1, or"),
        ("mamba_nd", ["train.curriculum.0.crop=[9,9,7]"], "crop=[9, 8, 7]"),
        ("mamba_nd", ["train.curriculum.0.crop=[4]"], "crop = [4] has 1 dims"),
        ("mamba_nd", ["data.crop_box=[0,9]"], "holds every crop"),
        ("mamba_nd", ["data.crop_box=[0,99,0,8,0,7]"], "crop_box = [0, 9, 0, 8, 0, 7]"),
        ("mamba_nd", ["data.crop_box=[0,2,0,8,0,7]"], "the largest crop is"),
        ("mamba_nd", ["data.slab=[1,2]"], "is not [dim, start, stop]"),
        ("mamba_nd", ["data.slab=[1,0,8]"], "holds out no part of dim 1"),
        ("mamba_nd", ["data.slab=[1,7,9]"], "it has 8 positions"),
        ("mamba_nd", ["model.window=3"], "model.window has no effect with mamba_nd"),
        ("mamba_nd", ["train.curriculum.1.length=3"], "curriculum.1.length has no effect"),
        ("mamba_nd", ["parallel.grid=ring"], "parallel.grid has no effect with mamba_nd"),
        ("mamba_nd", ["engine.name=deepspeed"], "cannot hold mamba_nd"),
        ("mamba_nd", ["model.dtype=float32", "train.precision=bfloat16"], "precision=float32"),
        ("mamba_nd", ["ray.prepare=true", "ray.sources=['x']"], "cannot prepare the data"),
        ("vdt", ["data.slab=[0,1,2]"], "data.slab has no effect with vdt"),
        ("vdt", ["model.classes=3"], "model.classes has no effect with vdt"),
        ("vdt", ["data.on_bad=skip"], "none can be left out of a batch"),
    ],
)
def test_what_cannot_be_honoured_is_refused(kind: str, settings: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(parse(TEXT[kind]), settings)
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["model.sizes=[4,4]", "data.kind=volume", "data.noise=1.0",
                                  "train.curriculum=[{crop=[4]}]", "parallel.dim=1"])  # fmt: skip
def test_models_of_tokens_read_no_settings_of_grids(name: str) -> None:
    with pytest.raises(ConfigError, match="has no effect with hybrid_lm"):
        override(parse(""), [name])


def test_a_dim_with_fewer_tokens_than_ranks_is_refused_with_one_that_has_enough() -> None:
    with pytest.raises(GeometryError) as caught:
        override(parse(TEXT["mamba_nd"]), ["parallel.ring=4", "parallel.dim=2"])
    assert "stage 0 cannot share dim 2 among 4 sequence ranks" in str(caught.value)
    assert "has 3 tokens along that dim, 1 ranks would hold none" in str(caught.value)
    assert "parallel.dim=0" in str(caught.value)


def test_tokens_of_a_stage_count_patches_that_are_partly_filled() -> None:
    config = parse(TEXT["mamba_nd"])
    assert [config.tokens_of(stage) for stage in config.train.curriculum] == [4 * 4 * 3, 5 * 4 * 4]
    text = parse("")
    assert text.tokens_of(text.train.curriculum[0]) == 4096


def test_showing_a_config_of_grids_loads_no_torch() -> None:
    code = (
        "import sys; from xdist.config import parse, to_toml; "
        f"assert parse(to_toml(parse({TEXT['vdt']!r}))) == parse({TEXT['vdt']!r}); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
