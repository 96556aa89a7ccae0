"""The engine that a config names."""

from __future__ import annotations

from torch import nn

from xdist.config import Config
from xdist.errors import ConfigError
from xdist.mesh import Mesh
from xdist.train.engines.plain import PlainEngine
from xdist.train.engines.protocol import Engine


def build_engine(config: Config, module: nn.Module, mesh: Mesh) -> Engine:
    """The engine of `config.engine`, which takes over the parameters of `module`.

    Every rank calls it with the same values in `module`, on `mesh.device`.
    """
    if config.engine.name == "plain":
        return PlainEngine(module, config.optimizer, mesh)
    raise ConfigError(
        f'engine.name = "{config.engine.name}" is not there yet', "only plain is", "use plain"
    )
