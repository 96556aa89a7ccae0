"""DeepSpeed's ZeRO behind the protocol of engines: the one file that imports it.

What is sharded, over data x sequence ranks together: at stage 1 the optimizer state, at stage 2
also gradients, at stage 3 also parameters. What moves: the formulas of `xdist.cost.zero`. What is
saved: flat parts, of equal size on all ranks, in float32. What must divide what: nothing;
DeepSpeed pads the last parts.

DeepSpeed is not told of sequence ranks: to it they are data ranks. This file owns what its stages
do differently: the scale of gradients, clipping, what a skipped step leaves, saving.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from xdist.checkpoint.pieces import Piece, Spec
from xdist.comm.collectives import ProcessGroup, naming_lost_peers
from xdist.comm.reduce import start_reduce
from xdist.comm.worlds import lone_group
from xdist.config import Config
from xdist.errors import ConfigError, LaunchError
from xdist.mesh import Mesh
from xdist.train.engines.deepspeed_config import render
from xdist.train.engines.deepspeed_stages import STAGES, Stage
from xdist.train.engines.deepspeed_state import State
from xdist.train.engines.protocol import Read
from xdist.train.gradients import clip_factor, gradient_norms
from xdist.train.optimizer import build_optimizers, set_rates, trained

# Variables of launchers that DeepSpeed reads, at the start and at stage 3 in forward passes: it
# would take the device from them.
_HEARD = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
RELEASE = "0.19"


class DeepSpeedEngine:
    """ZeRO at stage `config.engine.zero_stage`.

    Raises:
        ConfigError: the model has nothing to train, or DeepSpeed refuses a key it was passed.
        LaunchError: DeepSpeed is absent, of another release, or was imported for another device.
    """

    def __init__(self, module: nn.Module, config: Config, mesh: Mesh) -> None:
        self.module = module
        self._mesh = mesh
        self._clip_norm = config.optimizer.clip_norm
        self._part_norms: dict[str, Tensor] = {}
        self._bad: dict[str, Tensor] = {}
        optimizer = _one_optimizer(module, config)
        self._state = State(module, optimizer)
        self._watch()
        _without_empty(module)
        parameters = list(module.parameters())
        elements = sum(p.numel() for p in parameters if p.requires_grad)
        self._optimizers = [optimizer]
        # First: nothing is left behind where it is absent.
        deepspeed = _imported(mesh)
        self._group: ProcessGroup = mesh.parameter_group or lone_group(mesh.device)
        # Groups of its own would have torch's time limit instead of this run's.
        deepspeed.utils.groups._WORLD_GROUP = self._group
        settings = render(config.engine, elements=elements)
        with _device_of(mesh), self._exchanging():
            self._engine = _initialise(deepspeed, _Loss(module), optimizer, settings)
        self._stage: Stage = STAGES[config.engine.zero_stage](self._engine, parameters)

    def loss(self, tokens: Tensor, labels: Tensor, shard: Any, *, valid_tokens: int) -> Tensor:
        """`module.loss` under DeepSpeed's hooks, which gather parameters at stage 3."""
        with _device_of(self._mesh), self._exchanging():
            loss: Tensor = self._engine(tokens, labels, shard, valid_tokens=valid_tokens)
        return loss

    def backward(self, loss: Tensor) -> None:
        """Add this rank's part of the gradients; stages 2 and 3 reduce them here.

        DeepSpeed divides by the number of ranks at every stage, and the gradient is the SUM of
        their parts: this factor is the only place where that is made up for.
        """
        with self._exchanging():
            self._engine.backward(loss * self._mesh.world_size, scale_wrt_gas=False)

    @torch.no_grad()
    def finish(self) -> float:
        """Clip by the norm over all ranks; one float64 number is summed where they differ."""
        self._bad, self._part_norms = self._part_norms, {}
        with self._exchanging():
            self._stage.collect()
        gradients = self._stage.gradients()
        own = torch.zeros(1, dtype=torch.float64, device=self._mesh.device)
        for norm in gradient_norms(gradients):
            own += norm.to(own) ** 2
        if self._stage.partitioned:
            own = start_reduce(own, self._mesh.parameter_group).wait()
        whole = float(own.sqrt())
        factor = clip_factor(whole, self._clip_norm)
        if factor < 1:
            for gradient in gradients:
                gradient.mul_(factor)
        return whole

    def update(self, learning_rate: float) -> None:
        """One step of the optimizer on this rank's parts; stages 1 and 2 gather the parameters."""
        set_rates(self._optimizers, learning_rate)
        with self._exchanging():
            self._stage.step()

    def drop(self) -> None:
        """Forget the gradients, as DeepSpeed does on an overflow."""
        self._stage.clear()

    def bad_parameter(self) -> str:
        """The first parameter whose part of the gradient on this rank was not finite, or ""."""
        names = [name for name, norm in self._bad.items() if not torch.isfinite(norm)]
        return next((name for name in self._names if name in names), "")

    def specs(self) -> dict[str, Spec]:
        """As the plain engine."""
        return self._state.specs()

    def pieces(self) -> dict[str, Piece]:
        """The runs this rank holds; rank 0 also what all hold alike."""
        return self._state.pieces(self._stage.runs(), self._mesh.world_rank)

    @torch.no_grad()
    def load(self, read: Read) -> None:
        """Every rank keeps its own runs of each tensor."""
        self._state.load(read, self._stage, self._stage.runs())

    def replicated(self) -> Iterable[tuple[str, Tensor]]:
        """Parameters and buffers below stage 3; at stage 3 buffers."""
        return self._state.replicated(parameters=self._stage.whole)

    def _exchanging(self) -> AbstractContextManager[None]:
        """Around calls in which DeepSpeed exchanges: a rank that is gone is named."""
        return naming_lost_peers("deepspeed", self._group)

    def _watch(self) -> None:
        """Norms of this rank's own gradients: after DeepSpeed's sums nobody could tell them."""
        self._names = list(trained(self.module))
        for name, parameter in trained(self.module).items():
            parameter.register_hook(self._noting(name))

    def _noting(self, name: str) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            (norm,) = gradient_norms([gradient.detach()])
            before = self._part_norms.get(name)
            self._part_norms[name] = norm if before is None else norm + before

        return note


class _Loss(nn.Module):
    """A module whose forward is `module.loss`: DeepSpeed's hooks hang on forward passes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **options: Any) -> Tensor:
        loss: Tensor = self.module.loss(*args, **options)  # type: ignore[operator]
        return loss


def _one_optimizer(module: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimizer of the plain engine, which works on single elements and so on flat parts."""
    found = build_optimizers(module, config.optimizer)
    if len(found) != 1:
        raise ConfigError(
            'engine.name = "deepspeed" takes one optimizer',
            f'optimizer.name = "{config.optimizer.name}" makes {len(found)} for this model',
            "set optimizer.name=adamw and train at least one parameter, or engine.name=plain",
        )
    return found[0]


def _without_empty(module: nn.Module) -> None:
    """Make parameters without elements buffers: there is nothing to train, and stage 3 fails."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.numel() == 0:
                delattr(part, name)
                part.register_buffer(name, parameter.detach())


def _initialise(
    deepspeed: Any, module: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> Any:
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p.numel()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            engine, _, _, _ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings
            )
        except (ValueError, AssertionError) as error:
            raise ConfigError(
                "DeepSpeed refuses its configuration", str(error), "correct engine.deepspeed"
            ) from error
    return engine


def _imported(mesh: Mesh) -> Any:
    """DeepSpeed for the device of `mesh`, quiet, and without anything it would compile."""
    if mesh.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
            from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        raise LaunchError(
            "DeepSpeed is absent",
            str(error),
            "pip install 'xdist-train[deepspeed]', or set engine.name=fsdp",
        ) from error
    if not deepspeed.__version__.startswith(f"{RELEASE}."):
        raise LaunchError(
            f"DeepSpeed {deepspeed.__version__} is not the release that xdist knows",
            f"its gradient and partition buffers are read, and were checked for {RELEASE}",
            f"pip install 'deepspeed=={RELEASE}.*', or set engine.name=fsdp",
        )
    if get_accelerator().device_name() != mesh.device.type:
        raise LaunchError(
            f"DeepSpeed was set up for {get_accelerator().device_name()}",
            f"this run is on {mesh.device}; it was imported before, or DS_ACCELERATOR says so",
            f"set DS_ACCELERATOR={mesh.device.type}",
        )
    deepspeed.utils.logger.setLevel("ERROR")
    # Which of its own kernels could be built it finds out by running compilers, and it builds an
    # all-reduce for CPUs at once. None of them is needed: with the answer there, it asks nobody.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    # It calls names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    return deepspeed


@contextmanager
def _device_of(mesh: Mesh) -> Iterator[None]:
    """DeepSpeed takes the device from LOCAL_RANK: for a while it is that of `mesh`."""
    kept = {name: value for name, value in os.environ.items() if name in _HEARD}
    for name in kept:
        del os.environ[name]
    os.environ["LOCAL_RANK"] = str(mesh.device.index or 0)
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        os.environ.update(kept)
