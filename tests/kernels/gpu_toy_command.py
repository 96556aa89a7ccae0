"""A command with rows that hang, crash and raise, and with a torch that is a stand-in: what is
tested is who watches them. Run as a script by test_gpu_supervisor.py.

TOY_TRIES: a file that gets a line "NAME PID" whenever a row is tried. TOY_ROWS: names of the rows.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

import gpu_key
import gpu_rows
import gpu_supervisor


class _OutOfMemoryError(Exception):
    pass


class _Card:
    """Of torch.cuda what rows use; a fault breaks it for the rest of the process."""

    def __init__(self) -> None:
        self.broken = False

    def empty_cache(self) -> None:
        self.synchronize()

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def is_initialized(self) -> bool:
        return True


card = _Card()
torch: Any = ModuleType("torch")
torch.cuda = card
torch.OutOfMemoryError = _OutOfMemoryError
torch.zeros = lambda *_, **__: SimpleNamespace(add_=lambda x: SimpleNamespace(item=lambda: x))
sys.modules["torch"] = torch
gpu_key.machine = lambda: {"card": "a toy"}  # type: ignore[assignment]
gpu_rows.no_card = lambda name, device: ""  # type: ignore[assignment]
# The command's last seconds, made short.
gpu_supervisor.Limits = functools.partial(  # type: ignore[assignment, misc]
    gpu_supervisor.Limits, idle_s=30.0, cut_s=0.5, end_s=30.0
)


def hang() -> dict[str, Any]:
    while True:
        time.sleep(0.02)


def crash() -> dict[str, Any]:
    ctypes.string_at(0)
    return {}


def quit_() -> dict[str, Any]:
    print("the driver says no", file=sys.stderr)
    os._exit(9)


def fault() -> dict[str, Any]:
    card.broken = True
    # Triton's words, which do not hold torch's.
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


def full() -> dict[str, Any]:
    raise torch.OutOfMemoryError("tried to allocate 1 TiB")


def raises() -> dict[str, Any]:
    raise ZeroDivisionError("division by zero")


def fine() -> dict[str, Any]:
    return {"ms": 1.5}


ROWS = {call.__name__.strip("_"): call for call in (fine, full, raises, fault, crash, quit_, hang)}


def _tried(name: str) -> dict[str, Any]:
    with Path(os.environ["TOY_TRIES"]).open("a", encoding="utf-8") as tries:
        tries.write(f"{name} {os.getpid()}\n")
    return ROWS[name.partition(" ")[0]]()


def rows(given: gpu_rows.Options) -> int:
    table = gpu_rows.Table("gpu-toy", "Toys", "make gpu-toy", given, {"time": "Times"})
    for name in os.environ["TOY_ROWS"].split(","):
        if name == "outside":
            raise KeyError("outside of a row")
        make = functools.partial(_tried, name)
        table.measure("time", name, make, theirs=name.endswith("theirs"))
    return table.finish()


def main(argv: Sequence[str] | None = None) -> int:
    return gpu_supervisor.command("gpu-toy", __file__, __doc__, argv, rows)


if __name__ == "__main__":
    sys.exit(main())
