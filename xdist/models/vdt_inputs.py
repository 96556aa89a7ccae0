"""What a video diffusion transformer is fed: noise, times and masks, from a seed and a sample.

    a = cos(t pi / 2), s = sin(t pi / 2):   noisy = a video + s noise
    x = (video where known else noisy, known, t);   the target is the noise

Everything follows from (seed, sample, frame) and the sizes of the whole video, so that each rank
makes its own part of it alone, the same for every number of ranks and sharded dim, and nothing
moves. A frame's noise is drawn whole: where another dim than time is sharded, each rank draws all
frames and keeps its part. The masks are those of Lu et al. 2023, section 3.3; the schedule is the
cosine one of Nichol and Dhariwal 2021 without its offset.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from xdist.errors import ConfigError, ShapeError
from xdist.grid_shard import GridShard, resolve_grid

MASKS = ("nothing", "first", "ends", "scattered", "image", "box")
"""What is known: nothing (generation), the first half of the frames (prediction), the first and
the last frame (both ways), scattered frames (interpolation), the first frame (image to video), or
everything outside a box (completion)."""
# Channels of the model's input beside the video's own: whether a position is known, and the time.
EXTRA = 2


def diffusion_inputs(
    video: Tensor,
    gshard: GridShard | None = None,
    *,
    seed: int,
    samples: Sequence[int],
    masks: Sequence[str] = MASKS,
) -> tuple[Tensor, Tensor]:
    """(x `[B, t, s1.., C + 2]`, noise `[B, t, s1.., C]`) of this rank's part of videos.

    video `[B, t, s1.., C]`, in about [-1, 1], float32 or float64; samples: the number of each row
    in the training set's order, global, which decides its draws with `seed`; masks: drawn from.

    Raises:
        ShapeError: not one sample number a row, or video is not this rank's part.
        ConfigError: an unknown mask.
    """
    gshard = resolve_grid(gshard, video, video.dim() - 2)
    if len(samples) != video.shape[0]:
        raise ShapeError(
            "each row of a batch of videos has a sample number",
            f"{video.shape[0]} rows, {len(samples)} numbers",
        )
    known, noise, times = [], [], []
    for sample in samples:
        draw = _generator(seed, sample)
        times.append(float(torch.rand((), generator=draw)))
        mask = masks[int(torch.randint(len(masks), (), generator=draw))]
        known.append(_part(known_positions(mask, gshard.sizes, draw), gshard))
        noise.append(_noise(gshard, video.shape[-1], seed, sample))
    drawn = torch.stack(noise).to(video)
    t = torch.tensor(times, dtype=video.dtype, device=video.device)
    return compose(video, drawn, torch.stack(known).to(video.device), t), drawn


def compose(video: Tensor, noise: Tensor, known: Tensor, times: Tensor) -> Tensor:
    """x `[B, t, s1.., C + 2]` of the model, from what is drawn.

    video, noise `[B, t, s1.., C]`; known bool `[B, t, s1..]`; times `[B]` in [0, 1].

    Raises:
        ShapeError: shapes that do not fit together.
    """
    fits = video.shape == noise.shape and known.shape == video.shape[:-1]
    if not fits or times.shape != video.shape[:1]:
        raise ShapeError(
            "video, noise, known and times do not fit together",
            f"{tuple(video.shape)}, {tuple(noise.shape)}, {tuple(known.shape)}, "
            f"{tuple(times.shape)}",
            "known has the video's shape without channels, times one number a row",
        )
    t = times.view(-1, *[1] * (video.dim() - 1))
    signal, spread = level(t)
    frames = torch.where(known[..., None], video, signal * video + spread * noise)
    planes = [known[..., None].to(video), t.to(video).expand_as(frames[..., :1])]
    return torch.cat([frames, *planes], -1)


def level(times: Tensor) -> tuple[Tensor, Tensor]:
    """Amplitudes of signal and noise at diffusion times in [0, 1]; their squares add up to 1."""
    return torch.cos(times * (math.pi / 2)), torch.sin(times * (math.pi / 2))


def known_positions(mask: str, sizes: Sequence[int], draw: torch.Generator) -> Tensor:
    """Which positions of a whole video of `sizes` come in clean: bool of that shape.

    Raises:
        ConfigError: an unknown mask.
    """
    frames, known = sizes[0], torch.zeros(tuple(sizes), dtype=torch.bool)
    if mask == "nothing":
        return known
    if mask == "first":
        known[: frames // 2] = True
    elif mask == "ends":
        known[[0, -1]] = frames > 1
    elif mask == "scattered":
        known[torch.rand(frames, generator=draw) < 0.5] = True
    elif mask == "image":
        known[0] = frames > 1
    elif mask == "box":
        known |= ~_box(sizes, draw)
    else:
        raise ConfigError(f"no mask {mask!r}", f"there are {', '.join(MASKS)}")
    return known


def _box(sizes: Sequence[int], draw: torch.Generator) -> Tensor:
    """A box in space of half the size along each dim, anywhere, in every frame."""
    inside = torch.ones(tuple(sizes), dtype=torch.bool)
    for dim, size in enumerate(sizes[1:], 1):
        length = max(1, size // 2)
        start = int(torch.randint(size - length + 1, (), generator=draw))
        place = torch.arange(size)
        shape = [1] * len(sizes)
        shape[dim] = -1
        inside &= ((place >= start) & (place < start + length)).view(shape)
    return inside


def _noise(gshard: GridShard, channels: int, seed: int, sample: int) -> Tensor:
    """This rank's part of a sample's noise `[t, s1.., C]`, drawn frame by frame."""
    frames = gshard.positions(0).tolist()
    whole = [
        torch.randn((*gshard.sizes[1:], channels), generator=_generator(seed, sample, frame))
        for frame in frames
    ]
    if not whole:
        return torch.zeros((*gshard.local_sizes, channels))
    found = torch.stack(whole)
    if gshard.dim == 0:
        return found
    return found.narrow(gshard.dim, gshard.start, gshard.stop - gshard.start)


def _part(whole: Tensor, gshard: GridShard) -> Tensor:
    return whole.narrow(gshard.dim, gshard.start, gshard.stop - gshard.start)


def _generator(*numbers: int) -> torch.Generator:
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
