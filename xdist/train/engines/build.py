"""The engine that a config names."""

from __future__ import annotations

from torch import nn

from xdist.config import Config
from xdist.mesh import Mesh
from xdist.train.engines.plain import PlainEngine
from xdist.train.engines.protocol import Engine


def build_engine(config: Config, module: nn.Module, mesh: Mesh) -> Engine:
    """The engine of `config.engine`, which takes over the parameters of `module`.

    Every rank calls it with the same values in `module`, on `mesh.device`. On one rank there is
    nothing to partition: fsdp is the plain engine there.

    Raises ConfigError for a model that the engine cannot hold, and LaunchError when the library
    that it needs is absent.
    """
    chosen = config.engine
    if chosen.name == "plain" or (chosen.name == "fsdp" and mesh.parameter_group is None):
        return PlainEngine(module, config.optimizer, mesh)
    if chosen.name == "fsdp":
        from xdist.train.engines.fsdp import FsdpEngine

        return FsdpEngine(module, config.optimizer, mesh, reshard=chosen.reshard)
    from xdist.train.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(module, config, mesh)
