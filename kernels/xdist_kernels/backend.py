"""Which implementation serves a call: its `backend` argument, what it may be, and what is said.

    auto       what `set_default` chose for this process; else Triton where the tensors are on CUDA
               and the family's Triton kernels can serve the call, torch everywhere else
    triton     the Triton kernels, or an error that says why they cannot serve
    torch      the chunked form of torch operations, on any device
    reference  the loop over tokens in float64 that defines the op: slow, for checks

The choice reads devices, dtypes and shapes alone, never values, so that every rank chooses alike
where the hosts are alike: one kind of GPU, Triton installed on all of them or on none, one default.
What serves an op is said once on the logger "xdist" for each op and choice, and a warning once for
each reason.
"""

from __future__ import annotations

import importlib
import logging
import threading
from collections.abc import Callable, Mapping
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch

from xdist_kernels.errors import KernelError

BACKENDS = ("auto", "triton", "torch", "reference")

_log = logging.getLogger("xdist")
_lock = threading.Lock()
_default = "auto"
# (op, backend, level, reason): the reason of a warning alone, others change from call to call.
_said: set[tuple[str, str, int, str]] = set()


class Choice(NamedTuple):
    """The backend of a call of `op`, and what is said of it where it computes."""

    op: str
    name: str
    why: str
    level: int = logging.INFO

    def say(self) -> None:
        """Logs the choice, as `say`."""
        say(self.op, self.name, self.why, self.level)


def default() -> str:
    """What `backend="auto"` means in this process: "auto" unless `set_default` said otherwise."""
    return _default


def set_default(name: str) -> str:
    """Makes `name` what "auto" means in this process; returns what it meant before.

    Raises:
        KernelError: there is no such backend.
    """
    global _default
    check(name)
    with _lock:
        before, _default = _default, name
    return before


def check(name: str) -> None:
    """Raise KernelError unless `name` is a backend."""
    if name not in BACKENDS:
        raise KernelError(
            f"there is no kernel backend {name!r}\nthere are {', '.join(BACKENDS)}\nuse one of them"
        )


def choose(op: str, asked: str, device: torch.device, refusal: Callable[[], str | None]) -> str:
    """ "triton", "torch" or "reference" for one call of `op`, which was asked to run on `asked`.

    refusal: why the Triton kernels cannot serve the call and what to do, None where they can; it
    is called only where the answer matters.

    Raises:
        KernelError: no such backend, or Triton is forced and cannot serve.
    """
    choice = decide(op, asked, device, refusal)
    choice.say()
    return choice.name


def decide(op: str, asked: str, device: torch.device, refusal: Callable[[], str | None]) -> Choice:
    """As `choose`, for a caller that says it where the backend computes, if ever it does."""
    check(asked)
    if asked == "auto" and device.type == "meta":
        return Choice(op, "torch", "tensors on meta have shapes alone", logging.DEBUG)
    name = _default if asked == "auto" else asked
    if name == "auto":
        return _automatic(op, device, refusal)
    if name == "triton":
        why = refusal()
        if why is not None:
            what, _, do = why.partition(": ")
            raise KernelError(
                f"{op} was asked to run on Triton kernels, which cannot serve this call\n"
                f"{what}\n{do or 'use backend=' + repr('auto') + ' or ' + repr('torch')}"
            )
    return Choice(op, name, "as asked")


def form(forms: Mapping[str, str], name: str) -> ModuleType:
    """The module of a family that is its form `name`, imported when it is first asked for.

    forms: backend -> module, of the family.

    Raises:
        KernelError: the family has no such form.
    """
    if name not in forms:
        raise KernelError(f"no form {name!r}\nthere are {', '.join(forms)}\nuse one of them")
    return _imported(forms[name])


@cache
def _imported(module: str) -> ModuleType:
    return importlib.import_module(module)


def _automatic(op: str, device: torch.device, refusal: Callable[[], str | None]) -> Choice:
    if device.type != "cuda":
        return Choice(op, "torch", f"the tensors are on {device.type}")
    why = refusal()
    if why is None:
        return Choice(op, "triton", "the tensors are on a GPU that the kernels serve")
    # Slower than what a GPU is there for: said even where nobody set up logging.
    return Choice(op, "torch", f"Triton cannot serve: {why}", logging.WARNING)


def say(op: str, name: str, why: str, level: int = logging.INFO) -> None:
    """Logs that the op runs on `name`, and why: once for each of both and the level, from WARNING
    on once for each reason."""
    key = (op, name, level, why if level >= logging.WARNING else "")
    # Looked up without the lock first: this runs at every call.
    if key in _said:
        return
    with _lock:
        if key in _said:
            return
        _said.add(key)
    _log.log(level, "%s runs on %s: %s", op, name, why)
