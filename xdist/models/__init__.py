"""Whole models, one file each: config, blocks, model, initial values, FLOP count."""

from __future__ import annotations

import importlib
from typing import Any

from xdist.errors import ConfigError
from xdist.models import hybrid_lm, mixer_lm, transformers_lm
from xdist.models.grid_config import GridConfig
from xdist.models.hybrid_lm import HybridConfig, HybridLM
from xdist.models.mixer_lm import MixerConfig, MixerLM
from xdist.models.transformers_lm import TransformersConfig, TransformersLM

__all__ = [
    "GridConfig",
    "HybridConfig",
    "HybridLM",
    "MixerConfig",
    "MixerLM",
    "TransformersConfig",
    "TransformersLM",
    "build",
    "grid_kind",
    "sizes_of",
]

TokenSizes = HybridConfig | MixerConfig | TransformersConfig
# The sizes of each model of grids, in the file of its kind.
GRIDS = {"vdt": "VDTConfig", "mamba_nd": "MambaNDConfig", "axial": "AxialConfig"}


def sizes_of(section: Any, parallel: Any = None) -> Any:
    """The sizes of a config's section [model] (or of themselves); parallel: its section of
    strategies."""
    if isinstance(section, TokenSizes) or grid_kind(section):
        return section
    if section.kind in GRIDS:
        return getattr(_file(section.kind), GRIDS[section.kind]).of(section, parallel)
    if section.kind == "mixer_lm":
        return MixerConfig.of(section, parallel)
    if section.kind == "transformers":
        return TransformersConfig.of(section, parallel)
    return HybridConfig.of(section)


def grid_kind(sizes: Any) -> str:
    """The kind of a model of grids whose sizes these are; "" for any other."""
    named = {name: kind for kind, name in GRIDS.items()}
    return named.get(type(sizes).__name__, "")


def _file(kind: str) -> Any:
    """The file of a model of grids, loaded when one is asked for."""
    return importlib.import_module(f"xdist.models.{kind}")


def build(
    config: Any,
    *,
    precision: str | None = None,
    tile_tokens: int = 1024,
    seed: int | None = None,
    parallel: Any = None,
) -> Any:
    """The model of a config's section [model], or of its sizes.

    precision: dtype of the matrix products (None: that of the parameters); seed: of the initial
    values (None: torch's generator as it stands); the same on every rank. parallel: the config's
    section [parallel], whose strategies a mixer_lm or a model of transformers takes.

    Raises:
        ConfigError: sizes, options or a precision that the model cannot have.
    """
    sizes = sizes_of(config, parallel)
    if isinstance(sizes, HybridConfig):
        return hybrid_lm.build(sizes, precision=precision, tile_tokens=tile_tokens, seed=seed)
    if precision not in (None, sizes.dtype):
        kind = "model of transformers" if isinstance(sizes, TransformersConfig) else "mixer_lm"
        kind = grid_kind(sizes) or kind
        raise ConfigError(
            f"precision {precision!r} does not fit a {kind} with parameters in {sizes.dtype}",
            "it computes in the dtype of its parameters",
        )
    if isinstance(sizes, TransformersConfig):
        return transformers_lm.build(sizes, seed=seed)
    if grid_kind(sizes):
        return _file(grid_kind(sizes)).build(sizes, seed=seed)
    return mixer_lm.build(sizes, tile_tokens=tile_tokens, seed=seed)
