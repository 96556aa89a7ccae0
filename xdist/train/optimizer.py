"""AdamW over replicated parameters, and its state as plain named tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xdist.config import Optimizer
from xdist.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def build_optimizer(module: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, decoupled weight decay) over `module`'s parameters.

    Only matrices decay: norm weights, biases and per-head constants are scales, not directions.
    Moments have the dtype of the parameters, which stay float32 (float64) in every precision.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.ndim >= 2],
            "weight_decay": settings.weight_decay,
        },
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
    )


def state_tensors(module: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's state as `{"exp_avg/NAME": [shape of NAME], ..., "updates/NAME": []}`.

    Names are those of the parameters, so the state survives another grouping, another number of
    ranks and another engine. Before the first update a parameter's moments are zeros.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(module):
        state = optimizer.state.get(parameter, {})
        for moment in MOMENTS:
            tensors[f"{moment}/{name}"] = state.get(moment, torch.zeros_like(parameter)).detach()
        updates = state.get("step", torch.zeros((), dtype=torch.float32))
        tensors[f"updates/{name}"] = updates.detach().cpu()
    return tensors


def load_state_tensors(
    module: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]
) -> None:
    """Put back what `state_tensors` gave. Raises CheckpointError on a missing or alien entry."""
    wanted = state_tensors(module, optimizer)
    check_same_names(wanted, tensors, "optimizer state")
    for name, parameter in _trained(module):
        optimizer.state[parameter] = {
            "step": tensors[f"updates/{name}"].to(torch.float32).clone(),
            **{
                moment: tensors[f"{moment}/{name}"].to(parameter.device, parameter.dtype).clone()
                for moment in MOMENTS
            },
        }


def check_same_names(wanted: dict[str, Tensor], found: dict[str, Tensor], what: str) -> None:
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


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
