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
from torch.nn.attention import SDPBackend, sdpa_kernel
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
class Rival:
    """Another project's function: its name in tables, its path, and call(function, inputs,
    cu_seqlens or None). first: it wants channels before tokens. documents: it takes several."""

    name: str
    path: str
    call: Callable[..., Tensor]
    first: bool = False
    documents: bool = False


@dataclass(frozen=True)
class Op:
    """One operation.

    draw: (sizes, generator) -> float32 inputs. call: (inputs, options) -> outputs by `xdist`,
    options being shard and backend. flops: of one forward pass, None where no matrix product is
    needed. wide: inputs that stay float32.
    """

    name: str
    draw: Callable[[Sizes, torch.Generator], Inputs]
    call: Callable[..., Any]
    rivals: tuple[Rival, ...] = ()
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


def _grouped(s: Sizes, g: torch.Generator) -> Inputs:
    """Four query heads share a key head."""
    groups = max(1, s.heads // 4)
    found = _qkv(s, g)
    scaled = {name: found[name][:, :, :groups].contiguous() for name in "kv"}
    return found | {"k": scaled["k"] * s.key**0.5, "v": scaled["v"]}


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
    # Only documents are told: some functions of older releases know no cu_seqlens.
    documents = {} if cu is None else {"cu_seqlens": cu}
    return function(**{names[name]: value for name, value in x.items()}, **documents)[0]


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


def _flash(backend: str) -> Callable[..., Tensor]:
    """Causal attention by one of torch's fused kernels alone."""

    def call(function: Any, x: Inputs, cu: Tensor | None) -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return function(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return call


def _of_fla(path: str, call: Callable[..., Tensor] = _fla) -> tuple[Rival, ...]:
    return (Rival("fla-core", f"fla.ops.{path}", call, documents=True),)


_SDPA = "torch.nn.functional.scaled_dot_product_attention"
_linear, _delta_rule = _ours("linear_attention"), _ours("delta_rule")
_gla, _simple = _of_fla("gla.chunk_gla"), "simple_gla.chunk_simple_gla"
_ssd_rival = Rival(
    "mamba_ssm", "mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined", _mamba2
)
_scan_rival = Rival(
    "mamba_ssm", "mamba_ssm.ops.selective_scan_interface.selective_scan_fn", _mamba, first=True
)
_conv_rival = Rival("causal-conv1d", "causal_conv1d.causal_conv1d_fn", _conv1d, first=True)

LINEAR = (
    Op("linear", _qkv, _linear, _of_fla("linear_attn.chunk_linear_attn", _fla_plain),
       _linear_flops),
    Op("retention", _fixed, _linear, _of_fla(_simple, _fla_fixed), _linear_flops),
    Op("scalar decay", _scalar, _linear, _of_fla(_simple), _linear_flops),
    Op("GLA", _diagonal, _linear, _gla, _linear_flops),
    Op("HGRN-2", _hgrn2, _linear, _gla, _linear_flops),
)  # fmt: skip
DELTA = (
    Op("DeltaNet", _delta(_qkv), _delta_rule, _of_fla("delta_rule.chunk_delta_rule"),
       _delta_flops),
    Op("Gated DeltaNet", _delta(_scalar), _delta_rule,
       _of_fla("gated_delta_rule.chunk_gated_delta_rule"), _delta_flops),
    Op("KDA", _delta(_diagonal), _delta_rule, _of_fla("kda.chunk_kda"), _delta_flops),
)  # fmt: skip
STATE_SPACE = (
    Op("Mamba-2 (ssd)", _ssd, _ours("ssd"), (_ssd_rival,), _linear_flops),
    Op("Mamba (selective_scan)", _selective, _ours("selective_scan"), (_scan_rival,)),
)
CONV = Op("causal_conv1d", _conv, _ours("causal_conv1d", activation="silu"), (_conv_rival,))
OPS = (*LINEAR, *DELTA, *STATE_SPACE, CONV)
FLASH = Rival("torch, flash", _SDPA, _flash("FLASH_ATTENTION"))
ATTENTION = Op(
    "attention, causal", _grouped, _ours("attention", mask=xdist.Mask()),
    (FLASH, Rival("torch, cuDNN", _SDPA, _flash("CUDNN_ATTENTION"))),
    lambda s: 2.0 * s.tokens**2 * s.heads * s.key,
)  # fmt: skip


def leaves(op: Op, sizes: Sizes, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Inputs on the device, rounded to `dtype` but for those that stay float32."""
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        drawn = op.draw(sizes, generator)
        return {name: x if name in op.wide else x.to(dtype) for name, x in drawn.items()}


def turned(rival: Rival, inputs: Inputs) -> Inputs:
    """The inputs as the rival lays them out, or back again: it is its own inverse."""
    if not rival.first:
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
