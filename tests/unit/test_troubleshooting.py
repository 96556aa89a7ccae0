"""docs/troubleshooting.md speaks of what exists: messages, settings, pages, exit codes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xdist import errors
from xdist.config import Config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
ROOMS = ("xdist", "launchers", "kernels")
SOURCES = "".join(
    path.read_text("utf-8") for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))
)
# Strings of messages are cut over lines, and numbers are filled in.
FLAT = re.sub(r'"\s*\n\s*f?"', "", SOURCES)


def _rows() -> list[list[str]]:
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def _quoted_symptoms() -> list[str]:
    quotes = [text for row in _rows() for text in re.findall(r"`([^`]+)`", row[0])]
    return [text for text in quotes if " " in text and not text.startswith(("xdist ", "ray "))]


def test_the_page_quotes_messages() -> None:
    assert len(_quoted_symptoms()) > 15


@pytest.mark.parametrize("quote", _quoted_symptoms())
def test_a_quoted_message_is_one_that_the_code_makes(quote: str) -> None:
    parts = [part.strip() for part in re.split(r"\.\.\.|\b\d+\b", quote) if len(part.strip()) > 3]
    missing = [part for part in parts if part not in FLAT]
    assert parts, quote
    assert not missing, f"no message says {missing}"


def test_every_setting_it_names_exists() -> None:
    sections = set(Config.model_fields)
    names = re.findall(r"`([a-z]+)\.([a-z_]+)\b", PAGE)
    named = [(a, b) for a, b in names if a in sections]
    assert len(named) > 20
    for section, key in named:
        fields = Config.model_fields[section].annotation.model_fields
        assert key in fields, f"{section}.{key}"


def test_every_exit_code_has_a_symptom() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    codes = {getattr(kind, "exit_code", 1) for kind in kinds} - {1} | {75}
    symptoms = PAGE + " ".join(f"({row[0]})" for row in _rows())
    for code in sorted(codes):
        assert re.search(rf"\((?:\d, )?{code}\b", symptoms), f"no symptom of exit code {code}"


def test_every_page_it_links_is_there() -> None:
    for page in re.findall(r"\]\(([a-z_]+\.md)", PAGE):
        assert (ROOT / "docs" / page).is_file(), page
