"""Writes a measurement as docs/benchmarks/NAME.json and as a table in NAME.md beside it.

Both hold what is needed to judge and repeat the numbers: command, commit, date, hardware, versions.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "docs" / "benchmarks"
PACKAGES = ("torch", "numpy", "zarr", "safetensors", "pydantic", "transformers")


def hardware() -> dict[str, Any]:
    """The processor, its cores as this process may use them, memory, and a CUDA card if any."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    found = {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    import torch

    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["card"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit that was measured, "+" after it when files differ; "" in a plain copy."""
    try:
        call = functools.partial(
            subprocess.check_output, text=True, cwd=ROOT, stderr=subprocess.DEVNULL
        )
        name = call(["git", "rev-parse", "--short", "HEAD"]).strip()
        changed = call(["git", "status", "--porcelain", "-uno"])
    except (OSError, subprocess.CalledProcessError):
        return ""
    return name + ("+" if changed.strip() else "")


def write(
    name: str,
    title: str,
    command: str,
    rows: list[dict[str, Any]],
    *,
    note: str = "",
    folder: Path | None = None,
) -> Path:
    """Writes rows (all with the same keys; the first key names the row) and returns the table."""
    folder = folder or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }
    whole = {"title": title, **about, "note": note, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    keys = list(rows[0])
    lines = [f"# {title}", ""]
    lines += [f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(_cell(row[key]) for key in keys) + " |" for row in rows]
    lines += ["", *([note, ""] if note else [])]
    described = "; ".join(f"{key} {value}" for key, value in about["hardware"].items())
    named = ", ".join(f"{key} {value}" for key, value in about["versions"].items())
    lines.append(f"`{command}`, {about['date']}, commit {about['commit'] or 'unknown'}.")
    lines.append(f"Hardware: {described}. Versions: {named}.")
    path = folder / f"{name}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
