"""The table of compiled kernels: compiled.json for programs, compiled.md for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xdist_kernels.launch import Target

Row = dict[str, Any]
NAME = "compiled"


def read(folder: Path, *, any_triton: bool = False) -> dict[str, Row]:
    """Rows by key; none where there is no table, or where another Triton compiled it (unless any
    may have)."""
    path = folder / f"{NAME}.json"
    if not path.exists():
        return {}
    whole = json.loads(path.read_text("utf-8"))
    if not any_triton and whole["triton"] != version("triton"):
        return {}
    return {row["key"]: row for row in whole["rows"]}


def write(folder: Path, rows: Iterable[Row], targets: Mapping[str, Target]) -> None:
    """Writes both files; rows in the order of family, case and kernel."""
    rows = sorted(rows, key=lambda row: (row["family"], row["case"], row["kernel"], row["target"]))
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "triton": version("triton"),
        "shared_bytes": {name: target.shared_bytes for name, target in targets.items()},
        "rows": rows,
    }
    head, tail = json.dumps({**whole, "rows": []}, indent=1).split("[]")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    text = f"{head}[\n{lines}\n ]{tail}\n"
    (folder / f"{NAME}.json").write_text(text, encoding="utf-8")
    (folder / f"{NAME}.md").write_text(_page(rows, targets), encoding="utf-8")


def _page(rows: list[Row], targets: Mapping[str, Target]) -> str:
    limits = ", ".join(f"{t.shared_bytes >> 10} KiB on {name}" for name, t in targets.items())
    lines = [
        "# Compiled kernels",
        "",
        "Made by `make ahead` on a machine without a GPU: every Triton kernel, with every set of",
        "constants that its wrapper starts it with, compiled as it would be on a card. A program",
        f"has at most {limits} of shared memory. `spilled` is what a thread keeps in local memory",
        "because its registers do not suffice. `matrix` says which matrix instructions are used:",
        "`wgmma` are Hopper's, `mma` those of every card since Ampere; float32 products that must",
        "keep float32's precision use none. Times need a card: [measuring](measuring.md).",
        "",
        f"Triton {version('triton')}.",
        "",
        *_summary(rows, targets),
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        lines += ["", f"## {family}", ""]
        lines += ["| case | kernel | target | warps, stages | KiB | registers | spilled | matrix |"]
        lines += ["|---|---|---|---|---|---|---|---|"]
        lines += [_line(row) for row in rows if row["family"] == family]
    return "\n".join(lines) + "\n"


def _summary(rows: list[Row], targets: Mapping[str, Target]) -> list[str]:
    """One line a family and target: how many, the most shared memory, how many spill."""
    lines = ["| family | target | kernels | most shared (KiB) | most registers | that spill |"]
    lines += ["|---|---|---|---|---|---|"]
    for family in dict.fromkeys(row["family"] for row in rows):
        for target in targets:
            own = [row for row in rows if (row["family"], row["target"]) == (family, target)]
            if not own:
                continue
            shared = max(row["shared_bytes"] for row in own) / 1024
            registers = max(row["registers"] for row in own)
            spill = sum(row["spilled_bytes"] > 0 for row in own)
            lines.append(
                f"| {family} | {target} | {len(own)} | {shared:.1f} | {registers} | {spill} |"
            )
    return lines


def _line(row: Row) -> str:
    cells = (
        row["case"],
        f"`{row['kernel']}`",
        row["target"],
        f"{row['warps']}, {row['stages']}",
        f"{row['shared_bytes'] / 1024:.1f}",
        row["registers"],
        row["spilled_bytes"],
        row["matrix"],
    )
    return f"| {' | '.join(str(cell) for cell in cells)} |"
