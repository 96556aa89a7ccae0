"""Mamba-ND for volumes: one scan order a layer, both directions, and a depthwise convolution.

    u, z = x W;   u = silu(conv(u));   for both directions of the layer's order:
        dt, B, C = u W_select;   h_t = exp(-exp(A_log) dt_t) h_{t-1} + dt_t B_t u_t
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
from xdist.models.segmenter import DTYPES, Residual, Segmenter, SegmenterConfig, SiLUMLP
from xdist.nn.decay import wide
from xdist.nn.initial import matrix, step_bias

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
    """y = mixer(x, gshard), `[B, t1..tk, C]` -> `[B, t1..tk, C]`; see the top of this file.

    Moves: the halo of the convolution; of the scan what `xdist.grid_scan` moves for both directions
    in one exchange.
    """

    def __init__(self, config: MambaNDConfig, layer: int) -> None:
        super().__init__()
        inner, states, rank = config.inner, config.state_dim, config.step_rank
        self.order, self.scan = config.order(layer), config.scan != "none"
        self.sizes = (rank, states, states)
        self.proj, self.out = matrix(2 * inner, config.dim), matrix(config.dim, inner)
        kernel = (config.kernel,) * len(config.sizes)
        self.conv = nn.Parameter(torch.randn(inner, 1, *kernel) * 0.1)
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        self.D = nn.Parameter(torch.ones(inner))
        if self.scan:
            self.select = nn.Parameter(matrix(2 * sum(self.sizes), inner).unflatten(0, (2, -1)))
            self.step = nn.Parameter(matrix(2 * inner, rank).unflatten(0, (2, -1)))
            self.dt_bias = nn.Parameter(step_bias(2, inner, low=0.01, high=0.5))
            self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(2, inner, 1))

    def forward(self, x: Tensor, gshard: GridShard) -> Tensor:
        u, z = (F.linear(x, weight) for weight in self.proj.chunk(2))
        u = ops.conv_nd(u, self.conv, self.conv_bias, gshard, groups=u.shape[-1])
        u = F.silu(u)
        y = u * self.D
        if self.scan:
            both = ops.grid_scan(
                ops.selective_scan,
                (self._direction(u, 0), self._direction(u, 1)),
                gshard, order=self.order, reverse="both",
            )  # fmt: skip
            y = y + both[0] + both[1]
        return F.linear(y * F.silu(z), self.out)

    def _direction(self, u: Tensor, i: int) -> dict[str, object]:
        raw, b, c = F.linear(u, self.select[i]).split(self.sizes, -1)
        return {
            "u": u, "delta": F.linear(raw, self.step[i]), "A": -wide(self.A_log[i]).exp(),
            "B": b, "C": c, "delta_bias": wide(self.dt_bias[i]), "delta_softplus": True,
        }  # fmt: skip


class MambaND(Segmenter):
    """The segmenter whose layers scan; `scan = "none"` leaves all else as it is.

    Raises:
        ConfigError: sizes or options that cannot be built.
    """

    def __init__(self, config: MambaNDConfig) -> None:
        layers = []
        for i in range(config.depth):
            layers.append(Residual(DirectionalScan(config, i), _needs(config, i),
                                   recompute=config.recompute))  # fmt: skip
            layers.append(
                Residual(SiLUMLP(config.dim, config.hidden),
                         Block(f"mlp {i}", config.dim, itemsize=config.stream_dtype.itemsize),
                         tokenwise=True, recompute=config.recompute)
            )  # fmt: skip
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
