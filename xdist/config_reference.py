"""The reference table of every setting, made from the model: `python -m xdist.config_reference`.

docs/config.md is this program's output; a test compares the two.
"""

from __future__ import annotations

from typing import Any, get_args

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel

from xdist.config import Config, Stage
from xdist.config_section import Section
from xdist.config_text import toml_value

_HEAD = """# Settings

One TOML file describes a run; every section and key may be left out. `xdist show CONFIG` prints
the file as resolved, `key=value` arguments replace single values
(`train.curriculum.0.steps=5`, `model.window=none`), and every command refuses unknown keys, wrong
types and impossible combinations with all errors at once, before torch is loaded.

- A word that belongs to no TOML type stands for "not set": `"auto"` or `"none"`, as described.
- Whole numbers and decimals are told apart: `batch = 8.0` is an error, `eps = 1` is not.
- Lengths are those of whole sequences, over all their ranks; a batch is over all data ranks.
- ranks = data x ring x ulysses, and each stage's batch is a multiple of data.

This page is made from the model by `python -m xdist.config_reference > docs/config.md`.
"""


def _kind(annotation: Any, metadata: Any) -> str:
    """The type of a field in words, with its limits."""
    for item in getattr(annotation, "__metadata__", ()):
        return _kind(annotation.__origin__, (*annotation.__metadata__, *metadata)) if item else ""
    limits = []
    for item in [m for entry in metadata for m in (getattr(entry, "metadata", None) or [entry])]:
        for type_, sign, name in (
            (Ge, "≥", "ge"),
            (Gt, ">", "gt"),
            (Le, "≤", "le"),
            (Lt, "<", "lt"),
        ):
            if isinstance(item, type_):
                limits.append(f"{sign} {getattr(item, name)}")
        if isinstance(item, MinLen):
            limits.append(f"at least {item.min_length}")
    arguments = get_args(annotation)
    if getattr(annotation, "__origin__", None) is dict:
        text = "table"
    elif arguments and all(isinstance(argument, str) for argument in arguments):
        text = " or ".join(f'`"{argument}"`' for argument in arguments)
    elif getattr(annotation, "__origin__", None) is tuple:
        inner = _kind(arguments[0], ())
        text = f"list of {'tables' if arguments[0] is Stage else inner}"
        if arguments[-1] is not Ellipsis:
            text = f"{len(arguments)} of {inner}"
    elif type(None) in arguments:
        text = f"{_kind(arguments[0], ())} or a word"
    else:
        text = {int: "whole number", float: "number", str: "text", bool: "true or false"}[
            annotation
        ]
    return text + (f", {', '.join(limits)}" if limits else "")


def _row(key: str, model: type[BaseModel], name: str, default: Any) -> str:
    field = model.model_fields[name]
    cells = (
        f"`{key}`",
        _kind(field.annotation, field.metadata),
        f"`{toml_value(default)}`",
        field.description or "",
    )
    return "| " + " | ".join(cells) + " |"


def reference() -> str:
    """The page in Markdown."""
    lines = [_HEAD]
    defaults = Config().model_dump()
    for section, field in Config.model_fields.items():
        model = field.annotation
        assert isinstance(model, type)
        assert issubclass(model, Section)
        lines += [f"## {section}", "", model.__doc__ or "", ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        for name in model.model_fields:
            key = f"{section}.{name}"
            if (section, name) == ("train", "curriculum"):
                stage = Stage().model_dump()
                lines.append(
                    f"| `{key}` | list of tables, at least 1 | one stage | "
                    f"{model.model_fields[name].description} |"
                )
                lines += [_row(f"{key}.N.{item}", Stage, item, stage[item]) for item in stage]
            else:
                lines.append(_row(key, model, name, defaults[section][name]))
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference(), end="")
