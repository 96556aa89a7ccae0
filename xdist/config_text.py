"""TOML as text: where each key stands, `key=value` overrides, and writing a tree back.

`tomllib` reads the values but keeps no positions, so `key_lines` walks the same (already valid)
text once more and notes the line of every key. Nothing here knows the settings themselves.
"""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

from xdist.errors import ConfigError

Path = tuple[str | int, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SPACE = " \t\r\n"


def dotted(path: Path) -> str:
    """`("train", "curriculum", 0, "steps")` as `train.curriculum.0.steps`."""
    return ".".join(str(part) for part in path)


def read_toml(text: str, source: str) -> dict[str, Any]:
    """Parse TOML text; a ConfigError names `source` and the line of a syntax error."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        found = re.search(r"\s*\(at line (\d+), column \d+\)", message)
        line = found.group(1) if found else str(text.count("\n") + 1)
        reason = re.sub(r"\s*\(at [^)]*\)", "", message)
        row = text.splitlines()[int(line) - 1].strip() if found else ""
        if "overwrite" in reason or "twice" in reason:
            what = f"{source}:{line}: a key or a section is given twice"
            do = "keep one of the two"
        else:
            what = f"{source}:{line}: not valid TOML"
            do = 'write key = value; text needs quotes ("..."), true and false are lower case'
            if "{" in row:
                do = "write a { ... } table on one line, its pairs separated by commas"
        raise ConfigError(what, f"{reason}: {row}" if row else reason, do) from None


class _Scanner:
    """Walks valid TOML text and records the line of each key path."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Path, int] = {}
        self.array_items: dict[Path, int] = {}

    def scan(self) -> dict[Path, int]:
        prefix: Path = ()
        while self._skip():
            if self.text.startswith("[[", self.at):
                self.at += 2
                path = self._resolve(self._key())
                index = self.array_items.get(path, -1) + 1
                self.array_items[path] = index
                self._note(path)
                prefix = (*path, index)
                self._note(prefix)
                self.at = self.text.index("]]", self.at) + 2
            elif self.text[self.at] == "[":
                self.at += 1
                prefix = self._resolve(self._key())
                self._note(prefix)
                self.at = self.text.index("]", self.at) + 1
            else:
                self._pair(prefix)
        return self.lines

    def _note(self, path: Path, above: int = 0) -> None:
        """Note this line for a path and for its parents below depth `above`, if they are new."""
        line = self.text.count("\n", 0, self.at) + 1
        for depth in range(above + 1, len(path) + 1):
            self.lines.setdefault(path[:depth], line)

    def _resolve(self, path: Path) -> Path:
        """Insert the index of the newest item after each name that is an array of tables."""
        out: Path = ()
        for position, part in enumerate(path):
            out = (*out, part)
            if out in self.array_items and position + 1 < len(path):
                out = (*out, self.array_items[out])
        return out

    def _skip(self, extra: str = "") -> bool:
        """Move past blanks, comments and the characters of `extra`; False at the end."""
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            elif char in _SPACE or char in extra:
                self.at += 1
            else:
                return True
        return False

    def _key(self) -> Path:
        parts: list[str | int] = []
        while True:
            self._skip()
            if self.text[self.at] in "\"'":
                start = self.at
                self._string()
                parts.append(tomllib.loads(f"k = {self.text[start : self.at]}")["k"])
            else:
                found = _BARE.match(self.text, self.at)
                assert found is not None, "the text was parsed before it was scanned"
                parts.append(found.group())
                self.at = found.end()
            self._skip()
            if self.text[self.at] != ".":
                return tuple(parts)
            self.at += 1

    def _pair(self, prefix: Path) -> None:
        self._skip()
        start = self.at
        path = (*prefix, *self._key())
        end, self.at = self.at, start
        self._note(path, len(prefix))
        self.at = self.text.index("=", end) + 1
        self._value(path)

    def _value(self, path: Path) -> None:
        self._skip()
        char = self.text[self.at]
        if char in "\"'":
            self._string()
        elif char == "{":
            self.at += 1
            while self._skip(",") and self.text[self.at] != "}":
                self._pair(path)
            self.at += 1
        elif char == "[":
            self.at += 1
            index = 0
            while self._skip(",") and self.text[self.at] != "]":
                self._note((*path, index))
                self._value((*path, index))
                index += 1
            self.at += 1
        else:
            while self.at < len(self.text) and self.text[self.at] not in ",]}#\n":
                self.at += 1

    def _string(self) -> None:
        quote = self.text[self.at]
        mark = quote * 3 if self.text.startswith(quote * 3, self.at) else quote
        self.at += len(mark)
        while not self.text.startswith(mark, self.at):
            self.at += 2 if quote == '"' and self.text[self.at] == "\\" else 1
        self.at += len(mark)
        # A multi-line string may end in one or two quotes of its own before the closing mark.
        while len(mark) == 3 and self.text.startswith(quote, self.at):
            self.at += 1


def key_lines(text: str) -> dict[Path, int]:
    """The line (from 1) of every key, section and list item of valid TOML text."""
    return _Scanner(text).scan()


def split_override(text: str) -> tuple[Path, str]:
    """`train.curriculum.0.steps=5` as its path and the text of its value."""
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(_BARE.fullmatch(part) for part in parts):
        raise ConfigError(
            "not of the form key=value",
            "a key is section.name, and a list's item is its number: train.curriculum.0.steps=5",
            "write section.name=value, without blanks around the equals sign",
        )
    return tuple(int(part) if part.isdigit() else part for part in parts), value.strip()


def override_value(text: str) -> Any:
    """A value in TOML syntax, or bare text; broken quotes or brackets raise a ConfigError."""
    try:
        tree = tomllib.loads(f"k = {text}\n")
        if tree.keys() == {"k"}:
            return tree["k"]
    except tomllib.TOMLDecodeError:
        pass
    if not text or text[0] in "[{\"'" or "\n" in text:
        raise ConfigError(
            f"{text!r} is not a TOML value",
            "quotes and brackets must close, and the value cannot be empty",
            "quote the whole override for the shell, e.g. 'certify.ranks=[1, 2]'",
        )
    return text


def toml_value(value: Any) -> str:
    """One value as TOML on one line: str, bool, int, float, list or tuple, dict (inline)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        pairs = (f"{key} = {toml_value(item)}" for key, item in value.items())
        return "{ " + ", ".join(pairs) + " }"
    raise TypeError(f"no TOML form for {type(value).__name__}")


def toml_text(tree: dict[str, dict[str, Any]]) -> str:
    """A two-level tree (section, key) as TOML text, lists of tables one item a line."""
    blocks = []
    for section, values in tree.items():
        lines = [f"[{section}]"]
        for key, value in values.items():
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
                rows = "".join(f"  {toml_value(item)},\n" for item in value)
                lines.append(f"{key} = [\n{rows}]")
            else:
                lines.append(f"{key} = {toml_value(value)}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
