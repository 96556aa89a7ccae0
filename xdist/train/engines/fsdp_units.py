"""What fully_shard gathers together, and the moves it makes. The one file that imports it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from xdist.comm.collectives import ProcessGroup, device_mesh_from, size_of
from xdist.comm.flat import gather_flat, reduce_scatter_flat
from xdist.cost.fsdp import share_elements
from xdist.errors import ConfigError
from xdist.mesh import Mesh


def units_of(module: nn.Module) -> tuple[list[nn.Module], list[tuple[str, nn.Parameter]]]:
    """The blocks of a model, and the parameters outside them.

    A model names its blocks in `blocks`, modules that read their parameters only while they are
    called, forward and backward; a model without it is one unit.
    """
    blocks: list[nn.Module] = list(getattr(module, "blocks", ()))
    inside = {id(p) for block in blocks for p in block.parameters()}
    return blocks, [(n, p) for n, p in module.named_parameters() if id(p) not in inside]


def shard_units(module: nn.Module, mesh: Mesh, *, reshard: bool) -> None:
    """Cut the parameters of `module` into shares over the ranks of `mesh`, in place.

    `module.loss` and calls of its blocks gather what they need from then on. reshard: free a
    block's parameters after its forward pass and gather them again for its backward.

    Raises ConfigError for a parameter without rows, or a unit of several dtypes.
    """
    group = mesh.parameter_group
    assert group is not None, "on one rank there is nothing to cut"
    ranks = size_of(group)
    flat = device_mesh_from([group], mesh.device.type, torch.arange(ranks), ("parameters",))
    blocks, rest = units_of(module)
    units = [(block, list(block.named_parameters())) for block in blocks]
    for _, held in [*units, (module, rest)]:
        _check(held)
    trained = [_trained_elements(held, ranks) for _, held in [*units, (module, rest)]]
    # torch cannot cut what has no element; on every rank it stays what it is.
    empty = {p for p in module.parameters() if p.numel() == 0}
    for block in blocks:
        fully_shard(block, mesh=flat, reshard_after_forward=reshard, ignored_params=empty)
    # Its backward comes first: to free it in between would only move it twice.
    fully_shard(module, mesh=flat, reshard_after_forward=False, ignored_params=empty)
    register_fsdp_forward_method(module, "loss")
    for unit, elements in zip([*blocks, module], trained, strict=True):
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_custom_all_gather(_Gather())  # type: ignore[arg-type]
        unit.set_custom_reduce_scatter(_ReduceScatter(elements))  # type: ignore[arg-type]
    # A gradient that is None on this rank counts as zeros (torch 2.13; see _ReduceScatter).
    if hasattr(module, "set_reduce_scatter_unused_params"):
        module.set_reduce_scatter_unused_params(True)  # type: ignore[operator]


def free_all(module: nn.Module) -> None:
    """Let every gathered parameter of `module` go; its shares stay."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


def _check(held: Sequence[tuple[str, nn.Parameter]]) -> None:
    scalars = [name for name, p in held if p.ndim == 0]
    if scalars:
        raise ConfigError(
            f"fsdp cannot cut the parameter {scalars[0]} into rows",
            f"{len(scalars)} parameters have no dim",
            "give it the shape (1,), or set engine.name=plain",
        )
    dtypes = sorted({str(p.dtype) for _, p in held})
    if len(dtypes) > 1:
        raise ConfigError(
            "fsdp gathers the parameters of a block together, and they differ in dtype",
            f"{held[0][0]} and others have {', '.join(dtypes)}",
            "give a block's parameters one dtype, or set engine.name=plain",
        )


def _trained_elements(held: Sequence[tuple[str, nn.Parameter]], ranks: int) -> int:
    return ranks * sum(share_elements(p.shape, ranks) for _, p in held if p.requires_grad)


class _Move:
    """What fully_shard asks of whoever makes its exchanges."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer of a move."""
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Move):
    """Its all-gather."""

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        async_op: bool = False,
    ) -> None:
        gather_flat(output_tensor, input_tensor, group, move="fsdp gather")


class _ReduceScatter(_Move):
    """Its reduce-scatter, of a unit whose trained parameters are `elements` in all, padded."""

    def __init__(self, elements: int) -> None:
        self.elements = elements

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        if input_tensor.numel() != self.elements:
            raise ConfigError(
                "fsdp: some trained parameters got no gradient on this rank",
                f"{input_tensor.numel()} of {self.elements} elements of a block have one, and "
                f"torch {torch.__version__} sums only those: ranks would send different amounts",
                "let every rank use every parameter, freeze those that are unused, or take "
                "torch 2.13 or newer",
            )
        reduce_scatter_flat(output_tensor, input_tensor, group, move="fsdp reduce-scatter")
