"""What differs between ZeRO's stages: when gradients are reduced, where they and the weights lie.

Everything here reads DeepSpeed's own optimizer objects (0.19), which are handed in: nothing is
imported from it. What each rank holds of a parameter is told as a `Run`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from xdist.comm.collectives import rank_of

Named = Mapping[str, nn.Parameter]


@dataclass(frozen=True)
class Run:
    """Elements [start, start + count) of a flattened parameter, on this rank.

    They lie in `flat` from `offset` on. `flat` is also what the optimizer keeps its state by;
    the state is cut alike. alike: every rank holds the same run.
    """

    flat: Tensor
    offset: int
    start: int
    count: int
    alike: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """This run of a tensor that is cut as `flat`, 1-D, sharing its memory."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.count]

    def put(self, tensor: Tensor, whole: Tensor) -> None:
        """Copy this run of a whole parameter (any shape) into a tensor that is cut as `flat`."""
        self.of(tensor).copy_(whole.reshape(-1)[self.start : self.start + self.count])


class Stage(Protocol):
    """One optimizer step: `collect`, then `gradients` may be read and scaled, then `step` or
    `clear`."""

    partitioned: bool  # whether each rank holds gradients of its own
    whole: bool  # whether each rank holds the whole parameters

    def collect(self) -> None:
        """Bring the gradients of all micro-steps and ranks together."""

    def gradients(self) -> list[Tensor]:
        """What this rank holds of them, to be changed in place."""

    def step(self) -> None:
        """Update the parameters; no gradient is left."""

    def clear(self) -> None:
        """Leave no trace of the gradients."""

    def runs(self) -> dict[int, Run]:
        """What this rank holds of each parameter, by the parameter's id."""

    def put(self, parameter: nn.Parameter, run: Run, whole: Tensor) -> None:
        """Give a parameter the values of `whole` (on any device), as far as this rank holds it."""

    def loaded(self) -> None:
        """Called after the last `put`."""


class Replicated:
    """Stage 0: everything whole everywhere; one all-reduce a step."""

    partitioned = False
    whole = True

    def __init__(self, engine: Any, parameters: Iterable[nn.Parameter]) -> None:
        self._engine, self._parameters = engine, list(parameters)

    def collect(self) -> None:
        # Only a step counts as the end of accumulation, and this is the first half of one.
        self._engine._running_engine_step = True
        try:
            self._engine.allreduce_gradients()
        finally:
            self._engine._running_engine_step = False

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def step(self) -> None:
        self._engine.optimizer.step()
        self.clear()

    def clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def runs(self) -> dict[int, Run]:
        return {id(p): _whole(p) for p in self._parameters}

    def put(self, parameter: nn.Parameter, run: Run, whole: Tensor) -> None:
        parameter.data.copy_(whole)

    def loaded(self) -> None:
        pass


class Partitioned:
    """Stages 1 and 2: whole parameters; this rank's part of the flat groups is updated here."""

    partitioned = True
    whole = True

    def __init__(self, engine: Any, parameters: Iterable[nn.Parameter]) -> None:
        self._engine, self._parameters = engine, list(parameters)
        self._zero = engine.optimizer
        self._no_micro_step = self._zero.micro_step_id

    def collect(self) -> None:
        zero = self._zero
        if zero.partition_gradients:
            # Reduced in every backward pass already.
            zero.finalize_gradient_accumulation_boundary()
        else:
            self._reduce_once()
        if zero.cpu_offload:
            # Copies to the host may still be under way.
            zero._wait_for_offload_copies()
            _synchronise(self._parameters)

    def _reduce_once(self) -> None:
        # A parameter that no token of this rank used has no gradient; another rank's may have.
        for parameter in self._parameters:
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._zero.setup_buckets()
        self._engine._running_engine_step = True
        try:
            self._engine.allreduce_gradients()
        finally:
            self._engine._running_engine_step = False

    def gradients(self) -> list[Tensor]:
        zero = self._zero
        if zero.cpu_offload:
            return [flat.grad for flat in zero.single_partition_of_fp32_groups]
        return [g for group in zero.averaged_gradients.values() for g in group or ()]

    def step(self) -> None:
        self._zero.step()
        self._zero.zero_grad(set_to_none=True)
        self._forget_host_copies()

    def clear(self) -> None:
        # What DeepSpeed itself does when it skips a step for an overflow.
        zero = self._zero
        zero.micro_step_id = self._no_micro_step
        zero.zero_grad(set_to_none=True)
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
            zero._offload_accumulated_param_ids = set()
        else:
            for group in zero.averaged_gradients:
                zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        self._forget_host_copies()

    def _forget_host_copies(self) -> None:
        # They would count again for a parameter that the next step does not use.
        if self._zero.cpu_offload:
            for gradient in self.gradients():
                gradient.zero_()
            for gradient in self._zero.accumulated_grads_in_cpu.values():
                gradient.zero_()

    def runs(self) -> dict[int, Run]:
        zero = self._zero
        found = {id(p): _whole(p) for p in self._parameters if not p.requires_grad}
        for index, group in enumerate(zero.round_robin_bit16_groups):
            flat = zero.single_partition_of_fp32_groups[index]
            first = rank_of(zero.real_dp_process_group[index]) * flat.numel()
            for parameter, at in zip(group, zero.round_robin_bit16_offsets[index], strict=True):
                start = max(first, at)
                count = max(0, min(first + flat.numel(), at + parameter.numel()) - start)
                offset = start - first if count else 0
                found[id(parameter)] = Run(flat, offset, start - at if count else 0, count)
        return found

    def put(self, parameter: nn.Parameter, run: Run, whole: Tensor) -> None:
        parameter.data.copy_(whole)
        if not run.alike:
            run.put(run.flat, whole)

    def loaded(self) -> None:
        pass


class Sharded:
    """Stage 3: this rank's part of each parameter, gathered where a module needs it."""

    partitioned = True
    whole = False

    def __init__(self, engine: Any, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._zero = engine.optimizer

    def collect(self) -> None:
        self._zero.finalize_gradient_accumulation_boundary()
        if self._zero.offload_optimizer:
            _synchronise(self._parameters)

    def gradients(self) -> list[Tensor]:
        zero = self._zero
        if zero.offload_optimizer:
            return [flat.grad for flat in zero.fp32_partitioned_groups_flat]
        return [g for group in zero.averaged_gradients.values() for g in group or ()]

    def step(self) -> None:
        self._zero.step()
        self._zero.zero_grad(set_to_none=True)
        self._forget()

    def clear(self) -> None:
        # What DeepSpeed itself does when it skips a step for an overflow.
        zero = self._zero
        zero._pre_step()
        zero._partition_all_parameters()
        zero._overflow_clean_up(zero.loss_scale)
        self._forget()

    def _forget(self) -> None:
        # DeepSpeed overwrites them only for parameters that the next step uses.
        for gradient in self._buffers():
            gradient.zero_()
        if self._zero.offload_optimizer:
            for gradient in self.gradients():
                gradient.zero_()

    def _buffers(self) -> list[Tensor]:
        name = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
        held: dict[int, Tensor] = getattr(self._zero, name)
        return list(held.values())

    def runs(self) -> dict[int, Run]:
        zero = self._zero
        found = {}
        for parameter in self._parameters:
            part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            start = part.numel() * zero._get_param_partition_rank(parameter)
            count = max(0, min(part.numel(), parameter.ds_numel - start))  # type: ignore[attr-defined]
            flat, offset = part, 0
            if parameter.requires_grad:
                index, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
                flat = zero.fp32_partitioned_groups_flat[index]
            found[id(parameter)] = Run(flat, offset, start if count else 0, count)
        return found

    def put(self, parameter: nn.Parameter, run: Run, whole: Tensor) -> None:
        run.put(run.flat, whole)

    def loaded(self) -> None:
        # As after a step: the parts that modules gather are made from what is updated.
        zero = self._zero
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _whole(parameter: nn.Parameter) -> Run:
    return Run(parameter, 0, 0, parameter.numel(), alike=True)


def _synchronise(parameters: list[nn.Parameter]) -> None:
    device = parameters[0].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


STAGES: tuple[type[Any], ...] = (Replicated, Partitioned, Partitioned, Sharded)
