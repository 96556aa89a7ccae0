"""A video diffusion transformer: attention over time and over space by turns, with mask modelling.

    tokens = embed(patches of (frames, known)) + positions
    each layer, with shift, scale and gate of the diffusion time:
        x = x + gate * attention over time of (norm(x) * (1 + scale) + shift)
        x = x + gate * attention over space of the same
        x = x + gate * mlp of the same
    noise = unpatches(head(norm(x) * (1 + scale) + shift))

After Lu et al. 2023, "VDT: General-purpose Video Diffusion Transformers via Mask Modeling": known
positions come in clean, unknown ones noisy, `F = I (1 - M) + C M` (section 3.3), with M as one
more channel, and the loss is that of the unknown ones. Gates as Peebles and Xie 2023, "DiT", but
one at the start, not zero: every branch has gradients from the first step.

The grid of the video is sharded along any dim. `strategy` says how blocks that mix the sharded dim
cross ranks; all ways give the same numbers:

    dsp            the sharded dim is switched where xdist.cost.place places it; attention is local
    ulysses_both   both attentions switch their heads, as for one flat sequence
    ulysses_one    the attention that mixes the sharded dim switches its heads
    ring           that attention sends its keys and values round
    megatron_sp    tensor-style: every branch gathers the tokens and scatters the sums
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xdist.comm.broadcast import start_broadcast
from xdist.cost.place import Placement
from xdist.errors import ShapeError
from xdist.grid_shard import GridShard, resolve_grid
from xdist.memory.checkpoint import checkpoint
from xdist.memory.loss import sum_of_ranks
from xdist.memory.mean import mean
from xdist.models.grid_config import DTYPES
from xdist.models.vdt_inputs import EXTRA
from xdist.models.vdt_plan import (
    BRANCHES,
    SHARDINGS,
    Step,
    VDTConfig,
    placement,
    route,
)
from xdist.nn.factorised import FactorisedAttention, GridMLP
from xdist.nn.patches import patches, unpatches
from xdist.nn.waves import Modulation, position_waves

__all__ = ["SHARDINGS", "VDT", "VDTConfig", "VDTLayer", "build"]


class VDTBody(nn.Module):
    """Attention over time, attention over space and an MLP, each shifted, scaled and gated."""

    def __init__(self, config: VDTConfig) -> None:
        super().__init__()
        dim, sums = config.dim, len(BRANCHES) * config.depth
        space = range(1, len(config.sizes))
        self.temporal = FactorisedAttention(dim, (0,), head_dim=config.head_dim, layers=sums)
        self.spatial = FactorisedAttention(dim, space, head_dim=config.head_dim, layers=sums)
        self.mlp = GridMLP(dim, config.hidden, sums)
        self.modulation = Modulation(dim, [0.0, 0.0, 1.0] * len(BRANCHES))

    def forward(self, x: Tensor, gshard: GridShard, times: Tensor, steps: Sequence[Step]) -> Tensor:
        """x `[B, s1..sk, C]` under `gshard`; the answer lies along the dim of the last step.

        times `[B]`; steps: of the branches, in order.
        """
        each = iter(self.modulation(times).unbind(1))
        for name, step in zip(BRANCHES, steps, strict=True):
            x, gshard = gshard.switch(x, step.dim)
            branch = getattr(self, name)
            y = branch(_modulated(x, next(each), next(each)), gshard, step.way)
            x = torch.addcmul(x, y, _over_grid(next(each), x))
        return x


class VDTLayer(nn.Module):
    """`VDTBody`; its parameters are read only while it is called, forward and backward."""

    def __init__(self, config: VDTConfig) -> None:
        super().__init__()
        self.body = VDTBody(config)
        self.recompute = config.recompute

    def forward(self, x: Tensor, gshard: GridShard, times: Tensor, steps: Sequence[Step]) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.body, x, gshard, times, steps)
        y: Tensor = self.body(x, gshard, times, steps)
        return y


class VDT(nn.Module):
    """`model(x, gshard) -> noise`, `model.loss(x, noise, gshard) -> scalar`.

    x `[B, t, s1.., channels + 2]`, in the dtype of the parameters: this rank's part under `gshard`
    (a GridShard of the video's positions; None: the whole video on one rank). Its channels are the
    video (clean where known, noisy elsewhere), 1 where a position is known, and the diffusion time
    of the sample in [0, 1], the same at every position and without a gradient:
    xdist.models.vdt_inputs puts them together. Nothing random is drawn inside. A video may have
    other sizes than the config's.

    Raises:
        ConfigError: sizes that cannot be built.
    """

    def __init__(self, config: VDTConfig) -> None:
        super().__init__()
        self.config = config
        dim, volume = config.dim, prod(config.patch)
        inputs = volume * (config.channels + EXTRA - 1)
        self.embedding = nn.Parameter(torch.randn(dim, inputs) * inputs**-0.5)
        self.layers = nn.ModuleList(VDTLayer(config) for _ in range(config.depth))
        self.modulation = Modulation(dim, [0.0, 0.0])
        self.head = nn.Parameter(0.02 * torch.randn(volume * config.channels, dim))
        self.to(DTYPES[config.dtype])

    @property
    def blocks(self) -> list[VDTLayer]:
        """The layers, bottom to top: what an engine may gather one by one."""
        return list(self.layers)  # type: ignore[arg-type]

    def forward(self, x: Tensor, gshard: GridShard | None = None) -> Tensor:
        """The noise `[B, t, s1.., channels]` at the same positions.

        Raises:
            ShapeError: x is not this rank's part, or has other channels.
        """
        return self._noise(x, gshard)

    def _noise(self, x: Tensor, gshard: GridShard | None) -> Tensor:
        # Not in forward: an engine that gathers parameters around `forward` and around `loss`
        # would gather them twice where one called the other.
        gshard = resolve_grid(gshard, x, len(self.config.sizes))
        self._check(x)
        along = route(self.config, gshard.sizes, gshard.size, gshard.dim)
        times, whole = _times(x, gshard), gshard
        x, gshard = gshard.switch(x[..., :-1], along.first)
        tokens, gshard = patches(x, gshard, self.config.patch)
        y = tokens @ self.embedding.t() + position_waves(gshard, self.config.dim, tokens)
        for number, layer in enumerate(self.blocks):
            steps = along.of_layer(number)
            y = layer(y, gshard, times, steps)
            gshard = gshard.along(steps[-1].dim)
        shift, scale = self.modulation(times).unbind(1)
        y, gshard = gshard.switch(_modulated(y, shift, scale) @ self.head.t(), along.last)
        y, gshard = unpatches(y, gshard, whole.sizes, self.config.patch)
        return gshard.switch(y, whole.dim)[0]

    def loss(
        self,
        x: Tensor,
        noise: Tensor,
        gshard: GridShard | None = None,
        valid_tokens: int | None = None,
    ) -> Tensor:
        """Mean squared error over the unknown positions of the global batch, the same on all ranks.

        noise `[B, t, s1.., channels]`: what was added to x; valid_tokens: unknown positions of the
        whole global batch (None: counted). One exchange of two numbers (of one, where counted
        before); backward is this rank's own terms. Nothing unknown anywhere: 0.

        Raises:
            ShapeError: x is not this rank's part, or noise does not fit it.
        """
        error = self._noise(x, gshard) - noise
        unknown = 1 - x[..., -2:-1].detach()
        if valid_tokens is None:
            return mean(error.square(), gshard, weight=unknown)
        own = (error.square() * unknown).sum() / max(1, valid_tokens * self.config.channels)
        total = sum_of_ranks(gshard)(own.detach().double()).to(own.dtype)
        return own + (total - own).detach()

    def placement(
        self, degree: int, sizes: Sequence[int] = (), dim: int = 0, batch: int = 1
    ) -> Placement:
        """Where a video that comes and goes sharded along `dim` over `degree` ranks is switched.

        sizes: of its positions (default: the config's); batch: rows, which scale the bytes.
        Blocks: patches, the branches of each layer, unpatches.
        """
        return placement(self.config, tuple(sizes) or self.config.sizes, degree, dim, batch)

    def parameter_roles(self) -> dict[str, str]:
        """What each parameter is to an optimizer: "hidden" matrix, or "other"."""
        return {
            name: "hidden" if _is_hidden(name) else "other" for name, _ in self.named_parameters()
        }

    def parameter_count(self) -> int:
        """Parameters, embedding and head included."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _check(self, x: Tensor) -> None:
        channels = self.config.channels + EXTRA
        if x.shape[-1] != channels or x.dim() != len(self.config.sizes) + 2:
            raise ShapeError(
                f"vdt takes [B, {len(self.config.sizes)} dims, {channels}]",
                f"got {tuple(x.shape)}: {self.config.channels} of the video, known, time",
                "put them together with xdist.models.vdt_inputs.compose",
            )


def build(config: VDTConfig, *, seed: int | None = None) -> VDT:
    """The model of these sizes; seed: as in `xdist.models.build`."""
    if seed is None:
        return VDT(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VDT(config)


def _is_hidden(name: str) -> bool:
    return name.startswith("layers.") and "modulation" not in name


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = F.layer_norm(x, x.shape[-1:])
    return torch.addcmul(_over_grid(shift, x), normed, _over_grid(1 + scale, x))


def _over_grid(each: Tensor, x: Tensor) -> Tensor:
    """`[B, C]` beside x `[B, s1..sk, C]`."""
    return each.view(each.shape[0], *[1] * (x.dim() - 2), each.shape[1])


def _times(x: Tensor, gshard: GridShard) -> Tensor:
    """Each row's diffusion time, also on ranks that hold no position now and some after a switch.

    Where there are such ranks the first one, which always holds some, tells all: B numbers.
    """
    plane = x[..., -1].detach().flatten(1)
    times = plane[:, 0] if plane.shape[1] else plane.new_zeros(plane.shape[0])
    return times if all(gshard.shares) else start_broadcast(times, gshard.group, root=0).wait()
