"""mkdocs hooks: claims.md shows claims.toml as a table; a nav entry "folder/*" lists a folder."""

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


def on_config(config: dict[str, Any]) -> dict[str, Any]:
    """Called by mkdocs once: expands nav entries that end in "/*" to the folder's pages."""
    folder = Path(config["docs_dir"])
    for entry in config["nav"] or []:
        for title, pages in entry.items():
            if isinstance(pages, str) and pages.endswith("/*"):
                found = sorted((folder / pages[:-2]).glob("*.md"), key=_order)
                entry[title] = [path.relative_to(folder).as_posix() for path in found]
    return config


def _order(path: Path) -> tuple[bool, str]:
    return path.name != "index.md", path.name


def on_page_markdown(markdown: str, *, config: dict[str, Any], **_: Any) -> str:
    """Called by mkdocs for each page."""
    if MARK not in markdown:
        return markdown
    return markdown.replace(MARK, claims_table(Path(config["docs_dir"]) / "claims.toml"))
