"""mkdocs hook: docs/claims.md shows docs/claims.toml as a table, so neither can drift."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

MARK = "<!-- claims -->"


def claims_table(path: Path) -> str:
    """All claims of a file as one markdown table: the promise, and what shows it."""
    rows = ["| promise | shown by |", "|---|---|"]
    for claim in tomllib.loads(path.read_text(encoding="utf-8"))["claim"]:
        shown = [f"`{test.removeprefix('tests/')}`" for test in claim.get("tests", [])]
        shown += [
            f"[{claim[key]}]({claim[key].removeprefix('docs/').partition('#')[0]})"
            for key in ("benchmark", "docs")
            if key in claim
        ]
        promise = claim["promise"].replace("|", "\\|")
        rows.append(f"| {promise} | {'<br>'.join(shown)} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, *, config: dict[str, Any], **_: Any) -> str:
    """Called by mkdocs for each page."""
    if MARK not in markdown:
        return markdown
    return markdown.replace(MARK, claims_table(Path(config["docs_dir"]) / "claims.toml"))
