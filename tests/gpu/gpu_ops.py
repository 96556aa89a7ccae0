"""The operations that are measured on a card: their inputs, our call, and a rival's call.

Inputs are drawn on the device in float32 and rounded to the dtype under test, but for decays, which
both sides get in float32. All names are those of `xdist`'s functions; a rival is called through
its public function, with the same leaves (transposed in memory where it wants channels first).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize, softplus

import xdist

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Batch is 1. key and value: dims of a head; state: of selective_scan; channels: its width."""

    tokens: int
    heads: int = 16
    key: int = 128
    value: int = 128
    state: int = 16
    channels: int = 2048


@dataclass(frozen=True)
class Op:
    """One operation.

    draw: (sizes, generator) -> float32 inputs. call: (inputs, options) -> outputs by `xdist`,
    options being shard and backend. rival: distribution and path of the function; theirs: its call
    on (function, inputs, cu_seqlens or None). first: it wants channels before tokens. flops: of
    one forward pass, None where no matrix product is needed. wide: inputs that stay float32.
    """

    name: str
    draw: Callable[[Sizes, torch.Generator], Inputs]
    call: Callable[..., Any]
    rival: tuple[str, str] | None = None
    theirs: Callable[..., Tensor] | None = None
    first: bool = False
    flops: Callable[[Sizes], float] | None = None
    wide: tuple[str, ...] = ("log_decay", "dt", "A", "D")


def _normal(sizes: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(sizes, generator=generator, device=generator.device)


def _qkv(s: Sizes, g: torch.Generator) -> Inputs:
    return {
        "q": _normal((1, s.tokens, s.heads, s.key), g),
        "k": _normal((1, s.tokens, s.heads, s.key), g) * s.key**-0.5,
        "v": _normal((1, s.tokens, s.heads, s.value), g),
    }


def _fixed(s: Sizes, g: torch.Generator) -> Inputs:
    heads = torch.arange(s.heads, dtype=torch.float64, device=g.device)
    return _qkv(s, g) | {"log_decay": torch.log1p(-torch.exp2(-5.0 - heads)).float()}


def _scalar(s: Sizes, g: torch.Generator) -> Inputs:
    return _qkv(s, g) | {"log_decay": logsigmoid(_normal((1, s.tokens, s.heads), g) + 2.0)}


def _diagonal(s: Sizes, g: torch.Generator) -> Inputs:
    decay = logsigmoid(_normal((1, s.tokens, s.heads, s.key), g)) / 16.0
    return _qkv(s, g) | {"log_decay": decay}


def _hgrn2(s: Sizes, g: torch.Generator) -> Inputs:
    """Keys are 1 - decay, as HGRN-2 ties them; as leaves both are independent."""
    found = _diagonal(s, g)
    return found | {"k": -torch.expm1(found["log_decay"])}


def _delta(decays: Callable[[Sizes, torch.Generator], Inputs]) -> Any:
    def draw(s: Sizes, g: torch.Generator) -> Inputs:
        found = decays(s, g)
        beta = _normal((1, s.tokens, s.heads), g).sigmoid()
        return found | {"k": normalize(found["k"], dim=-1), "beta": beta}

    return draw


def _ssd(s: Sizes, g: torch.Generator) -> Inputs:
    return {
        "x": _normal((1, s.tokens, s.heads, s.value), g),
        "dt": softplus(_normal((1, s.tokens, s.heads), g) - 3.0),
        "A": -torch.exp(0.5 * _normal((s.heads,), g)),
        "B": _normal((1, s.tokens, 1, s.key), g),
        "C": _normal((1, s.tokens, 1, s.key), g) * s.key**-0.5,
        "D": torch.ones(s.heads, device=g.device),
    }


def _selective(s: Sizes, g: torch.Generator) -> Inputs:
    rates = torch.arange(1.0, s.state + 1.0, device=g.device).repeat(s.channels, 1)
    return {
        "u": _normal((1, s.tokens, s.channels), g),
        "delta": softplus(_normal((1, s.tokens, s.channels), g) - 3.0),
        "A": -rates,
        "B": _normal((1, s.tokens, s.state), g),
        "C": _normal((1, s.tokens, s.state), g),
        "D": torch.ones(s.channels, device=g.device),
    }


def _conv(s: Sizes, g: torch.Generator) -> Inputs:
    return {
        "x": _normal((1, s.tokens, s.channels), g),
        "weight": _normal((s.channels, 4), g) / 2,
        "bias": _normal((s.channels,), g),
    }


def _ours(name: str, **fixed: Any) -> Callable[..., Any]:
    def call(inputs: Inputs, **options: Any) -> Any:
        return getattr(xdist, name)(**inputs, **fixed, **options)

    return call


CHUNK = 64


def _linear_flops(s: Sizes) -> float:
    """Chunks of 64 tokens: scores, their product with values, state read and written."""
    a_token = 2 * CHUNK * (s.key + s.value) + 4 * s.key * s.value
    return float(s.tokens * s.heads * a_token)


def _delta_flops(s: Sizes) -> float:
    """Besides: products of keys, W and U, and what the state already holds of the values."""
    a_token = CHUNK * (6 * s.key + 4 * s.value) + 6 * s.key * s.value
    return float(s.tokens * s.heads * a_token)


def _fla(function: Any, x: Inputs, cu: Tensor | None) -> Tensor:
    """The common shape of fla-core's functions: decays are `g`, documents `cu_seqlens`."""
    names = {name: "g" if name == "log_decay" else name for name in x}
    return function(**{names[name]: value for name, value in x.items()}, cu_seqlens=cu)[0]


def _fla_plain(function: Any, x: Inputs, cu: Tensor | None) -> Tensor:
    return function(**x, normalize=False, cu_seqlens=cu)[0]


def _fla_fixed(function: Any, x: Inputs, cu: Tensor | None) -> Tensor:
    return function(x["q"], x["k"], x["v"], g_gamma=x["log_decay"].detach(), cu_seqlens=cu)[0]


def _mamba2(function: Any, x: Inputs, cu: Tensor | None) -> Tensor:
    return function(x["x"], x["dt"], x["A"], x["B"], x["C"], chunk_size=256, D=x["D"])


def _mamba(function: Any, x: Inputs, cu: Tensor | None) -> Tensor:
    return function(x["u"], x["delta"], x["A"], x["B"], x["C"], x["D"])


def _conv1d(function: Any, x: Inputs, cu: Tensor | None) -> Tensor:
    return function(x["x"], x["weight"], x["bias"], activation="silu")


def _of_fla(path: str) -> tuple[str, str]:
    return "fla-core", f"fla.ops.{path}"


_MAMBA = "mamba_ssm.ops"
_linear, _delta_rule = _ours("linear_attention"), _ours("delta_rule")
LINEAR = (
    Op("linear", _qkv, _linear, _of_fla("linear_attn.chunk_linear_attn"), _fla_plain,
       flops=_linear_flops),
    Op("retention", _fixed, _linear, _of_fla("simple_gla.chunk_simple_gla"), _fla_fixed,
       flops=_linear_flops),
    Op("scalar decay", _scalar, _linear, _of_fla("simple_gla.chunk_simple_gla"), _fla,
       flops=_linear_flops),
    Op("GLA", _diagonal, _linear, _of_fla("gla.chunk_gla"), _fla, flops=_linear_flops),
    Op("HGRN-2", _hgrn2, _linear, _of_fla("gla.chunk_gla"), _fla, flops=_linear_flops),
)  # fmt: skip
DELTA = (
    Op("DeltaNet", _delta(_qkv), _delta_rule, _of_fla("delta_rule.chunk_delta_rule"), _fla,
       flops=_delta_flops),
    Op("Gated DeltaNet", _delta(_scalar), _delta_rule,
       _of_fla("gated_delta_rule.chunk_gated_delta_rule"), _fla, flops=_delta_flops),
    Op("KDA", _delta(_diagonal), _delta_rule, _of_fla("kda.chunk_kda"), _fla,
       flops=_delta_flops),
)  # fmt: skip
STATE_SPACE = (
    Op("Mamba-2 (ssd)", _ssd, _ours("ssd"),
       ("mamba_ssm", f"{_MAMBA}.triton.ssd_combined.mamba_chunk_scan_combined"), _mamba2,
       flops=_linear_flops),
    Op("Mamba (selective_scan)", _selective, _ours("selective_scan"),
       ("mamba_ssm", f"{_MAMBA}.selective_scan_interface.selective_scan_fn"), _mamba, first=True),
)  # fmt: skip
CONV = Op(
    "causal_conv1d", _conv, _ours("causal_conv1d", activation="silu"),
    ("causal-conv1d", "causal_conv1d.causal_conv1d_fn"), _conv1d, first=True,
)  # fmt: skip
OPS = (*LINEAR, *DELTA, *STATE_SPACE, CONV)


def leaves(op: Op, sizes: Sizes, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Inputs on the device, rounded to `dtype` but for those that stay float32."""
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        drawn = op.draw(sizes, generator)
        return {name: x if name in op.wide else x.to(dtype) for name, x in drawn.items()}


def turned(op: Op, inputs: Inputs) -> Inputs:
    """The inputs as the rival lays them out, or back again: it is its own inverse."""
    if not op.first:
        return inputs
    return {n: x.transpose(1, 2).contiguous() if x.dim() == 3 else x for n, x in inputs.items()}


def required(inputs: Inputs) -> Inputs:
    """The same values as leaves that want a gradient."""
    return {name: x.detach().requires_grad_() for name, x in inputs.items()}


def shard_of(tokens: int, device: str, cuts: list[int] | None = None) -> xdist.SequenceShard:
    """One rank that holds everything, with documents where `cuts` tells them."""
    mesh = xdist.Mesh.one_rank(device)
    return xdist.SequenceShard(mesh, xdist.Layout.contiguous(tokens, 1), cuts)


def moved_bytes(inputs: Inputs, out: Tensor, *, backward: bool) -> int:
    """The fewest bytes: each input read and output written once; backward reads inputs and the
    output's gradient and writes the inputs'."""
    own = sum(x.numel() * x.element_size() for x in inputs.values())
    made = out.numel() * out.element_size()
    return 3 * own + 2 * made if backward else own + made


def relative(found: Tensor, reference: Tensor) -> float:
    """|found - reference| / |reference|, root mean squares; NaN stays NaN."""
    found, reference = found.double(), reference.double()
    size = float(reference.norm())
    return float((found - reference).norm()) / size if size else float((found != 0).any())


def geometric_mean(values: list[float]) -> float:
    """NaN where there are none."""
    if not values:
        return math.nan
    return math.exp(sum(math.log(value) for value in values) / len(values))
