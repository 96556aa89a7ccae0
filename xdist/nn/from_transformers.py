"""Weights of HuggingFace Transformers' layers under the names of xdist's mixers.

Pure renames, cuts and reorderings of tensors: nothing of `transformers` is imported, and since
they are linear, gradients may be renamed the same way. Which layers are the same: docs/mixers.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from xdist.errors import ConfigError, ShapeError
from xdist.nn.gated_deltanet import GatedDeltaNet
from xdist.nn.kda import KDA
from xdist.nn.lightning import LightningAttention
from xdist.nn.mamba import Mamba
from xdist.nn.mamba2 import Mamba2

Weights = Mapping[str, Tensor]

# xdist's name: theirs. Names with a bias are there only where the layer has one.
_MAMBA = {
    "proj": "in_proj.weight",
    "proj_bias": "in_proj.bias",
    "conv": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "select": "x_proj.weight",
    "step": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "A_log": "A_log",
    "D": "D",
    "out": "out_proj.weight",
    "out_bias": "out_proj.bias",
}
_MAMBA2 = {key: _MAMBA[key] for key in _MAMBA if key not in ("select", "step", "dt_bias")} | {
    "dt_bias": "dt_bias",
    "norm": "norm.weight",
}
_LIGHTNING = {
    "qkv": "qkv_proj.weight",
    "norm.weight": "norm.weight",
    "gate": "output_gate.weight",
    "out": "out_proj.weight",
}
_KDA = {
    "conv": "conv1d.weight",
    "beta": "b_proj.weight",
    "decay_down": "forget_gate.f_a_proj.weight",
    "decay_up": "forget_gate.f_b_proj.weight",
    "A_log": "forget_gate.A_log",
    "dt_bias": "forget_gate.dt_bias",
    "gate_down": "g_a_proj.weight",
    "gate_up": "g_b_proj.weight",
    "norm.weight": "o_norm.weight",
    "out": "o_proj.weight",
}
_DELTA = {"conv": "conv1d.weight", "A_log": "A_log", "dt_bias": "dt_bias"}
# The gated delta net of Qwen3-Next and Qwen3.5, and that of OLMo-Hybrid.
_QWEN = _DELTA | {"norm.weight": "norm.weight", "out": "out_proj.weight"}
_QWEN35 = _QWEN | {
    "qkv": "in_proj_qkv.weight",
    "gate": "in_proj_z.weight",
    "beta": "in_proj_b.weight",
    "decay": "in_proj_a.weight",
}
_OLMO = _DELTA | {
    "norm.weight": "o_norm.weight",
    "out": "o_proj.weight",
    "gate": "g_proj.weight",
    "beta": "b_proj.weight",
    "decay": "a_proj.weight",
}
_JOINED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


def renamed(mixer: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """The tensors of a Transformers layer under the names and in the order of `mixer`'s.

    Args:
        mixer: Mamba, Mamba2, GatedDeltaNet, KDA or LightningAttention, of the layer's sizes.
        weights: `layer.state_dict()`, or gradients by the same names.

    Raises:
        ConfigError: a mixer that no layer of theirs equals, or names that are missing or unknown.
    """
    rename = next((made for kind, made in _RENAMES.items() if isinstance(mixer, kind)), None)
    if rename is None:
        raise ConfigError(
            f"no layer of Transformers is known to equal {type(mixer).__name__}",
            f"known are {', '.join(kind.__name__ for kind in _RENAMES)}",
        )
    left = dict(weights)
    try:
        found = rename(mixer, left)
    except KeyError as missing:
        raise ConfigError(
            f"the layer has no tensor {missing} that {type(mixer).__name__} needs",
            f"it has {', '.join(sorted(weights))}",
        ) from missing
    if left:
        raise ConfigError(
            f"{type(mixer).__name__} has no place for {', '.join(sorted(left))}",
            "a layer with more tensors is another layer",
        )
    return found


def copy_weights(mixer: nn.Module, weights: Weights) -> None:
    """Copies the tensors of a Transformers layer, `layer.state_dict()`, into `mixer`.

    Raises:
        ConfigError: as `renamed`.
        ShapeError: a tensor of another shape than the mixer's.
    """
    found = renamed(mixer, weights)
    own = dict(mixer.named_parameters())
    wrong = [
        f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}"
        if name in own
        else f"{name} {tuple(tensor.shape)}, which the mixer was built without"
        for name, tensor in found.items()
        if name not in own or own[name].shape != tensor.shape
    ]
    wrong += [f"{name}, which the layer does not have" for name in own if name not in found]
    if wrong:
        raise ShapeError(
            f"the layer does not fit this {type(mixer).__name__}",
            "; ".join(wrong),
            "build the mixer with the sizes of the layer's configuration",
        )
    with torch.no_grad():
        for name, tensor in found.items():
            own[name].copy_(tensor)


def _take(names: Mapping[str, str], left: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by xdist's names, out of `left`; a convolution loses its dim of one channel."""
    found = {
        own: left.pop(theirs)
        for own, theirs in names.items()
        if theirs in left or not theirs.endswith(".bias")
    }
    if "conv" in found:
        found["conv"] = found["conv"].squeeze(1)
    return found


def _mamba(mixer: nn.Module, left: dict[str, Tensor]) -> dict[str, Tensor]:
    return _take(_MAMBA, left)


def _mamba2(mixer: nn.Module, left: dict[str, Tensor]) -> dict[str, Tensor]:
    return _take(_MAMBA2, left)


def _lightning(mixer: nn.Module, left: dict[str, Tensor]) -> dict[str, Tensor]:
    for made in ("slope_rate", "query_decay", "key_decay", "diagonal_decay"):
        left.pop(made, None)
    return _take(_LIGHTNING, left)


def _kda(mixer: nn.Module, left: dict[str, Tensor]) -> dict[str, Tensor]:
    found = _take(_KDA, left)
    found["A_log"] = found["A_log"].flatten()
    return found | {"qkv": torch.cat([left.pop(name) for name in _JOINED])}


def _gated_deltanet(mixer: nn.Module, left: dict[str, Tensor]) -> dict[str, Tensor]:
    if "in_proj_qkv.weight" in left:
        return _take(_QWEN35, left)
    if "in_proj_qkvz.weight" not in left:
        found = _take(_OLMO, left)
        return found | {"qkv": torch.cat([left.pop(name) for name in _JOINED])}
    assert isinstance(mixer, GatedDeltaNet)
    # One row block a key head: its q, k, then v and z of the value heads that share it.
    shared = mixer.heads // mixer.key_heads
    values = shared * mixer.value_dim
    blocks = left.pop("in_proj_qkvz.weight").unflatten(0, (mixer.key_heads, -1))
    parts = blocks.split([mixer.key_dim, mixer.key_dim, values, values], 1)
    q, k, v, z = (part.flatten(0, 1) for part in parts)
    pairs = left.pop("in_proj_ba.weight").unflatten(0, (mixer.key_heads, 2, shared))
    beta, decay = (pairs[:, place].flatten(0, 1) for place in (0, 1))
    found = {"qkv": torch.cat([q, k, v]), "gate": z, "beta": beta, "decay": decay}
    return found | _take(_QWEN, left)


_RENAMES: dict[type[nn.Module], Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]] = {
    Mamba: _mamba,
    Mamba2: _mamba2,
    GatedDeltaNet: _gated_deltanet,
    KDA: _kda,
    LightningAttention: _lightning,
}
