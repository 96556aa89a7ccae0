"""How a Triton kernel is started: on a card, in Triton's interpreter, or only written down.

Every wrapper starts its kernels by `launch`, all arguments by name. Inside `recording` nothing
runs: what would have run is listed with its types and constants, so that each kernel a wrapper can
start is compiled without a GPU exactly as it would be with one (ahead.py).

A grid has one dim, which may have 2**31 - 1 programs (a second or third one ends at 65,535);
kernels take their program's coordinates apart themselves, in int64.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xdist_kernels.errors import KernelError

MOST_PROGRAMS = 2**31 - 1


class Target(NamedTuple):
    """What a kernel is made for: compute capability (90 is sm_90) and shared memory a program."""

    capability: int
    shared_bytes: int


AMPERE = Target(80, 163 << 10)
HOPPER = Target(90, 227 << 10)


class Config(NamedTuple):
    """Warps of a program and stages of its software pipeline."""

    warps: int
    stages: int


@dataclass(frozen=True)
class Launch:
    """One start of a kernel, written down.

    signature: each argument's Triton type, "constexpr" for the constants. aligned: arguments that
    16 divides (addresses in bytes, integers as they are), which the compiler may use.
    """

    kernel: Any
    programs: int
    config: Config
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: frozenset[str]


class _Recorder:
    def __init__(self, target: Target) -> None:
        self.target = target
        self.launches: list[Launch] = []


# Set while a caller of `recording` runs, for its thread alone.
_recorder: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar(
    "recorder", default=None
)


@contextlib.contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Starts nothing: the launches of this thread are listed instead, as made for `target`.

    Outputs keep whatever their memory holds. Tensors may be on any device, meta too.
    """
    recorder = _Recorder(target)
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


@cache
def _installed() -> bool:
    # Asked at every call; looking for a package that is not there takes 0.4 ms.
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: TRITON_INTERPRET=1 when they are imported."""
    if not _installed():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def target_of(device: torch.device) -> Target:
    """What kernels for tensors on `device` are made for."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.target
    if device.type != "cuda":
        return HOPPER
    # Any: the stubs of some releases lack an attribute that all releases have.
    properties: Any = torch.cuda.get_device_properties(device)
    shared = int(properties.shared_memory_per_block_optin)
    return Target(10 * properties.major + properties.minor, shared)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can serve tensors of this device and dtype; None: one can."""
    if not _installed():
        return "triton is not installed: pip install 'xdist-train[triton]'"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels add up in float32, the inputs are {dtype}: use backend='torch'"
    if _recorder.get() is not None:
        return None
    if device.type == "cuda":
        capability = target_of(device).capability
        if capability < 80:
            return f"the kernels need compute capability 8.0, this card has {capability / 10}"
        return None
    if not interpreted():
        return (
            f"Triton compiles for CUDA devices, the tensors are on {device.type}: move them, or "
            "set TRITON_INTERPRET=1 before Python starts (slow, for tests)"
        )
    if dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16 there"
    return None


def launch(
    kernel: Any, programs: int, config: Config, *, device: torch.device, **arguments: Any
) -> None:
    """Starts `programs` programs of `kernel` on `device`; none starts nothing.

    arguments: every parameter of the kernel by name: tensors, numbers, constants, None.

    Raises:
        KernelError: more programs than one grid dim takes.
    """
    if programs == 0:
        return
    if programs > MOST_PROGRAMS:
        raise KernelError(
            f"{kernel.__name__} would need {programs} programs, a grid has {MOST_PROGRAMS}\n"
            "give it larger blocks, or split the call along its batch"
        )
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(_written_down(kernel, programs, config, arguments))
        return
    with _current(device):
        kernel[(programs,)](**arguments, num_warps=config.warps, num_stages=config.stages)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    # Triton starts kernels on the current device, whatever their tensors' is.
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _written_down(kernel: Any, programs: int, config: Config, arguments: dict[str, Any]) -> Launch:
    signature, constants, aligned = [], [], set()
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        # Triton makes a constant of None, and of an integer 1 unless told otherwise.
        one = specialized and type(value) is int and value == 1
        if parameter.is_constexpr or value is None or one:
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        signature.append((name, parameter.annotation_type or _type_of(value)))
        if specialized and not parameter.do_not_specialize_on_alignment and _by_16(value):
            aligned.add(name)
    return Launch(kernel, programs, config, tuple(signature), tuple(constants), frozenset(aligned))


_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _NAMES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise KernelError(f"a kernel takes tensors and numbers, not {type(value).__name__}")


def _by_16(value: Any) -> bool:
    """Whether 16 divides the address or the integer."""
    if isinstance(value, Tensor):
        # The allocator's blocks are aligned; a view may start anywhere.
        return value.storage_offset() * value.element_size() % 16 == 0
    return type(value) is int and value % 16 == 0
