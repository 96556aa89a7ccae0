"""`xdist doctor`: what this machine and environment have. Loads no torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys

_NEEDED = ("torch", "numpy", "safetensors", "zarr", "pydantic", "typer", "rich")
_EXTRAS = {"tensorboard": "log.tensorboard = true"}


def clash() -> str:
    """One line when another distribution's `xdist` is imported instead of ours, else ""."""
    import xdist

    # The public names are ours alone; pytest-xdist's package has none of them.
    if "SequenceShard" in getattr(xdist, "__all__", ()):
        return ""
    folder = pathlib.Path(xdist.__file__ or "?").parent
    return (
        f"xdist: pytest-xdist owns the name `xdist` in this environment ({folder}); mend it: "
        f"{sys.executable} -m pip uninstall -y pytest-xdist && {sys.executable} -m pip install "
        "--force-reinstall --no-deps xdist-train"
    )


def version(name: str) -> str:
    """The installed version of a distribution, "" when it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def memory_bytes() -> tuple[int, int]:
    """Available and total memory of this host (or of this cgroup, where that is less)."""
    fields = {}
    for line in pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    available, total = fields["MemAvailable"], fields["MemTotal"]
    group = pathlib.Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
    except (FileNotFoundError, PermissionError):
        return available, total
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        available = max(0, min(available, total - used))
    return available, total


def devices() -> list[str]:
    """Names of the CUDA devices, as the driver's own tool reports them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=20, check=False)
    return listed.stdout.splitlines() if listed.returncode == 0 else []


def report() -> tuple[list[str], int]:
    """The lines to print and the exit code: 3 when something needed is missing."""
    available, total = memory_bytes()
    cores = len(os.sched_getaffinity(0))
    lines = [
        f"xdist       {version('xdist-train') or 'not installed (run from a source tree)'}",
        f"python      {platform.python_version()} ({sys.executable})",
        f"system      {platform.system()} {platform.release()} {platform.machine()}",
        f"cores       {cores} usable of {os.cpu_count()}",
        f"memory      {available / 2**30:.1f} GiB available of {total / 2**30:.1f} GiB",
    ]
    lines += [f"device      {name}" for name in devices()] or [
        "device      CPU only (nvidia-smi not found or without devices)"
    ]
    missing = []
    for name in _NEEDED:
        lines.append(f"{name:<11} {version(name) or 'MISSING'}")
        missing += [] if version(name) else [name]
    for name, purpose in _EXTRAS.items():
        text = version(name) or f"absent; {purpose} needs it: pip install 'xdist-train[{name}]'"
        lines.append(f"{name:<11} {text}")
    if version("pytest-xdist"):
        lines.append(
            f"clash       pytest-xdist {version('pytest-xdist')} is installed and has a package of "
            "the same name; remove it: pip uninstall pytest-xdist, then reinstall xdist-train"
        )
    if missing:
        lines.append(f"missing     install it: pip install {' '.join(missing)}")
    return lines, 3 if missing or version("pytest-xdist") else 0
