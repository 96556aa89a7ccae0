"""What a number depends on: the code that is measured, what measures it, card and versions."""

from __future__ import annotations

import functools
import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable
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

# What a number depends on beside the sources; another host with the same card may go on.
DEPENDS = ("card", "driver", "python", "torch", "triton")
# The scripts that one command alone runs; the others are shared.
OWN_SCRIPTS = (
    "gpu_parity", "gpu_linear", "gpu_attention", "gpu_memory", "main", "gpu_law1", "gpu_step",
)  # fmt: skip


def key(name: str, machine: dict[str, Any]) -> dict[str, str]:
    """Everything on which the rows of command `name` depend; kept rows have the same."""
    found = {"code": sources(), "scripts": scripts(name)}
    found |= {part: str(machine.get(part)) for part in DEPENDS}
    return found | gpu_rivals.versions()


def _hash(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:8]


@functools.cache
def sources() -> str:
    """A name for the code that is measured: eight digits of the hash of kernels/ and xdist/."""
    return _hash([*ROOT.glob("kernels/**/*.py"), *ROOT.glob("xdist/**/*.py")])


def scripts(name: str) -> str:
    """The same for what measures in command `name` ("gpu-linear"): its script and shared ones."""
    others = set(OWN_SCRIPTS) - {name.replace("-", "_")}
    shared = [path for path in HERE.glob("*.py") if path.stem not in others]
    return _hash([*shared, Path(record.__file__)])


def machine() -> dict[str, Any]:
    """Card, driver, and the versions that a number depends on."""
    driver = ""
    try:
        found = subprocess.check_output(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            text=True,
            stderr=subprocess.DEVNULL,
            timeout=30,
        )
        driver = found.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
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
