"""compute-sanitizer of CUDA's toolkit over one short launch of every family of kernels.

memcheck: reads and writes outside of what was allocated, or not aligned. Each tensor is an
allocation of its own there, so that a kernel that leaves its tensor is seen. racecheck: two threads
of a program at one place of shared memory without a barrier between them. The tool's whole report
is kept beside the table where it found something.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_families

TOOLS = ("memcheck", "racecheck")
# In place of a program, where kernels run on no card.
NO_CARD = "no card"
_PLACES = (
    "/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/compute-sanitizer",
)  # fmt: skip
_FOUND = 86
_MOST_LOG = 1 << 20
# What stands at the head of one finding about a kernel, and of what the tool says of itself.
_FINDING = re.compile(r"^========= .*(?:Invalid __|Misaligned|Race reported|Barrier error)")
_SAID = re.compile(r"^========= .*[Ee]rror")
# "RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)", "ERROR SUMMARY: 1 error"
_SUMMARY = re.compile(
    r"^========= \w+ SUMMARY: (\d+) \w+(?: displayed \((\d+) errors?, (\d+) warnings?\))?", re.M
)


def program() -> str | None:
    """The path of compute-sanitizer, None where it is not."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{home}/bin", f"{home}/compute-sanitizer"] if home else []
    path = os.pathsep.join([os.environ.get("PATH", ""), *places, *_PLACES])
    return shutil.which("compute-sanitizer", path=path)


def row(
    tool: str, at: str | None, device: str, seconds: float, folder: Path, name: str
) -> dict[str, Any]:
    """What `tool` of the program `at` finds in `seconds`, as columns of a table.

    folder, name: where the report is kept, NAME-TOOL.log.
    """
    if at == NO_CARD:
        return {"remark": "the kernels run on no card here"}
    if at is None:
        return {"remark": "compute-sanitizer is not installed (it comes with CUDA's toolkit)"}
    command = [at, "--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "100"]
    # Another kernel's finding is worth more than the end at the first; ptxas is not ours to check.
    command += ["--destroy-on-device-error", "kernel", "--target-processes", "application-only"]
    if tool == "memcheck":
        # What torch asks of the driver and is refused is no finding about a kernel.
        command += ["--report-api-errors", "no"]
    command += [sys.executable, str(Path(gpu_families.__file__).resolve()), "--device", device]
    # The tool ends with the program that it watches, and that with this process.
    command += ["--seconds", str(max(1, int(seconds))), "--beside", str(os.getpid())]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile() as log:
        # A file, not a pipe: whoever holds a pipe's other end keeps its reader waiting.
        running = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        began = time.monotonic()
        try:
            code: int | None = running.wait(seconds + 15.0)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
            code = None
        log.seek(0)
        text = log.read(_MOST_LOG).decode(errors="replace")
    found = judged(text, code, late=time.monotonic() - began > seconds - 1.0)
    if "remark" in found:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}-{tool}.log").write_text(text, encoding="utf-8")
    return found


def judged(text: str, code: int | None, *, late: bool) -> dict[str, Any]:
    """The row of a report: which families came to their end, and how much was found.

    late: whether the time was up. Warnings of racecheck are counted and do not fail the row.
    """
    begun, done, broke = (
        re.findall(rf"^{mark} (.*)$", text, re.M)
        for mark in (gpu_families.BEGUN, gpu_families.DONE, gpu_families.BROKE)
    )
    heads = [_bare(line) for line in text.splitlines() if _FINDING.match(line)]
    summaries = _SUMMARY.findall(text)
    errors = sum(int(errors or every) for every, errors, _ in summaries)
    if not done and not heads:
        # The tool, or this machine, does not let the program run: nothing is known of kernels.
        lines = [line for line in text.splitlines() if line.strip()]
        said = [line for line in lines if _SAID.match(line)] or lines or ["no message"]
        return {"remark": f"compute-sanitizer does not serve here: {_bare(said[0])[:160]}"}
    row: dict[str, Any] = {
        "families": ", ".join(done),
        # Without a summary the tool itself was ended: what it had told counts.
        "errors": errors if summaries else len(heads),
        "warnings": sum(int(warnings or 0) for _, _, warnings in summaries),
    }
    if row["errors"]:
        told = "; ".join(dict.fromkeys(heads))[:240]
        return {**row, "failed": True, "remark": told or "see the report"}
    if broke:
        return {**row, "failed": True, "remark": f"raised: {', '.join(broke)}"}
    if len(done) < len(begun):
        where = f"in {begun[-1]}"
        if late:
            return {**row, "remark": f"the time was up {where}"}
        return {**row, "failed": True, "remark": f"ended {where}, code {code}"}
    if code != 0:
        return {**row, "failed": True, "remark": f"ended with code {code} after the last family"}
    return row


def _bare(line: str) -> str:
    return line.removeprefix("=========").strip().replace("|", "/")
