"""What one waits for before anything happens: imports and `xdist show`, in fresh processes."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPEATS = 7


def run(root: Path) -> list[dict[str, Any]]:
    """Median wall time of each command over REPEATS, interleaved."""
    commands = {
        "python -c pass": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        "import torch, xdist": ["-c", "import torch, xdist"],
        "import torch, and every public name of xdist": [
            "-c",
            "import torch, xdist\nfor name in xdist._HOME: getattr(xdist, name)",
        ],
        "xdist show": ["-m", "xdist_launchers.cli", "show", "configs/quickstart.toml"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(REPEATS):
        for name, arguments in commands.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, *arguments], cwd=root, check=True, stdout=subprocess.DEVNULL
            )
            seconds[name].append(time.perf_counter() - start)
    return [{"command": name, "wall (s)": statistics.median(s)} for name, s in seconds.items()]
