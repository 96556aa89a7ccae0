"""Mamba-ND for volumes: one scan order a layer, both directions, and a depthwise convolution.

    u, z = x W;   u = silu(conv(u));   for both directions of the layer's order:
        dt, B, C = softplus(u W_dt + b), u W_B, u W_C
        h_t = exp(-exp(A_log) dt_t) h_{t-1} + dt_t B_t u_t
    f(x) = ((sum of both C_t . h_t) + D u) * silu(z)) W_out,   then an MLP

Layer i scans along dim k-1-(i mod k) innermost: in three layers of a volume there are six
directions. Li et al., "Mamba-ND: Selective State Space Modeling for Multi-Dimensional Data" (2024),
section 3; the convolution in front as in Liu et al., "VMamba" (2024), figure 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist import ops
from xdist.cost.place import Block, Convolution, Scan
from xdist.errors import ConfigError
from xdist.grid_shard import GridShard
from xdist.models.grid_config import DTYPES
from xdist.models.segmenter import (
    Layer,
    Normed,
    Segmenter,
    SegmenterConfig,
    SiLUMLP,
    by_token,
)
from xdist.nn.decay import wide
from xdist.nn.initial import matrix, step_bias
from xdist.nn.norm import RMSNorm

SCANS = ("raster", "rows", "none")


@dataclass(frozen=True)
class MambaNDConfig(SegmenterConfig):
    """The segmenter's sizes; E = expand x dim channels of state_dim states are scanned.

    scan: "raster", each layer's scan runs over the whole grid; "rows", along its innermost dim
    alone, the others beside each other; "none", no scan at all, the same model without it.
    step_rank: channels that dt is made from; kernel: taps of the convolution along every dim.
    """

    scan: str = "raster"
    expand: float = 1.0
    state_dim: int = 4
    step_rank: int = 2
    kernel: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("state_dim", "step_rank", "kernel")
        self._whole("expand", self.expand, "scanned channels")
        if self.scan not in SCANS or self.kernel % 2 == 0:
            raise ConfigError(
                "mamba_nd cannot be built of these options",
                f"scan = {self.scan!r}, kernel = {self.kernel}",
                f"scan is one of {', '.join(SCANS)}; kernel is odd",
            )

    @property
    def inner(self) -> int:
        """Channels that are scanned."""
        return round(self.expand * self.dim)

    def order(self, layer: int) -> tuple[int, ...]:
        """The dims that a layer scans, from outermost to innermost."""
        dims = len(self.sizes)
        last = dims - 1 - layer % dims
        return (last,) if self.scan == "rows" else (*(d for d in range(dims) if d != last), last)


class DirectionalScan(nn.Module):
    """x + f(norm(x)), `[B, t1..tk, C]` -> `[B, t1..tk, C]`; see the top of this file.

    Moves: the halo of the convolution; of the scan what `xdist.grid_scan` moves for both directions
    in one exchange. What takes tokens alone runs tile by tile and keeps its input.
    """

    def __init__(self, config: MambaNDConfig, layer: int) -> None:
        super().__init__()
        inner = config.inner
        self.order, self.recompute = config.order(layer), config.recompute
        self.enter = _Enter(config.dim, inner, config.stream_dtype)
        kernel = (config.kernel,) * len(config.sizes)
        self.conv = nn.Parameter(torch.randn(inner, 1, *kernel) * 0.1)
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        self.select = None if config.scan == "none" else _Select(config)
        self.leave = _Leave(config.dim, inner, config.stream_dtype)
        if self.select is not None:
            states = torch.arange(1.0, config.state_dim + 1)
            self.A_log = nn.Parameter(states.log().repeat(2, inner, 1))

    def forward(self, x: Tensor, gshard: GridShard) -> Tensor:
        u = by_token(self.enter, x, self.recompute)
        u = ops.conv_nd(u, self.conv, self.conv_bias, gshard, groups=u.shape[-1])
        together = [x, u] if self.select is None else [x, u, self._scanned(u, gshard)]
        return by_token(self.leave, torch.cat(together, -1), self.recompute)

    def _scanned(self, u: Tensor, gshard: GridShard) -> Tensor:
        assert self.select is not None
        parts = by_token(self.select, u, self.recompute).split(self.select.widths, -1)
        rates = -wide(self.A_log).exp()
        forward, backward = (
            {"u": parts[0], "delta": parts[1 + i], "A": rates[i],
             "B": parts[3 + i], "C": parts[5 + i]}
            for i in range(2)
        )  # fmt: skip
        first, second = ops.grid_scan(
            ops.selective_scan, (forward, backward), gshard, order=self.order, reverse="both"
        )
        return first + second


class _Enter(nn.Module):
    """norm(x) W, what the convolution reads, in the dtype of the stream."""

    def __init__(self, dim: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.norm = RMSNorm(dim)
        self.proj = matrix(inner, dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x.to(self.proj.dtype)), self.proj).to(self.dtype)


class _Select(nn.Module):
    """Of the convolution's output what both directions scan: u, two dt, two B, two C."""

    def __init__(self, config: MambaNDConfig) -> None:
        super().__init__()
        inner, states, rank = config.inner, config.state_dim, config.step_rank
        self.small = (2 * rank, 4 * states)
        self.widths = (inner, inner, inner, *[states] * 4)
        self.select = matrix(sum(self.small), inner)
        self.step = nn.Parameter(matrix(2 * inner, rank).unflatten(0, (2, inner)))
        self.dt_bias = nn.Parameter(step_bias(2, inner, low=0.01, high=0.5))

    def forward(self, u: Tensor) -> Tensor:
        u = F.silu(u.to(self.select.dtype))
        raw, states = F.linear(u, self.select).split(self.small, -1)
        dt = torch.einsum("...dr,der->...de", raw.unflatten(-1, (2, -1)), self.step)
        dt = F.softplus(dt + self.dt_bias).flatten(-2)
        return torch.cat([u, dt, states], -1)


class _Leave(nn.Module):
    """x + ((y + D u) * silu(z)) W, with z of norm(x); y, of the scan, may be missing."""

    def __init__(self, dim: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dim, self.inner, self.dtype = dim, inner, dtype
        self.norm = RMSNorm(dim)
        self.gate, self.out = matrix(inner, dim), matrix(dim, inner)
        self.D = nn.Parameter(torch.ones(inner))

    def forward(self, together: Tensor) -> Tensor:
        together = together.to(self.gate.dtype)
        others = (together.shape[-1] - self.dim) // self.inner
        x, u, *y = together.split((self.dim, *[self.inner] * others), -1)
        gate = F.silu(F.linear(self.norm(x), self.gate))
        found = F.silu(u) * self.D
        for scanned in y:
            found = found + scanned
        return (x + F.linear(found * gate, self.out)).to(self.dtype)


class MambaND(Segmenter):
    """The segmenter whose layers scan; `scan = "none"` leaves all else as it is.

    Raises:
        ConfigError: sizes or options that cannot be built.
    """

    def __init__(self, config: MambaNDConfig) -> None:
        layers = []
        for i in range(config.depth):
            scan = DirectionalScan(config, i)
            layers.append(Layer(scan, _needs(config, i), recompute=config.recompute))
            mlp = Normed(SiLUMLP(config.dim, config.hidden), config.dim)
            needs = Block(f"mlp {i}", config.dim, itemsize=config.stream_dtype.itemsize)
            layers.append(Layer(mlp, needs, tokenwise=True, recompute=config.recompute))
        super().__init__(config, layers)


def _needs(config: MambaNDConfig, layer: int) -> Block:
    """What one mixer needs of the grid."""
    convolution = Convolution(config.kernel)
    # Both directions read u, which then travels once.
    scan = Scan.selective(
        config.order(layer), config.inner, config.state_dim,
        itemsize=DTYPES[config.dtype].itemsize, both=True, shared=1,
    )  # fmt: skip
    return Block(
        f"scan {layer}", config.dim, itemsize=config.stream_dtype.itemsize,
        reach=(convolution,) if config.scan == "none" else (convolution, scan),
    )  # fmt: skip


def build(config: MambaNDConfig, *, seed: int | None = None) -> MambaND:
    """The model of these sizes; seed: as in `xdist.models.build`."""
    if seed is None:
        return MambaND(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MambaND(config)
