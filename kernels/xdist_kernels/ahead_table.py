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
        "Made by `make ahead` on a machine without a GPU: every Triton kernel, with each set of",
        "constants of the calls that its family lists (`cases()`), compiled as on a card. A",
        f"program has at most {limits} of shared memory. A kernel *spills* where a thread keeps",
        "values in local memory because its registers do not suffice: those stand by themselves",
        "below, each with its bytes a thread: all of its local memory, also arrays that the",
        "compiler put there (`spilled_bytes` in compiled.json). `matrix` names the instructions",
        "used: `wgmma` are Hopper's, `mma` those of every card since Ampere; float32 products that",
        "must keep float32's precision use none. compiled.json beside this page has a row for each",
        "configuration. Times need a card: [measuring](measuring.md).",
        "",
        f"Triton {version('triton')}, {len(rows)} configurations.",
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        own = [row for row in rows if row["family"] == family]
        lines += ["", f"## {family}", "", *_by_kernel(own)]
        if spilling := [row for row in own if row["spilled_bytes"]]:
            lines += ["", "| spills | target | case | warps, stages | registers | bytes |"]
            lines += ["|---|---|---|---|---|---|", *map(_spill, spilling)]
    return "\n".join(lines) + "\n"


def _by_kernel(rows: list[Row]) -> list[str]:
    """One line a kernel and target: the range over its configurations."""
    lines = ["| kernel | target | configurations | warps | KiB | registers | spill | matrix |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for kernel, target in dict.fromkeys((row["kernel"], row["target"]) for row in rows):
        own = [row for row in rows if (row["kernel"], row["target"]) == (kernel, target)]
        cells = (
            f"`{kernel}`",
            target,
            len(own),
            _range(row["warps"] for row in own),
            _range(round(row["shared_bytes"] / 1024, 1) for row in own),
            _range(row["registers"] for row in own),
            sum(row["spilled_bytes"] > 0 for row in own),
            ", ".join(sorted({row["matrix"] for row in own})),
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return lines


def _range(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{found[0]}" if found[0] == found[-1] else f"{found[0]} to {found[-1]}"


def _spill(row: Row) -> str:
    cells = (
        f"`{row['kernel']}`",
        row["target"],
        row["case"],
        f"{row['warps']}, {row['stages']}",
        row["registers"],
        row["spilled_bytes"],
    )
    return f"| {' | '.join(str(cell) for cell in cells)} |"
