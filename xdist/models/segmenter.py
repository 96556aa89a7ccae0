"""What the volume segmenters share: patches, layers that switch as placed, a head for every voxel.

    raw = patches(voxels);   x = W raw + b;   each layer: x = x + f(norm(x))
    logits of a token's voxels = head(norm(x), raw)

Before each layer the tokens are sharded along the dim that `place_switches` gives; at the end along
that of the voxels again. The last patch of a dim that patches do not divide is partly filled with
zeros, whose outputs are cut off and whose labels count nothing.

    kept for backward   each layer's input (narrow where `stream` says so), what its exchanges
                        received, and the raw patches; all else is computed again
    what moves          patches that straddle a border, switches as placed, each layer's own moves
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf, prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist.cost.place import Block, Placement, place_switches
from xdist.errors import ConfigError, DataError, ShapeError
from xdist.grid_shard import GridShard, resolve_grid
from xdist.memory.answers import count_answers
from xdist.memory.checkpoint import checkpoint
from xdist.memory.loss import count_valid, sum_of_ranks
from xdist.memory.tiled import tiled
from xdist.models.grid_config import DTYPES, GridConfig
from xdist.nn.initial import matrix
from xdist.nn.norm import RMSNorm
from xdist.nn.patches import patches, unpatches
from xdist.nn.radial_head import RadialHead

IGNORED = -100
# Tokens of a tile of the MLPs and of the head: its tensors stay in the processor's cache.
TILE_TOKENS = 4096


@dataclass(frozen=True)
class SegmenterConfig(GridConfig):
    """What both segmenters have besides the sizes of every model of grids.

    classes: of the labels; stream: dtype of x between layers, which is what is kept for backward
    and switched: "same" as the parameters, or "bfloat16"; head_hidden, bases, low, high: of the
    head (nn/radial_head.py); low and high in the unit of the normalised image.
    """

    classes: int = 4
    dim: int = 32
    depth: int = 3
    stream: str = "same"
    head_hidden: int = 64
    bases: int = 16
    low: float = -2.0
    high: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stream not in ("same", "bfloat16"):
            raise ConfigError(
                f"stream = {self.stream!r} is no dtype of the residual stream",
                'it is "same" as the parameters, or "bfloat16"',
            )
        self._at_least_one("classes", "head_hidden")
        if self.bases < 2 or not -inf < self.low < self.high < inf:
            raise ConfigError(
                f"{type(self).__name__}: radial bases cannot be laid over these values",
                f"bases = {self.bases} from low = {self.low} to high = {self.high}",
                "take 2 bases or more, and low below high",
            )

    @property
    def raw(self) -> int:
        """Values of one patch."""
        return prod(self.patch) * self.channels

    @property
    def stream_dtype(self) -> torch.dtype:
        """Of x between layers."""
        return DTYPES[self.dtype if self.stream == "same" else self.stream]


class SiLUMLP(nn.Module):
    """W_down silu(W_up x), [..., C] -> [..., C]; each token stands alone."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = matrix(hidden, dim), matrix(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.up)), self.down)


def by_token(layer: nn.Module, x: Tensor, recompute: bool) -> Tensor:
    """layer of x `[B, t1..tk, C]`, which takes tokens alone: tile by tile, which keeps x alone."""
    flat = x.flatten(1, -2)
    y = tiled(layer, flat, tile_tokens=TILE_TOKENS) if recompute else layer(flat)
    return y.view(*x.shape[:-1], y.shape[-1])


class Normed(nn.Module):
    """x + f(norm(x)), [B, t1..tk, C], back in x's own dtype."""

    def __init__(self, inner: nn.Module, dim: int) -> None:
        super().__init__()
        self.norm = RMSNorm(dim)
        self.inner = inner

    def forward(self, x: Tensor, *gshard: GridShard) -> Tensor:
        wide = x.to(self.norm.weight.dtype)
        return (wide + self.inner(self.norm(wide), *gshard)).to(x.dtype)


class Layer(nn.Module):
    """y = body(x, gshard), [B, t1..tk, C], in the dtype of the stream; x is what is kept.

    block: what the layer needs of the grid, for `place_switches`. tokenwise: body takes tokens
    alone, `body(x)`, and works on tiles of them.
    """

    def __init__(
        self, body: nn.Module, block: Block, *, tokenwise: bool = False, recompute: bool = True
    ) -> None:
        super().__init__()
        self.body, self.block = body, block
        self.tokenwise, self.recompute = tokenwise, recompute

    def forward(self, x: Tensor, gshard: GridShard) -> Tensor:
        if self.tokenwise:
            return by_token(self.body, x, self.recompute)
        again = self.recompute and torch.is_grad_enabled()
        return checkpoint(self.body, x, gshard) if again else self.body(x, gshard)


class Segmenter(nn.Module):
    """`model(x, gshard) -> logits`, `model.loss(x, labels, gshard) -> scalar`.

    x `[B, s1..sk, channels]`, labels int64 `[B, s1..sk]`, logits `[B, s1..sk, classes]`: this
    rank's part under `gshard`, the GridShard of the voxels (None: the whole grid on one rank).
    Parameters are whole on every rank; their gradients are this rank's part.

    layers: bottom to top.
    """

    def __init__(self, config: SegmenterConfig, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.config = config
        self.embedding = matrix(config.dim, config.raw)
        self.embedding_bias = nn.Parameter(torch.zeros(config.dim))
        self.layers = nn.ModuleList(layers)
        self.head = _Head(config)
        self.to(DTYPES[config.dtype])

    @property
    def blocks(self) -> list[Layer]:
        """The layers, bottom to top: what an engine may gather one by one."""
        return list(self.layers)  # type: ignore[arg-type]

    def placement(
        self,
        degree: int,
        *,
        sizes: tuple[int, ...] | None = None,
        batch: int = 1,
        dim: int = 0,
    ) -> Placement:
        """Where the layers switch over `degree` ranks.

        sizes: of the voxels (None: of a whole sample); dim: sharded where the voxels come in, and
        where the logits leave.
        """
        grid = self.config.tokens_of(self.config.sizes if sizes is None else sizes)
        return _placed(tuple(layer.block for layer in self.blocks), grid, degree, batch, dim)

    def forward(self, x: Tensor, gshard: GridShard | None = None) -> Tensor:
        """Logits `[B, s1..sk, classes]` in the dtype of the parameters."""
        gshard = self._resolved(x, gshard)
        logits, tokens = self._logits(x, gshard)
        return unpatches(logits, tokens, gshard.sizes, self.config.patch)[0]

    def loss(
        self,
        x: Tensor,
        labels: Tensor,
        gshard: GridShard | None = None,
        valid_tokens: int | None = None,
        *,
        ignore_index: int = IGNORED,
    ) -> Tensor:
        """Mean cross entropy over all labelled voxels of the global batch (as xdist.cross_entropy).

        valid_tokens: their number in the whole global batch (None: counted, one exchange of one
        number).

        Raises:
            ShapeError: labels of other voxels than x, or not int64.
            DataError: a label that is no class, on the rank that holds it, before anything moves.
        """
        gshard = self._resolved(x, gshard)
        if labels.shape != x.shape[:-1] or labels.dtype != torch.int64:
            raise ShapeError(
                "labels do not fit the voxels",
                f"x {tuple(x.shape)}, labels {tuple(labels.shape)} {labels.dtype}",
                "pass one int64 class a voxel, ignore_index where there is none",
            )
        _check_classes(labels, self.config.classes, ignore_index)
        valid = count_valid(labels, gshard, ignore_index) if valid_tokens is None else valid_tokens
        logits, _ = self._logits(x, gshard)
        truth, _ = patches(labels, gshard, self.config.patch, fill=ignore_index)
        logits, truth = logits.reshape(-1, self.config.classes), truth.reshape(-1)
        count_answers(logits, truth, truth != ignore_index)
        each = F.cross_entropy(logits, truth, ignore_index=ignore_index, reduction="none")
        # Sums run in float64; each rank's own terms are differentiated.
        own = each.sum(dtype=torch.float64) / max(valid, 1)
        total = sum_of_ranks(gshard)(own.detach())
        return (own + (total - own.detach())).to(logits.dtype)

    def parameter_roles(self) -> dict[str, str]:
        """What each parameter is to an optimizer: "hidden" matrix, "table" (which does not decay),
        or "other"."""
        return {name: _role(name, p) for name, p in self.named_parameters()}

    def parameter_count(self) -> int:
        """Parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _resolved(self, x: Tensor, gshard: GridShard | None) -> GridShard:
        gshard = resolve_grid(gshard, x, len(self.config.sizes))
        if x.dim() != len(gshard.sizes) + 2 or x.shape[-1] != self.config.channels:
            raise ShapeError(
                f"the model reads {self.config.channels} channels a voxel",
                f"x has shape {tuple(x.shape)}",
                "pass x as [B, s1..sk, channels]",
            )
        return gshard

    def _logits(self, x: Tensor, gshard: GridShard) -> tuple[Tensor, GridShard]:
        """Logits of each token's voxels, `[B, t1..tk, voxels * classes]`, and the tokens' shard."""
        raw, tokens = patches(x.to(self.embedding.dtype), gshard, self.config.patch)
        h = F.linear(raw, self.embedding, self.embedding_bias).to(self.config.stream_dtype)
        placed = self.placement(gshard.size, sizes=gshard.sizes, batch=len(x), dim=gshard.dim)
        at = tokens
        for layer, dim in zip(self.blocks, placed.dims, strict=True):
            h, at = at.switch(h, dim)
            h = layer(h, at)
        h, _ = at.switch(h, tokens.dim)
        together = torch.cat([h.to(raw.dtype), raw], -1)
        return by_token(self.head, together, self.config.recompute), tokens


class _Head(nn.Module):
    """`[B, n, C + raw]`, tokens and their raw values side by side, to their voxels' logits."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.dim = config.dim
        self.norm = RMSNorm(config.dim)
        self.radial = RadialHead(
            config.dim, config.raw, prod(config.patch) * config.classes,
            hidden=config.head_hidden, bases=config.bases, values=(config.low, config.high),
        )  # fmt: skip

    def forward(self, together: Tensor) -> Tensor:
        x, raw = together.split((self.dim, together.shape[-1] - self.dim), -1)
        return self.radial(self.norm(x), raw)


def _check_classes(labels: Tensor, classes: int, ignore_index: int) -> None:
    if labels.is_meta:  # a rehearsal: there are no values
        return
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if not wrong.any():
        return
    bad = labels[wrong]
    raise DataError(
        f"labels are no classes of the model: {len(bad):,} of {labels.numel():,} on this rank",
        f"from {int(bad.min())} to {int(bad.max())}, the first at "
        f"{tuple(wrong.nonzero()[0].tolist())} of its part; classes go from 0 to {classes - 1}, "
        f"{ignore_index} counts nowhere",
        f"renumber them, or build the model with classes = {int(bad.max()) + 1}"
        if int(bad.max()) >= classes
        else "renumber them",
    )


@lru_cache(maxsize=64)
def _placed(
    blocks: tuple[Block, ...], grid: tuple[int, ...], degree: int, batch: int, dim: int
) -> Placement:
    return place_switches(blocks, grid, degree, batch=batch, start=dim, end=dim)


def _role(name: str, parameter: Tensor) -> str:
    if name.startswith("embedding") or name.rpartition(".")[2] in ("A_log", "centres"):
        return "table"
    matrices = ("proj", "gate", "out", "up", "down", "qkv", "from_token", "from_raw")
    hidden = parameter.ndim == 2 and name.rpartition(".")[2] in matrices
    return "hidden" if hidden and not name.startswith("head.radial.out") else "other"
