"""Videos from a trained video diffusion transformer: what is unknown, from noise."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from xdist.errors import ConfigError, ShapeError
from xdist.grid_shard import GridShard
from xdist.models.vdt_inputs import EXTRA, level


@torch.no_grad()
def sample(
    model: Callable[[Tensor, GridShard | None], Tensor],
    noise: Tensor,
    gshard: GridShard | None = None,
    *,
    video: Tensor | None = None,
    known: Tensor | None = None,
    steps: int = 50,
    limit: float | None = 1.0,
) -> Tensor:
    """The video `[B, t, s1.., C]` of this rank's part: as given where known, else made of noise.

    Without randomness of its own (Song et al. 2021, "Denoising Diffusion Implicit Models",
    equation 12 with sigma 0), over `steps` even times; each step is one forward of the model.

    noise, video: `[B, t, s1.., C]`, this rank's parts; known: bool `[B, t, s1..]`. Without video
    and known nothing is known. limit: estimates of the video are cut to [-limit, limit] on the
    way (None: as they are); it bounds what errors grow to where almost all is noise.

    Raises:
        ShapeError: parts that do not fit together, or only one of video and known.
        ConfigError: fewer than one step.
    """
    if steps < 1:
        raise ConfigError("sampling needs at least one step", f"got {steps}")
    if video is None and known is None:
        video, known = torch.zeros_like(noise), noise.new_zeros(noise.shape[:-1], dtype=torch.bool)
    if video is None or known is None or video.shape != noise.shape:
        given = None if video is None else tuple(video.shape)
        raise ShapeError(
            "sampling needs video and known together, and a video of the noise's shape",
            f"noise {tuple(noise.shape)}, video {given}, known {known is not None}",
        )
    if known.shape != noise.shape[:-1]:
        raise ShapeError(
            "known needs the noise's shape without channels",
            f"noise {tuple(noise.shape)}, known {tuple(known.shape)}",
        )
    mask = known[..., None]
    planes = noise.new_empty(*noise.shape[:-1], EXTRA)
    planes[..., 0] = known
    # Time 1 is noise alone: nothing of a video could be told from it.
    times = torch.arange(steps, -1, -1, dtype=torch.float64) / (steps + 1)
    now = noise
    for t, following in pairwise(times):
        planes[..., 1] = float(t)
        frames = torch.where(mask, video, now)
        found = model(torch.cat([frames, planes], -1), gshard)
        (signal, spread), (signal_, spread_) = (level(one) for one in (t, following))
        clean = (now - float(spread) * found) / float(signal)
        if limit is not None:
            clean = clean.clamp(-limit, limit)
            found = (now - float(signal) * clean) / float(spread)
        now = float(signal_) * clean + float(spread_) * found
    return torch.where(mask, video, now)
