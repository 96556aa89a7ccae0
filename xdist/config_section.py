"""What every section of the settings is made of: frozen tables with described fields."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=0)]
# Positions along each dim of a grid.
Sizes = Annotated[tuple[Count, ...], Field(strict=True)]


def spelled(word: str) -> tuple[BeforeValidator, PlainSerializer]:
    """TOML has no null: None is written and read as `word`."""
    return (
        BeforeValidator(lambda value: None if value == word else value),
        PlainSerializer(lambda value: word if value is None else value),
    )


AUTO = spelled("auto")
NONE = spelled("none")


def setting(default: Any, description: str) -> Any:
    """A field with its default and its one-line description."""
    return Field(default=default, description=description)


class Table(dict[str, Any]):
    """A table whose keys another library checks. Not to be changed, so it can be hashed."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


class Section(BaseModel):
    """A table of settings: frozen, no unknown keys, no conversion between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
