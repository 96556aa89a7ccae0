"""The one place that unpickles: a foreign state dict, once, when its owner is trusted by name.

torch first reads the file with `weights_only=True`, which builds tensors and plain containers and
nothing else. Only a file that holds more than that is unpickled in full, which runs the code in it.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping
from typing import Any

import torch

from xdist.checkpoint import save
from xdist.checkpoint.folders import steps_in
from xdist.errors import CheckpointError
from xdist.train.record import CHECKPOINTS
from xdist.train.resume import IMPORTED

# Where frameworks put the parameters inside of what they save.
_INSIDE = ("module", "model", "state_dict", "model_state_dict")
# What wrappers put before every name.
_WRAPPERS = ("module.", "_orig_mod.")


def import_pickle(file: pathlib.Path, run: pathlib.Path, *, trust_pickle: bool) -> list[str]:
    """Write the parameters in `file` as the checkpoint of step 0 of `run`; lines that say so.

    Raises:
        CheckpointError: not trusted, not a state dict, or the run has checkpoints already.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file")
    if not trust_pickle:
        raise CheckpointError(
            f"{file} is not read: a pickle is a program, and reading it runs it",
            "whoever made the file could do with this account whatever you can do; safetensors "
            "files have no such door",
            "if you trust whoever made it and how it came here, add --trust-pickle",
        )
    directory = run / CHECKPOINTS
    if steps_in(directory):
        raise CheckpointError(
            f"{directory} holds checkpoints, and a run starts from one",
            f"the newest is at step {next(iter(steps_in(directory)))}",
            "name another run",
        )
    content, lines = _unpickled(file)
    tensors = {f"model/{name}": tensor for name, tensor in parameters_in(content, file).items()}
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    told = f"{file.name}, sha256 {digest[:16]}.."
    path = save(directory, 0, tensors, {"step": 0, IMPORTED: told})
    count = sum(tensor.numel() for tensor in tensors.values())
    return [*lines, f"{path}: {len(tensors)} tensors, {count:,} parameters of {told}"]


def parameters_in(content: Any, file: pathlib.Path) -> dict[str, torch.Tensor]:
    """The tensors of a state dict by name, out of the containers that frameworks put around it.

    Raises:
        CheckpointError: there are none, or something else stands among them.
    """
    for _ in range(len(_INSIDE)):
        inside = [k for k in _INSIDE if isinstance(content, Mapping) and k in content]
        if not inside or not isinstance(content[inside[0]], Mapping):
            break
        content = content[inside[0]]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{file} holds no state dict", f"it holds a {type(content).__name__}")
    other = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if other:
        raise CheckpointError(
            f"{file} holds more than tensors by name",
            f"not tensors: {', '.join(other[:3])}",
            f"save its state dict alone, or under one of the keys {', '.join(_INSIDE)}",
        )
    named = {str(name): tensor.detach() for name, tensor in content.items()}
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) for name in named):
            named = {name.removeprefix(prefix): tensor for name, tensor in named.items()}
    return named


def _unpickled(file: pathlib.Path) -> tuple[Any, list[str]]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True), []
    # torch raises whatever the unpickler raises.
    except Exception as error:
        refused = str(error).strip().splitlines()[0] if str(error).strip() else ""
    try:
        content = torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:
        raise CheckpointError(
            f"{file} cannot be read as a file of torch.save", f"{type(error).__name__}: {error}"
        ) from error
    return content, [f"{file} held more than tensors and was unpickled in full ({refused})"]
