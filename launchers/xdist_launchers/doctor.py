"""`xdist doctor`: what this machine and environment have, and how to add what they lack.

Loads no torch: versions are read from package metadata, devices from the driver's own tool.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import shutil
import sys

from xdist_launchers.doctor_machine import machine, memory_bytes
from xdist_launchers.findings import Finding

__all__ = ["clash", "findings", "memory_bytes", "version"]

SOFTWARE, FEATURES = "software", "features"
_NEEDED = ("torch", "numpy", "safetensors", "zarr", "pydantic", "typer", "rich")
# What an optional package is for, and what adds it.
_OPTIONAL = {
    "deepspeed": ('engine.name = "deepspeed"', "pip install 'xdist-train[deepspeed]'"),
    "tensorboard": ("log.tensorboard = true", "pip install 'xdist-train[tensorboard]'"),
}


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


def findings(directory: pathlib.Path) -> list[Finding]:
    """All that there is to say; runs would be written in `directory`."""
    from xdist_launchers.doctor_places import folder, launchers, network

    versions = {name: version(name) for name in ("ray", "mpi4py")}
    return [
        *_software(),
        *machine(),
        *launchers(versions),
        *network(),
        *folder(directory),
        *_features(),
    ]


def _software() -> list[Finding]:
    ours = version("xdist-train") or "not installed (run from a source tree)"
    found = [
        Finding(SOFTWARE, "xdist", ours),
        Finding(SOFTWARE, "python", f"{platform.python_version()} ({sys.executable})"),
    ]
    for name in _NEEDED:
        there = version(name)
        do = "" if there else f"pip install {name}"
        found.append(Finding(SOFTWARE, name, there, "ok" if there else "bad", do))
    if there := version("pytest-xdist"):
        found.append(
            Finding(
                SOFTWARE,
                "clash",
                f"pytest-xdist {there} is installed and has a package of the same name",
                "bad",
                "pip uninstall -y pytest-xdist && "
                "pip install --force-reinstall --no-deps xdist-train",
            )
        )
    return found


def _features() -> list[Finding]:
    found = []
    for name, (purpose, do) in _OPTIONAL.items():
        there = version(name)
        if there:
            found.append(Finding(FEATURES, name, f"{there}, for {purpose}"))
        else:
            found.append(Finding(FEATURES, name, f"absent; {purpose} needs it", "absent", do))
    if version("deepspeed") and not (shutil.which("g++") and shutil.which("ninja")):
        text = "g++ or ninja not found: DeepSpeed compiles its CPU Adam with them"
        do = "apt install g++ ninja-build, for engine.offload_optimizer"
        found.append(Finding(FEATURES, "compiler", text, "note", do))
    return found
