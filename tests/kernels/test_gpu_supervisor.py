"""A command on a card ends in time and measures what it can, whatever one of its rows does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

TOY = Path(__file__).with_name("gpu_toy_command.py")


class Toy:
    """Runs gpu_toy_command.py; what it wrote and tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tries = folder / "tries"

    def start(self, rows: str, *options: str) -> subprocess.Popen[str]:
        self.tries.write_text("")
        return subprocess.Popen(
            [sys.executable, TOY, "--out", self.folder / "out", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TOY_TRIES": str(self.tries), "TOY_ROWS": rows},
        )

    def run(self, rows: str, *options: str) -> tuple[int, str]:
        """Its exit code and its last line."""
        process = self.start(rows, *options)
        said, errors = process.communicate(timeout=120)
        lines = said.strip().splitlines()
        assert lines, errors
        return process.returncode, lines[-1]

    def tried(self) -> list[str]:
        return [line.rpartition(" ")[0] for line in self.tries.read_text().splitlines()]

    def pid(self) -> int:
        """Of the worker that tried the last row, once it did."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if lines := self.tries.read_text().splitlines():
                return int(lines[-1].rpartition(" ")[2])
            time.sleep(0.02)
        pytest.fail("no row was tried")

    @property
    def json(self) -> Path:
        (path,) = (self.folder / "out").glob("*.json")
        return path

    def rows(self) -> dict[str, dict[str, Any]]:
        found = json.loads(self.json.read_text("utf-8"))["rows"]
        return {row["case"]: row for row in found if row["group"] == "time"}


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


def _gone(pid: int) -> bool:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        # A zombie holds no card; whoever adopted it will read its code.
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_a_row_that_hangs_crashes_or_breaks_the_card_is_recorded_and_the_next_goes_on(
    toy: Toy,
) -> None:
    code, last = toy.run("crash,fault,hang theirs,raises,fine", "--row-seconds", "1.0")
    assert code == 1
    # Rows of rivals that are not installed count as measured.
    assert last.startswith("gpu-toy: 9 rows measured, 0 kept, 0 left, 3 failed, in ")
    assert Path(last.partition(", in ")[2]).exists()
    rows = toy.rows()
    assert list(rows) == ["crash", "fault", "hang theirs", "raises", "fine"]
    assert "SIGSEGV at gpu_toy_command.py:" in rows["crash"]["remark"] or (
        "SIGSEGV at __init__.py:" in rows["crash"]["remark"]  # inside ctypes
    )
    assert "Triton Error [CUDA]: an illegal memory access" in rows["fault"]["remark"]
    assert rows["fault"]["card lost"]
    assert rows["hang theirs"]["remark"].startswith("no end after 1 s at gpu_toy_command.py:")
    assert rows["hang theirs"]["remark"].endswith(", in hang")
    assert "failed" not in rows["hang theirs"]
    assert rows["raises"]["remark"] == "ZeroDivisionError: division by zero"
    assert rows["fine"]["ms"] == 1.5
    assert all(rows[name].get("failed") for name in ("crash", "fault", "raises"))


@pytest.mark.slow
def test_a_later_call_tries_a_row_once_more_and_then_keeps_it(toy: Toy) -> None:
    names = "quit,hang,full,raises,fine"
    assert toy.run(names, "--row-seconds", "1.0")[0] == 1
    assert toy.tried() == names.split(",")
    assert toy.rows()["quit"]["remark"] == "ended with code 9: the driver says no"
    code, last = toy.run(names, "--row-seconds", "1.0")
    # Memory that does not suffice is a finding: it is not tried again.
    assert toy.tried() == ["quit", "hang", "raises"]
    assert code == 1
    # Rivals that are not here are looked for each time.
    assert last.startswith("gpu-toy: 7 rows measured, 2 kept, 0 left, 3 failed, in ")
    code, last = toy.run(names, "--row-seconds", "1.0")
    assert toy.tried() == []
    assert code == 1, "what failed is still there"
    assert "3 failed" in last
    # A word of the user's gives one of them another chance.
    assert toy.run(names, "--row-seconds", "1.0", "--again", "--rows", "quit")[0] == 1
    assert toy.tried() == ["quit"]
    assert set(toy.rows()) == set(names.split(",")), "the other rows are kept"


@pytest.mark.slow
def test_when_the_time_is_up_a_row_is_cut_and_left_and_the_page_is_written(toy: Toy) -> None:
    began = time.monotonic()
    code, last = toy.run("fine,hang,fine 2", "--minutes", "0.08")
    assert time.monotonic() - began < 25
    assert code == 0, "nothing failed"
    assert " 2 left, 0 failed" in last
    assert list(toy.rows()) == ["fine"]
    page = toy.json.with_suffix(".md").read_text("utf-8")
    assert "time: hang; time: fine 2" in page


def test_what_breaks_outside_of_a_row_ends_the_command_with_code_2(toy: Toy) -> None:
    code, last = toy.run("outside,fine")
    assert code == 2
    assert "BROKE OFF: the worker ended outside of a row: ended with code 1: KeyError" in last
    assert toy.tried() == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_ends_with_the_command(toy: Toy, number: signal.Signals) -> None:
    process = toy.start("hang")
    worker = toy.pid()
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert _gone(worker)
