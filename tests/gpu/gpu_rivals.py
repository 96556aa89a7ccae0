"""Other projects' kernels, used where they can be imported; each one that is absent is named."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
# Distribution -> module.
RIVALS = {
    "fla-core": "fla",
    "flash-attn": "flash_attn",
    "mamba_ssm": "mamba_ssm",
    "causal-conv1d": "causal_conv1d",
}


# Those that are not imported here, and why.
_REFUSED: dict[str, str] = {}


def version(distribution: str) -> str:
    """Its version, "none" where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def versions() -> dict[str, str]:
    """Each rival's version, "none" where it is not installed; imports nothing."""
    return {name: version(name) for name in RIVALS}


def refuse(distribution: str, why: str) -> None:
    """Takes it as absent from now on, without an import."""
    _REFUSED[RIVALS[distribution]] = why
    module.cache_clear()


@functools.cache
def module(name: str) -> Any | str:
    """The module, or why it cannot be imported, in a few words."""
    if name in _REFUSED:
        return _REFUSED[name]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return "not installed" if error.name == name else f"needs {error.name}"
    except Exception as error:
        # A package built for another torch fails in many ways; its row says how.
        return f"does not import: {type(error).__name__}"


def has(distribution: str) -> bool:
    """Whether it can be imported here."""
    return not isinstance(module(RIVALS[distribution]), str)


def row(distribution: str) -> dict[str, Any]:
    """Its version, or why it cannot be used, as columns of a table."""
    if has(distribution):
        return {"version": version(distribution)}
    return {"remark": str(module(RIVALS[distribution]))}


def there(path: str) -> bool:
    """Whether the package of `fla.ops.gla.chunk_gla` can be imported; if not, module() says why."""
    return not isinstance(module(path.partition(".")[0]), str)


def function(path: str) -> Any | str:
    """`fla.ops.gla.chunk_gla` by its path, or why it is not here."""
    holder, _, name = path.rpartition(".")
    home = module(holder.partition(".")[0])
    home = module(holder) if not isinstance(home, str) else home
    if isinstance(home, str):
        return home
    return getattr(home, name, f"has no {name}")


def lost() -> bool:
    """Whether a fault of a kernel broke this process's CUDA context: nothing more can run in it.

    The card is asked: messages of such faults differ (torch's, Triton's, a library's own).
    """
    import torch

    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1.0).item()
    except torch.OutOfMemoryError:
        return False
    except Exception:
        return True
    return False


def first_line(error: BaseException) -> str:
    """The first line of a message, fit for a table's cell."""
    return (str(error).strip().splitlines() or ["no message"])[0].replace("|", "/")[:160]


def tried(call: Callable[[], T]) -> T | str:
    """What a rival's call gives, or why it refuses: what others cannot do is a finding."""
    import torch

    try:
        return call()
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as error:
        if torch.cuda.is_initialized() and lost():
            raise
        return f"{type(error).__name__}: {first_line(error)}"
