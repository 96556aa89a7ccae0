"""The tables in docs/grids/placement.md are what its own lines print."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "grids" / "placement.md"
PRINTED = re.compile(r"```python\n((?:(?!```).)*)```\n\n```text\n(.*?)```", re.DOTALL)


def test_the_page_prints_what_it_says() -> None:
    """The placement, and the predictions for 8 and 64 GPUs."""
    found = PRINTED.findall(PAGE.read_text(encoding="utf-8"))
    assert len(found) == 2
    for code, said in found:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, {})
        assert out.getvalue() == said
