"""Reading a config: TOML text and overrides in, a checked `Config` or every error at once out."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from xdist.config import Config
from xdist.config_checks import Problem, problems, raise_problems
from xdist.config_text import (
    Path,
    dotted,
    key_lines,
    override_value,
    read_toml,
    split_override,
    toml_text,
    toml_value,
)
from xdist.errors import ConfigError

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": 'text in quotes ("...")',
    "bool_type": "true or false",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "tuple_type": "a list, [ ... ]",
    "finite_number": "a finite number",
}
_LIMITS = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "too_short": "needs at least {min_length} item(s)",
    "too_long": "takes at most {max_length} item(s)",
    "string_pattern_mismatch": "must match {pattern}",
}
_TYPES = {bool: "true/false", int: "whole number", float: "number", str: "text", list: "list"}
_MEND = "correct it; docs/config.md lists every key with its type and default"


def load(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply `key=value` overrides, check everything.

    Raises ConfigError (or its GeometryError, StrategyError) that lists every error found, each
    with file and line, or the override it came from.
    """
    path = pathlib.Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not text in UTF-8", str(error), "save the file in UTF-8"
        ) from None
    except OSError as error:
        near = get_close_matches(path.name, _neighbours(path), 1, 0.4)
        raise ConfigError(
            f"cannot read the config {path}",
            error.strerror or str(error),
            f"did you mean {path.with_name(near[0])}?" if near else "give the path of a TOML file",
        ) from None
    return parse(text, str(path), overrides)


def _neighbours(path: pathlib.Path) -> list[str]:
    """TOML files in the folder of a file that is missing."""
    return [p.name for p in path.parent.glob("*.toml")] if path.parent.is_dir() else []


def parse(text: str, source: str = "config", overrides: Sequence[str] = ()) -> Config:
    """As `load`, from text; `source` is what messages call it."""
    tree = read_toml(text, source)
    where = {path: f"{source}:{line}" for path, line in key_lines(text).items()}
    return _build(tree, where, source, overrides)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """A copy of a config with `key=value` overrides applied and everything checked again."""
    return _build(_tree(config), {}, "config", overrides)


def to_toml(config: Config) -> str:
    """The whole config as TOML text; `parse` of it gives an equal config."""
    return toml_text(_tree(config))


def _tree(model: BaseModel) -> dict[str, Any]:
    return _plain(model.model_dump())


def _plain(value: Any) -> Any:
    """Tuples as lists, so that overrides can change items."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _frozen(value: Any) -> Any:
    """Lists as tuples: the model is strict and frozen."""
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value


def _build(
    tree: dict[str, Any], where: dict[Path, str], source: str, overrides: Sequence[str]
) -> Config:
    found = _apply(tree, where, overrides)
    bad: list[Path] = []
    config = None
    # Bad keys are dropped and the rest is read again, so that checks over several keys can run
    # on what is left and every error is listed at once.
    while config is None:
        try:
            config = Config.model_validate(_frozen(tree), context={"collecting": True})
        except ValidationError as error:
            items = error.errors(include_url=False)
            places = [tuple(item["loc"]) for item in items]
            for path, item in zip(places, items, strict=True):
                # A list whose items are wrong also counts as too short: the items say it.
                inside = any(other != path and other[: len(path)] == path for other in places)
                if item["type"] == "too_short" and inside:
                    continue
                found.append(_problem(path, item, where))
                bad.append(path)
            for path in bad:
                _drop(tree, path)
    for problem in problems(config):
        if not any(_overlap(key, path) for key in problem.keys for path in bad):
            found.append(_placed(problem, where))
    raise_problems(sorted(found, key=_place_order), source)
    return config


def _place_order(problem: Problem) -> tuple[str, int]:
    place = problem.where or problem.place
    source, _, line = place.rpartition(":")
    return (source, int(line)) if line.isdigit() else (place, 0)


def _overlap(a: Path, b: Path) -> bool:
    return a[: len(b)] == b or b[: len(a)] == a


def _drop(tree: Any, path: Path) -> None:
    """Remove the value at `path`; of a list's item or a section of the wrong type, all of it."""
    for depth, part in enumerate(path):
        # A bad item cannot be left out of a list without moving the others: the list goes.
        after = path[depth + 1] if depth + 1 < len(path) else None
        if not isinstance(tree, dict) or part not in tree:
            return
        if after is None or isinstance(after, int) or not isinstance(tree[part], dict):
            del tree[part]
            return
        tree = tree[part]


def _apply(tree: dict[str, Any], where: dict[Path, str], overrides: Sequence[str]) -> list[Problem]:
    """Write the overrides into the tree; what cannot be written is returned."""
    found: list[Problem] = []
    seen: set[Path] = set()
    for text in overrides:
        place = f"override {text!r}"
        try:
            path, raw = split_override(text)
            if path in seen:
                raise ConfigError(f"{dotted(path)} is overridden twice", "", "keep one of the two")
            seen.add(path)
            field = field_at(path)
            bare = field is not None and field.annotation is str and raw[:1] not in ("'", '"')
            _set(tree, path, raw if bare and raw else override_value(raw))
            where[path] = place
        except ConfigError as error:
            found.append(Problem((), error.what, error.why, error.do, where=place))
    return found


def _set(tree: dict[str, Any], path: Path, value: Any) -> None:
    """Set a value; a list that the file leaves to its default is filled in first."""
    node: Any = tree
    default: Any = _tree(Config())
    for depth, part in enumerate(path):
        last = depth + 1 == len(path)
        if isinstance(node, list):
            if not isinstance(part, int) or part >= len(node):
                raise ConfigError(
                    f"{dotted(path[:depth])} has no item {part}",
                    f"it has {len(node)} items, numbered from 0",
                    f"use {dotted(path[:depth])}.{max(len(node) - 1, 0)}, or give the whole list",
                )
        elif not isinstance(node, dict):
            raise ConfigError(
                f"{dotted(path[:depth])} is one value, not a section",
                f"it is {toml_value(node)}",
                f"set it with {dotted(path[:depth])}=...",
            )
        else:
            part = str(part)
            default = default.get(part, {}) if isinstance(default, dict) else {}
            if part not in node and not last:
                node[part] = {} if isinstance(default, dict) else default
        if last:
            node[part] = value
        else:
            node = node[part]


def field_at(path: Path) -> Any | None:
    """The pydantic field of a path, None when there is none; list items have their list's."""
    model: type[BaseModel] | None = Config
    field = None
    for part in path:
        if isinstance(part, int):
            continue
        if model is None or part not in model.model_fields:
            return None
        field = model.model_fields[part]
        model = _model_of(field.annotation)
    return field


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section type inside an annotation such as `tuple[Stage, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((m for arg in get_args(annotation) if (m := _model_of(arg))), None)


def all_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every key as `section.name`; items of lists of tables as `train.curriculum.N.steps`."""
    for name, field in model.model_fields.items():
        inner = _model_of(field.annotation)
        key = f"{prefix}{name}"
        if inner is None or prefix:
            yield key
        if inner is not None:
            yield from all_keys(inner, f"{key}.N." if prefix else f"{key}.")


def _suggest(path: Path) -> str:
    """The known key nearest to an unknown one: by spelling, or by name in another section."""
    sections = list(Config.model_fields)
    if len(path) == 1:
        near = get_close_matches(str(path[0]), sections, 1)
        owners = [k for k in all_keys() if k.endswith(f".{path[0]}")]
        return f"did you mean {(near or owners)[0]}?" if near or owners else ""
    key = ".".join("N" if isinstance(part, int) else part for part in path)
    known = list(all_keys())
    elsewhere = [k for k in known if k.rpartition(".")[2] == path[-1]]
    siblings = [k for k in known if k.rpartition(".")[0] == key.rpartition(".")[0]]
    by_name = {k.rpartition(".")[2]: k for k in siblings}
    near = [by_name[n] for n in get_close_matches(str(path[-1]), by_name, 1)]
    last = {k.rpartition(".")[2]: k for k in known}
    similar = [last[n] for n in get_close_matches(str(path[-1]), last, 1, 0.8)]
    near = near or elsewhere or similar
    if not near:
        return ""
    found, numbers = near[0], [str(part) for part in path if isinstance(part, int)]
    for number in numbers:
        found = found.replace(".N.", f".{number}.", 1)
    found = found.replace(".N.", ".0.")
    return f"did you mean {found}?"


def _locate(path: Path, where: Mapping[Path, str]) -> str:
    """The place of a path, or of the nearest section above it."""
    for depth in range(len(path), 0, -1):
        if path[:depth] in where:
            return where[path[:depth]]
    return ""


def _placed(problem: Problem, where: Mapping[Path, str]) -> Problem:
    """A cross-field problem at the first of its keys that the user wrote."""
    place = next((where[key] for key in problem.keys if key in where), "")
    return Problem(problem.keys, problem.what, problem.why, problem.do, problem.kind, place)


def _problem(path: Path, item: Any, where: Mapping[Path, str]) -> Problem:
    """One pydantic error in this project's words."""
    kind, value = item["type"], item.get("input")
    place = _locate(path, where)
    if kind == "extra_forbidden":
        return _unknown_key(path, place)
    key, field = dotted(path), field_at(path)
    why = f"{key}: {field.description}" if field is not None and field.description else ""
    is_plain = isinstance(value, (str, int, float, list, tuple))
    shown = toml_value(_plain(value)) if is_plain else "a table"
    do = _MEND
    if kind == "literal_error":
        choices = [str(choice) for choice in get_args(field.annotation)] if field else []
        near = get_close_matches(str(value), choices, 1)
        what = f"{key} cannot be {shown}" + (f"; did you mean {near[0]!r}?" if near else "")
        why = f"{key} is one of {', '.join(choices)}"
        return Problem((path,), what, why, do, where=place, brief=bool(near))
    if kind in _WANTED:
        got = next((name for type_, name in _TYPES.items() if isinstance(value, type_)), "list")
        what = f"{key} must be {_WANTED[kind]}, got {shown}" + (f" ({got})" if is_plain else "")
    elif kind == "missing":
        what = f"{key} is missing"
    elif kind in _LIMITS:
        what = f"{key} = {shown} {_LIMITS[kind].format(**item['ctx'])}"
    else:
        what = f"{key} = {shown}: {item['msg']}"
    return Problem((path,), what, why, do, where=place, brief=True)


def _unknown_key(path: Path, place: str) -> Problem:
    """A key or section that the model does not have."""
    parent = field_at(path[:-1]) if len(path) > 1 else None
    model = _model_of(parent.annotation) if parent is not None else Config
    names = ", ".join(model.model_fields) if model is not None else ""
    owner = f"[{dotted(path[:-1])}] has" if len(path) > 1 else "the sections are"
    # The place is part of this sentence: "unknown key sp.degre in train.toml:7; did you ...".
    at = f" in {place}" if place and not place.startswith("override") else ""
    hint = _suggest(path)
    what = f"unknown key {dotted(path)}{at}" + (f"; {hint}" if hint else "")
    why = f"{owner} {names}"
    return Problem(
        (path,), what, why, _MEND, where="" if at else place, brief=bool(hint), place=place
    )
