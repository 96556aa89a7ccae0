"""AdamW, SGD, or Muon for the matrices of layers, over named parameters; their state by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xdist.checkpoint.pieces import Spec
from xdist.config import Optimizer
from xdist.errors import CheckpointError, ConfigError
from xdist.train.muon import Muon
from xdist.train.sgd import Sgd

Named = Mapping[str, nn.Parameter]


def kept_by(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The tensors an optimizer keeps of a parameter, each of its shape."""
    if isinstance(optimizer, Sgd):
        return ("momentum",) if optimizer.momentum else ()
    return ("momentum",) if isinstance(optimizer, Muon) else ("exp_avg", "exp_avg_sq")


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def build_optimizers(
    module: nn.Module, settings: Optimizer, named: Named | None = None
) -> list[torch.optim.Optimizer]:
    """The optimizers that together hold every trained parameter of `module` once.

    AdamW is that of Loshchilov and Hutter 2019 (decoupled weight decay); SGD decays the same way.
    With the name "muon" the parameters that the model calls "hidden" go to Muon instead. Matrices
    decay; tables of which a batch touches few rows, norm weights, biases and per-head constants do
    not. Moments have the dtype of the parameters, which stay float32 (float64) in every precision.
    Each group holds `rate`, its learning rate over that of the schedule.

    named: what stands for each parameter (None: the module's own), such as this rank's part of it,
    with the same number of dims.

    Raises ConfigError for "muon" and a model without `parameter_roles`.
    """
    roles = parameter_roles(module)
    muon = settings.name == "muon"
    if muon and "hidden" not in roles.values():
        raise ConfigError(
            f'optimizer.name = "muon" does not know the matrices of {type(module).__name__}',
            'a model names them with parameter_roles() -> {name: "hidden" | "table" | "other"}',
            "add that method to the model, or set optimizer.name=adamw",
        )
    hidden, decayed, plain = [], [], []
    for name, parameter in (trained(module) if named is None else named).items():
        if muon and roles[name] == "hidden":
            hidden.append(parameter)
        elif parameter.ndim >= 2 and roles[name] != "table":
            decayed.append(parameter)
        else:
            plain.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay, "rate": 1.0},
        {"params": plain, "weight_decay": 0.0, "rate": 1.0},
    ]
    found = [_of_groups([group for group in groups if group["params"]], settings)]
    if hidden:
        rate = settings.muon_learning_rate / settings.learning_rate
        found.append(Muon(hidden, rate=rate, weight_decay=settings.weight_decay))
    return [optimizer for optimizer in found if optimizer is not None]


def _of_groups(groups: list[dict[str, Any]], settings: Optimizer) -> torch.optim.Optimizer | None:
    if not groups:
        return None
    if settings.name == "sgd":
        return Sgd(groups, lr=settings.learning_rate, momentum=settings.momentum)
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True
    )


def set_rates(optimizers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    """Give every group its learning rate: that of the schedule times the group's `rate`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]


def parameter_roles(module: nn.Module) -> dict[str, str]:
    """ "hidden" (a matrix inside a layer), "table" (an embedding) or "other", by parameter name.

    What the model says; of a model that says nothing, embeddings of torch are tables.
    """
    if hasattr(module, "parameter_roles"):
        return dict(module.parameter_roles())  # type: ignore[operator]
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return {
        name: "table" if id(parameter) in tables else "other"
        for name, parameter in module.named_parameters()
    }


def state_tensors(named: Named, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state as `{"exp_avg/NAME": [shape of NAME], "momentum/NAME": ..., "updates/NAME": []}`.

    Names are those of the parameters, so the state survives another grouping, another number of
    ranks and another engine. Before the first update it is zeros.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter, optimizer in _held(named, optimizers):
        state: dict[str, Any] = optimizer.state.get(parameter, {})
        for kept in kept_by(optimizer):
            found = state[kept] if kept in state else torch.zeros_like(parameter)
            tensors[f"{kept}/{name}"] = found.detach()
        if isinstance(optimizer, torch.optim.AdamW):
            updates = state.get("step", torch.zeros((), dtype=torch.float32))
            tensors[f"updates/{name}"] = updates.detach().cpu()
    return tensors


def state_specs(named: Named, optimizers: list[torch.optim.Optimizer]) -> dict[str, Spec]:
    """What `state_tensors` gives, by name, without making it."""
    specs: dict[str, Spec] = {}
    for name, parameter, optimizer in _held(named, optimizers):
        for kept in kept_by(optimizer):
            specs[f"{kept}/{name}"] = Spec(tuple(parameter.shape), parameter.dtype)
        if isinstance(optimizer, torch.optim.AdamW):
            specs[f"updates/{name}"] = Spec((), torch.float32)
    return specs


def put_state(
    named: Named, optimizers: list[torch.optim.Optimizer], name: str, values: Tensor
) -> None:
    """Put back one entry of what `state_tensors` gave; `values` has its shape, on any device."""
    kept, _, of = name.partition("/")
    parameter = named[of]
    state = _owners(optimizers)[id(parameter)].state[parameter]
    if kept == "updates":
        # The fused update reads it on the parameter's device.
        state["step"] = values.to(parameter.device, copy=True)
    else:
        state[kept] = values.to(parameter.device, parameter.dtype, copy=True)


def check_same_names(
    wanted: Mapping[str, Tensor | Spec], found: Mapping[str, Tensor | Spec], what: str
) -> None:
    """Raise CheckpointError unless both hold the same names, shapes and dtypes."""
    missing = sorted(wanted.keys() - found.keys())
    alien = sorted(found.keys() - wanted.keys())
    shapes = [
        f"{name} {found[name].dtype} {tuple(found[name].shape)} instead of "
        f"{wanted[name].dtype} {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & found.keys())
        if (found[name].shape, found[name].dtype) != (wanted[name].shape, wanted[name].dtype)
    ]
    if missing or alien or shapes:
        first = [*(f"missing {n}" for n in missing), *(f"unknown {n}" for n in alien), *shapes]
        raise CheckpointError(
            f"the {what} of the checkpoint does not fit this model",
            f"{len(missing)} missing, {len(alien)} unknown, {len(shapes)} of another shape "
            "or dtype; " + "; ".join(first[:3]),
            "resume with the model section that the checkpoint's run had (its config.toml), "
            "or start in another run directory",
        )


def _owners(optimizers: list[torch.optim.Optimizer]) -> dict[int, torch.optim.Optimizer]:
    """The optimizer that holds each parameter, by the parameter's id."""
    return {
        id(parameter): optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _held(
    named: Named, optimizers: list[torch.optim.Optimizer]
) -> list[tuple[str, nn.Parameter, torch.optim.Optimizer]]:
    """Each trained parameter with the optimizer that holds it."""
    owner = _owners(optimizers)
    return [(name, p, owner[id(p)]) for name, p in named.items()]
