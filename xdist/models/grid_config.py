"""What the sizes of every model of grids have in common, and how they are read from a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any, ClassVar, Self, get_type_hints

import torch

from xdist.errors import ConfigError

# Of parameters, and of a residual stream.
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
# Keys of the section [model] that a model of grids reads if it has a field of that name.
KEYS = (
    "sizes", "patch", "channels", "classes", "depth", "dim", "head_dim", "mlp_ratio", "dtype",
    "recompute",
)  # fmt: skip


@dataclass(frozen=True)
class GridConfig:
    """Sizes of a model whose samples are grids `[B, S1..Sk, channels]`.

    A model adds fields of its own behind these: they are what `model.options` may name. A field
    that is called as one of `KEYS` is read from there; strategy is `parallel.grid`.

    Raises:
        ConfigError: sizes and patch of different numbers of dims, or none at all; counts below 1;
            MLPs without a hidden channel; a dtype that is none of `dtypes`.
    """

    dtypes: ClassVar[tuple[str, ...]] = tuple(DTYPES)

    sizes: tuple[int, ...] = ()
    patch: tuple[int, ...] = ()
    channels: int = 1
    depth: int = 4
    dim: int = 96
    head_dim: int = 32
    mlp_ratio: float = 2.0
    recompute: bool = True
    dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        object.__setattr__(self, "patch", tuple(self.patch) or (1,) * len(self.sizes))
        if not self.sizes or len(self.patch) != len(self.sizes):
            raise ConfigError(
                "a model of grids needs sizes, and as many of a patch",
                f"sizes {self.sizes}, patch {self.patch}",
                "set model.sizes and model.patch",
            )
        self._at_least_one("sizes", "patch", "channels", "depth", "dim", "head_dim")
        self._whole("mlp_ratio", self.mlp_ratio, "hidden channels of the MLPs", exact=False)
        if self.dtype not in self.dtypes:
            raise ConfigError(
                f"{type(self).__name__}: dtype = {self.dtype!r} is no dtype of its parameters",
                f"it has {', '.join(self.dtypes)}",
                "set model.dtype to one of these",
            )

    def _at_least_one(self, *names: str) -> None:
        """Raise where a field of these is not a whole number of at least 1, or several of them."""
        for name in names:
            value = getattr(self, name)
            counts = value if isinstance(value, tuple) else (value,)
            if any(type(one) is not int or one < 1 for one in counts):
                raise ConfigError(
                    f"{type(self).__name__}: {name} = {value!r} cannot be built",
                    "it takes whole numbers of at least 1",
                    f"set {_key(name)}",
                )

    def _whole(self, name: str, factor: float, what: str, *, exact: bool = True) -> None:
        """Raise where `factor` times dim is not a number of channels."""
        width = factor * self.dim
        fits = isfinite(width) and round(width) >= 1
        if not fits or (exact and abs(width - round(width)) > 1e-6):
            raise ConfigError(
                f"{type(self).__name__}: {name} = {factor} gives no number of channels",
                f"{factor} x dim {self.dim} = {width:g} {what}",
                f"set {_key(name)} so that this is {'whole, and ' if exact else ''}at least 1",
            )

    @classmethod
    def of(cls, section: Any, parallel: Any = None) -> Self:
        """From the config's sections [model] and [parallel]."""
        own = {one.name for one in fields(cls)}
        values = {name: getattr(section, name) for name in KEYS if name in own}
        if parallel is not None and "strategy" in own:
            values["strategy"] = parallel.grid
        allowed = sorted(own - set(KEYS) - {"strategy"})
        return cls(**values, **_options(cls, section.options, allowed))

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens along each dim of a whole sample; the last patch of a dim may be partly filled."""
        return self.tokens_of(self.sizes)

    def tokens_of(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens along each dim of a sample, or of a crop, of these sizes."""
        return tuple(-(-size // patch) for size, patch in zip(sizes, self.patch, strict=True))

    @property
    def hidden(self) -> int:
        """Hidden width of the MLPs."""
        return round(self.mlp_ratio * self.dim)


def _key(name: str) -> str:
    """Where a config sets a field."""
    return f"model.{name}" if name in KEYS else f"model.options.{name}"


def _options(cls: type, given: Mapping[str, Any], allowed: list[str]) -> dict[str, Any]:
    """The model's own settings, each of the type of its field."""
    hints = get_type_hints(cls)
    for name, value in given.items():
        if name not in allowed:
            near = get_close_matches(name, allowed, 1)
            raise ConfigError(
                f"model.options.{name} is no setting of {cls.__name__}",
                f"it has {', '.join(allowed) or 'none of its own'}",
                f"did you mean {near[0]}?" if near else "leave it out",
            )
        wanted = hints[name]
        wide = (int, float) if wanted is float else wanted
        if isinstance(wanted, type) and (
            not isinstance(value, wide) or (isinstance(value, bool) and wanted is not bool)
        ):
            raise ConfigError(
                f"model.options.{name} = {value!r} is not of the type that {cls.__name__} has",
                f"it needs {wanted.__name__}",
            )
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
