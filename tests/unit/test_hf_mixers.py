"""Mixers equal the same layers of HuggingFace Transformers: outputs and every gradient.

Transformers computes its recurrences in float32 whatever the layer's dtype. Each layer is compared
twice: as it is, and with its float32 casts made float64 ones, which leaves no rounding to hide in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xdist.errors import ConfigError, ShapeError
from xdist.nn import build_mixer
from xdist.nn.from_transformers import copy_weights, renamed
from xdist.testing import relative_error

DIM = 32
TOKENS = 150  # more than two of their chunks of 64


@dataclass(frozen=True)
class Same:
    """A layer of Transformers and the mixer that equals it."""

    layer: Callable[[], nn.Module]
    mixer: str
    options: dict[str, Any] = field(default_factory=dict)
    call: Callable[[nn.Module, Tensor], Tensor] = lambda layer, x: layer(x)


def mamba() -> nn.Module:
    from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

    return MambaMixer(MambaConfig(hidden_size=DIM, state_size=4, num_hidden_layers=1), 0)


def mamba2(**sizes: Any) -> nn.Module:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer

    held = {"hidden_size": DIM, "state_size": 8, "head_dim": 8, "num_heads": 8, "n_groups": 2}
    held |= {"num_hidden_layers": 1, "chunk_size": 64}
    return Mamba2Mixer(Mamba2Config(**(held | sizes)), 0)


def bamba() -> nn.Module:
    from transformers.models.bamba.modeling_bamba import BambaConfig, BambaMixer

    config = BambaConfig(
        hidden_size=DIM, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
        mamba_chunk_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return BambaMixer(config, 0)


def nemotron_h() -> nn.Module:
    from transformers.models.nemotron_h import modeling_nemotron_h as module

    config = module.NemotronHConfig(
        hidden_size=DIM, mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=8, n_groups=2,
        chunk_size=64, expand=2, num_hidden_layers=1, layers_block_type=["mamba"],
    )  # fmt: skip
    return module.NemotronHMamba2Mixer(config, 0)


def granite_hybrid() -> nn.Module:
    from transformers.models.granitemoehybrid import modeling_granitemoehybrid as module

    config = module.GraniteMoeHybridConfig(
        hidden_size=DIM, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
        mamba_chunk_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        layer_types=["mamba"],
    )  # fmt: skip
    return module.GraniteMoeHybridMambaLayer(config, 0)


GDN = {
    "hidden_size": DIM,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}


def qwen3_next() -> nn.Module:
    from transformers.models.qwen3_next import modeling_qwen3_next as module

    return module.Qwen3NextGatedDeltaNet(module.Qwen3NextConfig(**GDN), 0)


def qwen3_5() -> nn.Module:
    from transformers.models.qwen3_5 import modeling_qwen3_5 as module

    return module.Qwen3_5GatedDeltaNet(module.Qwen3_5TextConfig(**GDN), 0)


def olmo_hybrid() -> nn.Module:
    from transformers.models.olmo_hybrid import modeling_olmo_hybrid as module

    return module.OlmoHybridGatedDeltaNet(module.OlmoHybridConfig(**GDN), 0)


def kimi_linear() -> nn.Module:
    from transformers.models.kimi_linear import modeling_kimi_linear as module

    config = module.KimiLinearConfig(
        hidden_size=DIM, linear_num_heads=4, linear_head_dim=8, num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    return module.KimiLinearDeltaAttention(config, 0)


def minimax() -> nn.Module:
    from transformers.models.minimax import modeling_minimax as module

    config = module.MiniMaxConfig(
        hidden_size=DIM, num_attention_heads=4, head_dim=8, num_hidden_layers=4, block_size=64
    )
    return module.MiniMaxLightningAttention(config, 1)


GATED = {"heads": 4, "key_heads": 2, "head_dim": 8, "expand_v": 2.0}
SAME = {
    "Mamba": Same(mamba, "mamba", {"state_dim": 4}),
    "Mamba-2": Same(mamba2, "mamba2", {"head_dim": 8, "state_dim": 8, "groups": 2}),
    "Bamba": Same(bamba, "mamba2", {"head_dim": 8, "state_dim": 8, "eps": 1e-5}),
    "Nemotron-H": Same(nemotron_h, "mamba2", {"head_dim": 8, "state_dim": 8, "groups": 2}),
    "Granite 4": Same(granite_hybrid, "mamba2", {"head_dim": 8, "state_dim": 8, "eps": 1e-6}),
    "Qwen3-Next": Same(qwen3_next, "gated_deltanet", GATED),
    "Qwen3.5": Same(qwen3_5, "gated_deltanet", GATED),
    "OLMo-Hybrid": Same(
        olmo_hybrid, "gated_deltanet", GATED | {"eps": 1e-5, "negative_eigenvalues": True}
    ),
    "Kimi Linear": Same(kimi_linear, "kda", {"heads": 4, "head_dim": 8}),
    "MiniMax": Same(
        minimax,
        "lightning",
        {"head_dim": 8, "layer": 1, "layers": 4},
        lambda layer, x: layer(x, None, None)[0],
    ),
}


@contextmanager
def casts_in_float64() -> Iterator[None]:
    """Inside, `.float()` and `.to(torch.float32)` give float64."""
    plain_to, plain_float = torch.Tensor.to, torch.Tensor.float

    def wider(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def to(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        options = {key: wider(value) for key, value in options.items()}
        return plain_to(tensor, *(wider(value) for value in args), **options)

    torch.Tensor.to, torch.Tensor.float = to, torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float = plain_to, plain_float  # type: ignore[method-assign]


def drawn(same: Same, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Their layer and ours with its weights, x and the gradient of the output."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        theirs = same.layer().train()
    finally:
        torch.set_default_dtype(torch.float32)
    theirs = theirs.to(dtype)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("A_log") and same.mixer != "mamba":
                # Memories of some hundred tokens: what lies chunks back then counts.
                parameter.uniform_(-6.0, -2.0)
            elif "norm" in name or name.endswith(("bias", "D")):
                parameter.uniform_(0.5, 1.0)
    ours = build_mixer(same.mixer, DIM, **same.options).to(dtype)
    copy_weights(ours, theirs.state_dict())
    x, dout = torch.randn(2, 2, TOKENS, DIM, dtype=dtype).unbind(0)
    return theirs, ours, x.requires_grad_(), dout


def errors(same: Same, dtype: torch.dtype) -> dict[str, float]:
    theirs, ours, x, dout = drawn(same, dtype)
    out = ours(x)
    dx, *grads = torch.autograd.grad(out, [x, *ours.parameters()], dout)
    own = dict(zip((name for name, _ in ours.named_parameters()), grads, strict=True))
    want = same.call(theirs, x)
    held = dict(theirs.named_parameters())
    want_dx, *wants = torch.autograd.grad(want, [x, *held.values()], dout)
    wanted = renamed(ours, dict(zip(held, wants, strict=True)))
    assert set(own) == set(wanted)
    found = {name: relative_error(own[name], wanted[name]) for name in own}
    return found | {"y": relative_error(out, want), "dx": relative_error(dx, want_dx)}


@pytest.mark.parametrize("name", SAME)
def test_layer_equals_that_of_transformers_in_float64(name: str) -> None:
    with casts_in_float64():
        found = errors(SAME[name], torch.float64)
    assert max(found.values()) < 1e-9, found


@pytest.mark.parametrize("name", SAME)
def test_layer_equals_that_of_transformers_in_float32(name: str) -> None:
    """As Transformers runs it."""
    found = errors(SAME[name], torch.float32)
    assert max(found.values()) < 1e-4, found


def test_a_layer_that_is_not_the_same_is_refused() -> None:
    weights = mamba2().state_dict()
    with pytest.raises(ShapeError, match=r"conv \(96, 4\) for \(80, 4\)"):
        copy_weights(build_mixer("mamba2", DIM, head_dim=8, state_dim=8), weights)
    unbiased = build_mixer("mamba2", DIM, head_dim=8, state_dim=8, groups=2, conv_bias=False)
    with pytest.raises(ShapeError, match=r"conv_bias .* built without"):
        copy_weights(unbiased, weights)
    with pytest.raises(ConfigError, match="no place for extra"):
        renamed(build_mixer("mamba2", DIM, head_dim=8), weights | {"extra": torch.zeros(1)})
    with pytest.raises(ConfigError, match=r"no tensor 'x_proj\.weight'"):
        renamed(build_mixer("mamba", DIM), weights)
    with pytest.raises(ConfigError, match="known to equal GLA"):
        renamed(build_mixer("gla", DIM), weights)
