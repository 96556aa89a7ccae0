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


_INTRODUCTION = """\
# Compiled kernels

Made by `make ahead` on a machine without a GPU: every Triton kernel, compiled as on a card. The
wrappers can start kernels with more sets of constants than can be compiled. Compiled are those of
the calls that a family lists (`cases()`), and of many more calls (`variants()`) those launches that
the ones before do not cover. A launch is covered where, among the compiled ones of its kernel and
target,

- each of its blocks stands in one with its dtypes (16 or 32 bits; float32 in full or as three TF32
  products), and in one with its kind of decay;
- its other sizes, warps and stages stand in one with its dtypes;
- each exact head dim lies in its blocks as in one: it fills one or several, or fills them in part,
  where 16 divides it or not;
- each two of its options, arguments left out and widths of arguments stand in one together (each
  by itself where the kernel multiplies no matrices);
- one of its dtypes and decay has no smaller size and no fewer stages: it bounds the shared memory.

So a head dim of 96, say, is covered by rows of 128 and of 80. Lengths, strides and addresses are
those that 16 divides, with which most bytes move at once. Each launch that the wrappers can make is
covered: a test draws calls of all sizes, head dims, dtypes and options.

A program has at most {limits} of shared memory. A kernel *spills* where a thread keeps values in
local memory because its registers do not suffice: those stand by themselves below, each with its
bytes a thread: all of its local memory, also arrays that the compiler put there (`spilled_bytes` in
compiled.json). `matrix` names the instructions used: `wgmma` are Hopper's, `mma` those of every
card since Ampere; float32 products that must keep float32's precision use none. compiled.json
beside this page has a row for each configuration. Times need a card: [measuring](measuring.md).

Triton {version}, {rows} configurations.\
"""


def _page(rows: list[Row], targets: Mapping[str, Target]) -> str:
    limits = ", ".join(f"{t.shared_bytes >> 10} KiB on {name}" for name, t in targets.items())
    lines = [_INTRODUCTION.format(limits=limits, version=version("triton"), rows=len(rows))]
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
