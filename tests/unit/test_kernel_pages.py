"""Every family of Triton kernels has a page with the parts that docs/kernels/index.md promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xdist_kernels.ahead import families

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("attention", "conv", "cross_entropy", "delta", "linear", "merge", "selective_scan")
PARTS = ["The algorithm", "Tiling", "Bytes and operations", "Precision", "Limits"]


def test_these_are_the_families() -> None:
    assert sorted(families()) == list(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_page_has_the_loop_tiling_bytes_and_operations_precision_and_limits(family: str) -> None:
    """In this order, none of them empty; pages may have other parts between them."""
    page = ROOT / "docs" / "kernels" / f"{family}.md"
    # Text before the first heading, then headings and what is below each in turn.
    pieces = re.split(r"^## (.+)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    headings, below = pieces[1::2], dict(zip(pieces[1::2], pieces[2::2], strict=True))
    assert [name for name in headings if name in PARTS] == PARTS
    loop = re.search(r"^```\n(.+?)^```$", below["The algorithm"], re.DOTALL | re.MULTILINE)
    assert loop is not None
    assert re.search(r"\bfor (each )?\w+", loop[1])
    costs = below["Bytes and operations"]
    assert "bytes" in costs
    assert re.search(r"FLOP|operations|exponentials", costs)
    assert "|" in costs  # a table
    assert "float32" in below["Precision"]
    assert re.search(r"^- ", below["Limits"], re.MULTILINE)
