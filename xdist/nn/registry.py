"""Mixers by name: `build_mixer(name, dim, **options)` gives `y = mixer(x, shard)`."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from xdist.errors import ConfigError
from xdist.nn.attention import Attention
from xdist.nn.deltanet import DeltaNet
from xdist.nn.gated_deltanet import GatedDeltaNet
from xdist.nn.gla import GLA
from xdist.nn.hgrn2 import HGRN2
from xdist.nn.kda import KDA
from xdist.nn.lightning import LightningAttention
from xdist.nn.linear import GatedLinearAttention
from xdist.nn.linear_attention import LinearAttention
from xdist.nn.mamba import Mamba
from xdist.nn.mamba2 import Mamba2
from xdist.nn.prefix import PrefixAttention
from xdist.nn.retention import Retention
from xdist.nn.sse import SparseStateExpansion

MIXERS: dict[str, type[nn.Module]] = {
    "attention": Attention,
    "linear": LinearAttention,
    "gated_linear": GatedLinearAttention,
    "retention": Retention,
    "lightning": LightningAttention,
    "gla": GLA,
    "hgrn2": HGRN2,
    "deltanet": DeltaNet,
    "gated_deltanet": GatedDeltaNet,
    "kda": KDA,
    "mamba2": Mamba2,
    "mamba": Mamba,
    "sse": SparseStateExpansion,
    "prefix": PrefixAttention,
}
ALIASES = {"retnet": "retention", "gdn": "gated_deltanet", "mamba1": "mamba", "aaren": "prefix"}


def build_mixer(name: str, dim: int, **options: Any) -> nn.Module:
    """The mixer `name` (or its alias) for width `dim`; options as in its class (docs/mixers.md).

    Raises:
        ConfigError: unknown name, an option the mixer does not have, sizes that do not divide.
    """
    kind = MIXERS.get(ALIASES.get(name, name))
    if kind is None:
        raise ConfigError(
            f"there is no mixer {name!r}", f"the mixers are {', '.join(sorted(MIXERS))}"
        )
    known = [key for key in inspect.signature(kind).parameters if key != "dim"]
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(
            f"mixer {name!r} has no option {', '.join(unknown)}",
            f"its options are {', '.join(known)}",
        )
    return kind(dim, **options)
