"""The TOML scanner and writer against tomllib, on drawn texts."""

from __future__ import annotations

import tomllib
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from xdist.config_text import key_lines, toml_text, toml_value

TEXT = '''\
# a comment with [brackets] and "quotes"
title = "a # is no comment" # but this is
"quoted key".x = 1

[owner]
name = """
several
lines with "quotes" and \\""" escaped ones""""
raw = \'\'\'
it's [raw] = 3\'\'\'
after = 1
dates = [ 1979-05-27, 07:32:00 ]

[a.b]
list = [
  1, # first
  [2, 3],
  "]", { x = 1, y.z = [4] },
]
inline = { p = 1, q = { r = 'a}' }, s = [] }

[[a.items]]
n = 1
[a.items.sub]
m = 1
[[a.items]]
n = 2
[a.items.sub]
m = 2
'''


def test_lines_of_every_kind_of_key() -> None:
    lines = key_lines(TEXT)
    rows = TEXT.splitlines()

    def row(*path: Any) -> str:
        return rows[lines[path] - 1]

    assert row("title").startswith("title")
    assert row("quoted key", "x").startswith('"quoted key"')
    assert row("owner") == "[owner]"
    assert row("owner", "after") == "after = 1"
    assert row("owner", "dates").startswith("dates")
    assert row("a", "b") == "[a.b]"
    assert row("a", "b", "list", 0) == "  1, # first"
    assert row("a", "b", "list", 1, 1) == "  [2, 3],"
    assert row("a", "b", "list", 3, "y", "z").strip().startswith('"]"')
    assert row("a", "b", "inline", "q", "r").startswith("inline")
    assert row("a", "items", 0, "n") == "n = 1"
    assert row("a", "items", 0, "sub", "m") == "m = 1"
    assert row("a", "items", 1, "n") == "n = 2"
    assert row("a", "items", 1, "sub", "m") == "m = 2"


def _paths(value: Any, path: tuple[Any, ...] = ()) -> set[tuple[Any, ...]]:
    """Every path of a parsed tree, items of lists included."""
    found = {path} if path else set()
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            found |= _paths(item, (*path, key))
    return found


def test_every_path_of_the_tree_has_a_line() -> None:
    assert _paths(tomllib.loads(TEXT)) <= set(key_lines(TEXT))


SCALARS = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
)
KEYS = st.from_regex(r"[A-Za-z0-9_-]{1,8}", fullmatch=True)
ITEMS = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, st.dictionaries(KEYS, ITEMS, max_size=4), max_size=3))
def test_written_text_reads_back_and_every_path_has_its_line(tree: dict[str, Any]) -> None:
    text = toml_text(tree)
    assert tomllib.loads(text) == tree
    lines = key_lines(text)
    assert _paths(tree) == set(lines)
    rows = text.split("\n")
    for section, values in tree.items():
        for key in values:
            assert rows[lines[section, key] - 1].startswith(f"{key} = ")


def test_values_without_a_toml_form_are_refused() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        toml_value(None)
