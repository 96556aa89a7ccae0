"""Rows of a measurement that takes several calls: kept in a dated JSON file, never made twice.

A command such as `make gpu-linear` measures rows one by one. After each of them JSON and table are
written, so a command that was cut (a lease that ended, a time limit, a fault on the card) goes on
where it stopped when it is called again. Rows count as made only for the same kernels, card and
versions: numbers of two programs never stand in one table.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# `record` (benchmarks) and the files beside this one are modules of no package.
for _folder in (HERE, HERE.parent / "benchmarks"):
    if str(_folder) not in sys.path:
        sys.path.insert(0, str(_folder))

import gpu_rivals  # noqa: E402
import record  # noqa: E402

# A command should end within 9 minutes; only a last row longer than all before it can outrun that.
MINUTES = 8.0
# What a number depends on beside the sources; another host with the same card may go on.
DEPENDS = ("card", "driver", "torch", "triton")
Row = dict[str, Any]


@dataclass
class Options:
    """What the command line of every measurement holds.

    small: tiny shapes, for the interpreter. until: seconds since the epoch after which no row
    begins. again: measure finished rows too. kept: rows that failed are not tried again (set by a
    command that starts itself anew after a fault on the card). rows: only keys with one of these.
    """

    device: str
    small: bool
    folder: Path
    until: float
    again: bool = False
    kept: bool = False
    rows: tuple[str, ...] = ()


def options(description: str | None, argv: Sequence[str] | None = None) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for the interpreter")
    parser.add_argument("--out", type=Path, default=record.FOLDER, help="folder of JSON and tables")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no row begins after these")
    parser.add_argument("--again", action="store_true", help="measure finished rows again")
    parser.add_argument("--rows", nargs="*", default=(), help="only rows whose key holds one")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    until = given.until or time.time() + 60 * given.minutes
    return Options(
        given.device, given.small, given.out, until, given.again, given.until is not None,
        tuple(given.rows),
    )  # fmt: skip


def no_card(name: str, device: str) -> str:
    """Why nothing can be measured here, in one line; "" when it can.

    On the CPU the kernels run in Triton's interpreter, which is chosen before triton is imported.
    """
    if importlib.util.find_spec("torch") is None:
        return f"{name}: {sys.executable} has no torch, nothing measured (GPU_PYTHON names another)"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        return ""
    import torch

    if not torch.cuda.is_available():
        return f"{name}: torch {torch.__version__} sees no CUDA device here, nothing measured"
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    return ""


def sources() -> str:
    """A name for the code that is measured: eight digits of the hash of kernels/ and xdist/."""
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("kernels/**/*.py"), *ROOT.glob("xdist/**/*.py")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def machine() -> Row:
    """Card, driver, and the versions that a number depends on."""
    driver = ""
    try:
        found = subprocess.check_output(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            text=True,
            stderr=subprocess.DEVNULL,
        )
        driver = found.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "none"
    import torch

    return {
        **record.hardware(),
        "driver": driver,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "none",
        "triton": gpu_rivals.version("triton"),
    }


@dataclass
class Table:
    """The rows of one command; `measure` makes one, `finish` says what is left.

    name: of the files, "gpu-linear"; heading: of each group of rows, in their order. A row's
    columns are those of its group's first row.
    """

    name: str
    title: str
    command: str
    options: Options
    headings: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = machine()
        self.code = sources()
        self.commit = record.commit()
        self.left: list[str] = []
        self.finished = False
        self.longest_s = 0.0
        self.date = datetime.datetime.now(datetime.UTC).date().isoformat()
        if not self.options.again:
            self._go_on()

    def _go_on(self) -> None:
        """Takes over the rows of the newest file that the same code on the same machine wrote."""
        for path in sorted(self.options.folder.glob(f"{self.name}-????-??-??.json"), reverse=True):
            before = json.loads(path.read_text("utf-8"))
            same = all(before["machine"].get(key) == self.machine.get(key) for key in DEPENDS)
            if not same or before["code"] != self.code:
                continue
            if before["finished"] and before["date"] != self.date:
                continue
            kept = self.options.kept
            self.rows = [row for row in before["rows"] if kept or not row.get("failed")]
            self.date = before["date"]
            return

    def measure(self, group: str, key: str, make: Callable[[], Row]) -> Row | None:
        """The row `key` of `group`: as kept, or made now by `make`; None: no time is left for it.

        What `make` returns are the row's columns. Memory that does not suffice is a finding, kept
        in the row's "remark"; any other exception too, which fails the command in the end.
        """
        for row in self.rows:
            if (row["group"], row["case"]) == (group, key):
                return row
        wanted = self.options.rows
        if wanted and not any(part in f"{group} {key}" for part in wanted):
            return None
        began = time.time()
        if began + self.longest_s > self.options.until:
            self.left.append(f"{group}: {key}")
            return None
        row = {"group": group, "case": key, **self._made(make)}
        seconds = time.time() - began
        self.longest_s = max(self.longest_s, seconds)
        self.rows.append(row)
        self.write()
        told = {name: value for name, value in row.items() if name not in ("group", "case")}
        print(f"{group}: {key} ({seconds:.1f} s)", *(f"{n} {_cell(v)}" for n, v in told.items()))
        if row.get("card lost"):
            self._start_anew()
        return row

    def of(self, group: str) -> list[Row]:
        """The rows of a group so far."""
        return [row for row in self.rows if row["group"] == group]

    def derive(self, group: str, rows: list[Row]) -> None:
        """Makes `rows` (each with its "case") the whole of a group that is computed from others."""
        self.rows = [row for row in self.rows if row["group"] != group]
        self.rows += [{"group": group, **row} for row in rows]

    def _made(self, make: Callable[[], Row]) -> Row:
        import torch

        gc.collect()
        if self.options.device == "cuda":
            torch.cuda.empty_cache()
        try:
            return make()
        except torch.OutOfMemoryError as error:
            return {"remark": f"out of memory: {gpu_rivals.first_line(error)}"}
        except Exception as error:
            # A fault inside a kernel leaves the CUDA context of this process unusable.
            lost = self.options.device == "cuda" and gpu_rivals.fault(error)
            remark = f"{type(error).__name__}: {gpu_rivals.first_line(error)}"
            return {"remark": remark, "failed": True} | ({"card lost": True} if lost else {})

    def _start_anew(self) -> None:
        print(f"{self.name}: the card refused; going on in a new process", flush=True)
        rest = [a for a in sys.argv[1:] if a != "--again"]
        until = [] if self.options.kept else ["--until", str(self.options.until)]
        os.execv(sys.executable, [sys.executable, sys.argv[0], *rest, *until])

    def write(self) -> Path:
        """Writes JSON and table as they are now; returns the table's path."""
        folder = self.options.folder
        folder.mkdir(parents=True, exist_ok=True)
        whole = {
            "title": self.title,
            "command": self.command,
            "date": self.date,
            "commit": self.commit,
            "code": self.code,
            "machine": self.machine,
            "rivals": gpu_rivals.found(),
            "finished": self.finished,
            "left": self.left,
            "notes": self.notes,
            "rows": self.rows,
        }
        stem = folder / f"{self.name}-{self.date}"
        stem.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        path = stem.with_suffix(".md")
        path.write_text(self._page(whole), encoding="utf-8")
        return path

    def _page(self, whole: Row) -> str:
        lines = [f"# {self.title}", ""]
        for group, heading in self.headings.items():
            if rows := self.of(group):
                lines += [f"## {heading}", "", *_table(rows), ""]
        lines += [f"{note}\n" for note in self.notes]
        rivals = whole["rivals"].items()
        there = ", ".join(f"{name} {found}" for name, found in rivals if gpu_rivals.has(name))
        absent = ", ".join(f"{name} ({why})" for name, why in rivals if not gpu_rivals.has(name))
        lines.append(f"Rivals here: {there or 'none'}. Absent: {absent or 'none'}.")
        if self.left:
            lines.append(f"Not measured yet ({len(self.left)}): {'; '.join(self.left)}.")
        described = "; ".join(f"{name} {value}" for name, value in self.machine.items())
        commit = whole["commit"] or "of a plain copy"
        lines += [
            "",
            f"`{self.command}`, {self.date}, commit {commit}, sources {self.code}.",
            f"{described}.",
        ]
        return "\n".join(lines) + "\n"

    def finish(self) -> int:
        """Prints where the table is and what is left; 1 where a row failed, else 0."""
        self.finished = not self.left and not self.options.rows
        path = self.write()
        failed = [f"{row['group']}: {row['case']}" for row in self.rows if row.get("failed")]
        print(f"wrote {path}: {len(self.rows)} rows, {len(self.left)} left, {len(failed)} failed")
        if self.left:
            print(f"the time is up; `{self.command}` again goes on with the rest")
        for name in failed:
            print(f"FAILED {name}")
        return 1 if failed else 0


def _table(rows: list[Row]) -> list[str]:
    keys: list[str] = []
    for row in rows:
        keys += [key for key in row if key not in keys and key not in ("group", "card lost")]
    # Remarks are the exception: they stand last.
    keys = [key for key in keys if key != "remark"] + (["remark"] if "remark" in keys else [])
    lines = [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    return lines + [
        "| " + " | ".join(_cell(row.get(key, "")) for key in keys) + " |" for row in rows
    ]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if type(value) is int else str(value)
