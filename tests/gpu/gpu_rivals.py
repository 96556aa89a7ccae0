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


def version(distribution: str) -> str:
    """Its version, "none" where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def module(name: str) -> Any | str:
    """The module, or why it cannot be imported, in a few words."""
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


def found() -> dict[str, str]:
    """Each rival's version, or why it is not here."""
    return {name: version(name) if has(name) else str(module(own)) for name, own in RIVALS.items()}


def there(path: str) -> bool:
    """Whether the package of `fla.ops.gla.chunk_gla` can be imported; if not, found() says why."""
    return not isinstance(module(path.partition(".")[0]), str)


def function(path: str) -> Any | str:
    """`fla.ops.gla.chunk_gla` by its path, or why it is not here."""
    holder, _, name = path.rpartition(".")
    home = module(holder.partition(".")[0])
    home = module(holder) if not isinstance(home, str) else home
    if isinstance(home, str):
        return home
    return getattr(home, name, f"has no {name}")


def fault(error: BaseException) -> bool:
    """Whether the card itself reported it: nothing more can run in this process."""
    return "CUDA error" in str(error)


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
        if fault(error):
            raise
        return f"{type(error).__name__}: {first_line(error)}"
