"""Rows of a measurement that takes several calls: kept in a dated JSON file, never made twice.

A command such as `make gpu-linear` measures rows one by one, in a process that gpu_supervisor.py
watches. After each of them JSON and table are written, so a command that was cut (a lease that
ended, a time limit, a fault on the card) goes on where it stopped when it is called again. Rows
count as made only for the same kernels, measuring scripts, device, card, versions and rivals:
numbers of two programs never stand in one table.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu_key
import gpu_rivals
import record

# No row begins later; a command ends within a minute of it (gpu_supervisor.py).
MINUTES = 8.0
# The longest that one row may take: the first of a kernel compiles it, a rival may tune itself.
ROW_SECONDS = 120.0
# A row that failed is tried once more, by a later call.
MOST_TRIES = 2
# A worker's exit code: its row is recorded, and nothing more can run in its process.
ANEW = 75
# Columns of the JSON that no table shows.
_UNSHOWN = ("group", "card lost", "ended", "tries", "run")
RIVALS = "rivals"
Row = dict[str, Any]


@dataclass
class Options:
    """What the command line of every measurement holds.

    small: tiny shapes, for the interpreter. until: seconds since the epoch after which no row
    begins. again: measure finished rows too. rows: only keys with one of these. row_s: the longest
    that a row may take. run: the name of the call that this process works for, "" where it works
    for none; tell: a file descriptor on which it says what it does.
    """

    device: str
    small: bool
    folder: Path
    until: float
    again: bool = False
    rows: tuple[str, ...] = ()
    row_s: float = ROW_SECONDS
    run: str = ""
    tell: int | None = None


def options(description: str | None, argv: Sequence[str] | None = None) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny shapes, for the interpreter")
    parser.add_argument("--out", type=Path, default=record.FOLDER, help="folder of JSON and tables")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="no row begins after these")
    parser.add_argument(
        "--row-seconds", type=float, default=ROW_SECONDS, help="the longest that one row may take"
    )
    parser.add_argument("--again", action="store_true", help="measure finished rows again")
    parser.add_argument("--rows", nargs="*", default=(), help="only rows whose key holds one")
    # Of the processes that a command starts.
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    parser.add_argument("--tell", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    until = given.until or time.time() + 60 * given.minutes
    return Options(
        given.device, given.small, given.out, until, given.again, tuple(given.rows),
        given.row_seconds, given.run, given.tell,
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
    return ""


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
        self.machine = gpu_key.machine()
        # A machine with a card has the same versions and card where the interpreter runs.
        how = {"device": self.options.device, "shapes": "small" if self.options.small else "full"}
        self.key = gpu_key.key(self.name, self.machine) | how
        self.commit = record.commit()
        self.left: list[str] = []
        self.finished = False
        # Of rows that are made anew: how often each was tried before.
        self.tries: dict[tuple[str, str], int] = {}
        self.run = self.options.run or datetime.datetime.now(datetime.UTC).isoformat()
        self.date = datetime.datetime.now(datetime.UTC).date().isoformat()
        self._go_on()
        self._tell(table=str(self.write().with_suffix(".json")))
        self._try_rivals()

    def _go_on(self) -> None:
        """Takes over the rows of the newest file of the same key, but for those to make anew."""
        for path in sorted(self.options.folder.glob(f"{self.name}-????-??-??.json"), reverse=True):
            try:
                before = json.loads(path.read_text("utf-8"))
            except ValueError as error:
                print(f"{path} cannot be read ({error}): nothing is taken over from it")
                continue
            if before.get("key") != self.key:
                continue
            if before["finished"] and before["date"] != self.date:
                continue
            # Of rows that a worker of this call, lost since, was to make.
            self.tries = {(group, case): count for group, case, count in before["tries"]}
            self.rows = [row for row in before["rows"] if not self._anew(row)]
            self.date = before["date"]
            return
        self._set_aside()

    def _set_aside(self) -> None:
        """Today's rows of another key get a name of their own: nothing measured is written over."""
        for suffix in (".json", ".md"):
            path = self.options.folder / f"{self.name}-{self.date}{suffix}"
            if path.exists():
                made = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
                path.replace(path.with_stem(f"{path.stem}-until-{made:%H%M%S}"))

    def _anew(self, row: Row) -> bool:
        """Whether a row of an earlier call is made again by this one."""
        if row.get("run") == self.run:
            return False
        if row["group"] == RIVALS and "remark" in row and not row.get("ended"):
            # What it lacked may be here now; to ask again costs an import.
            return True
        if not self._wanted(row["group"], row["case"]):
            return False
        if self.options.again:
            return True
        again = bool(row.get("failed") or row.get("ended")) and row["tries"] < MOST_TRIES
        if again:
            self.tries[row["group"], row["case"]] = row["tries"]
        return again

    def _wanted(self, group: str, key: str) -> bool:
        wanted = self.options.rows
        return not wanted or any(part in f"{group} {key}" for part in wanted)

    def _try_rivals(self) -> None:
        """One row a rival: its version, or why it is not here.

        A package built for another torch may end the process that imports it: such a row is on
        record then, and nothing imports that package again.
        """
        for name in gpu_rivals.RIVALS:
            row = self._measured(RIVALS, name, lambda n=name: gpu_rivals.row(n), theirs=True)
            if row is None or "remark" in row:
                gpu_rivals.refuse(name, "not tried yet" if row is None else row["remark"])

    def measure(
        self, group: str, key: str, make: Callable[[], Row], *, theirs: bool = False
    ) -> Row | None:
        """The row `key` of `group`: as kept, or made now by `make`; None: no time is left for it.

        What `make` returns are the row's columns. Memory that does not suffice is a finding, kept
        in the row's "remark"; any other exception too, which fails the command in the end unless
        the row is `theirs`, of a rival.
        """
        return self._measured(group, key, make, theirs) if self._wanted(group, key) else None

    def _measured(self, group: str, key: str, make: Callable[[], Row], theirs: bool) -> Row | None:
        for row in self.rows:
            if (row["group"], row["case"]) == (group, key):
                return row
        if time.time() > self.options.until:
            self.left.append(f"{group}: {key}")
            return None
        began = time.time()
        row = {"group": group, "case": key}
        about = {"tries": self.tries.get((group, key), 0) + 1, "run": self.run}
        self._tell(begin={**row, **about}, theirs=theirs)
        row |= self._made(make, theirs) | about
        self.rows.append(row)
        self.write()
        self._tell(end=True)
        told = {name: value for name, value in row.items() if name not in (*_UNSHOWN, "case")}
        said = ", ".join(f"{name} {_cell(value)}" for name, value in told.items())
        print(f"{group}: {key} ({time.time() - began:.1f} s) {said}", flush=True)
        if row.get("card lost") and self.options.tell is not None:
            sys.stderr.flush()
            os._exit(ANEW)
        return row

    def _tell(self, **what: Any) -> None:
        """Says to the process that watches this one what is done now."""
        if self.options.tell is not None:
            os.write(self.options.tell, json.dumps(what).encode() + b"\n")

    def of(self, group: str) -> list[Row]:
        """The rows of a group so far."""
        return [row for row in self.rows if row["group"] == group]

    def derive(self, group: str, rows: list[Row]) -> None:
        """Makes `rows` (each with its "case") the whole of a group that is computed from others."""
        self.rows = [row for row in self.rows if row["group"] != group]
        self.rows += [{"group": group, **row} for row in rows]

    def _made(self, make: Callable[[], Row], theirs: bool) -> Row:
        cuda = self.options.device == "cuda"
        try:
            if cuda:
                import torch

                gc.collect()
                torch.cuda.empty_cache()
            row = make()
            if cuda:
                # What a kernel of this row did is told in this row.
                torch.cuda.synchronize()
            return row
        except Exception as error:
            loaded = sys.modules.get("torch")
            if loaded is not None and isinstance(error, loaded.OutOfMemoryError):
                return {"remark": f"out of memory: {gpu_rivals.first_line(error)}"}
            remark = f"{type(error).__name__}: {gpu_rivals.first_line(error)}"
            # A fault inside a kernel leaves the CUDA context of this process unusable.
            lost = cuda and gpu_rivals.lost()
            row = (
                {"remark": remark, "ended": True} if theirs else {"remark": remark, "failed": True}
            )
            return row | ({"card lost": True} if lost else {})

    def write(self) -> Path:
        """Writes JSON and table as they are now, each at once; returns the table's path."""
        folder = self.options.folder
        folder.mkdir(parents=True, exist_ok=True)
        whole = {
            "title": self.title,
            "command": self.command,
            "date": self.date,
            "commit": self.commit,
            "key": self.key,
            "machine": self.machine,
            "finished": self.finished,
            "left": self.left,
            "notes": self.notes,
            "tries": [[*key, count] for key, count in self.tries.items()],
            "rows": self.rows,
        }
        stem = folder / f"{self.name}-{self.date}"
        put(stem.with_suffix(".json"), json.dumps(whole, indent=1) + "\n")
        path = stem.with_suffix(".md")
        put(path, self._page())
        return path

    def _page(self) -> str:
        lines = [f"# {self.title}", ""]
        for group, heading in (self.headings | {RIVALS: "Rivals"}).items():
            if rows := self.of(group):
                lines += [f"## {heading}", "", *_table(rows), ""]
        lines += [f"{note}\n" for note in self.notes]
        rivals = {row["case"]: row for row in self.of(RIVALS)}
        absent = {name: rivals.get(name, {}).get("remark") for name in gpu_rivals.RIVALS}
        named = ", ".join(f"{name} ({why})" for name, why in absent.items() if why)
        here = ", ".join(
            f"{name} {row['version']}" for name, row in rivals.items() if "version" in row
        )
        lines.append(f"Rivals here: {here or 'none'}. Absent: {named or 'none'}.")
        if self.left:
            lines.append(f"Not measured yet ({len(self.left)}): {'; '.join(self.left)}.")
        described = "; ".join(f"{name} {value}" for name, value in self.machine.items())
        commit = self.commit or "of a plain copy"
        lines += [
            "",
            f"`{self.command}`, {self.date}, on {self.options.device}, commit {commit}, "
            f"sources {self.key['code']}, scripts {self.key['scripts']}.",
            f"{described}.",
        ]
        return "\n".join(lines) + "\n"

    def finish(self) -> int:
        """Writes what is left, and says it; 1 where a row failed, else 0."""
        self.finished = not self.left and not self.options.rows
        path = self.write()
        failed = [f"{row['group']}: {row['case']}" for row in self.rows if row.get("failed")]
        if self.left:
            print(f"the time is up; `{self.command}` again goes on with the rest")
        for name in failed:
            print(f"FAILED {name}")
        print(f"wrote {path}", flush=True)
        code = 1 if failed else 0
        self._tell(finished=code)
        return code


def put(path: Path, text: str) -> None:
    """Writes the file as a whole or not at all: whoever writes may be ended at any time."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def summary(path: Path, run: str) -> str:
    """What a call made and what it found made, counted in the JSON at `path`."""
    whole = json.loads(path.read_text("utf-8"))
    rows = [row for row in whole["rows"] if "run" in row]
    made = sum(row["run"] == run for row in rows)
    failed = sum(bool(row.get("failed")) for row in rows)
    return (
        f"{made} rows measured, {len(rows) - made} kept, {len(whole['left'])} left, "
        f"{failed} failed, in {path.with_suffix('.md')}"
    )


def _table(rows: list[Row]) -> list[str]:
    keys: list[str] = []
    for row in rows:
        keys += [key for key in row if key not in keys and key not in _UNSHOWN]
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
