"""Small video models, an independent reference, and what ranks measure of them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

import xdist
from xdist.comm import ledger
from xdist.errors import LayoutError
from xdist.models.vdt import VDT, VDTConfig, build
from xdist.models.vdt_inputs import diffusion_inputs
from xdist.models.vdt_sample import sample
from xdist.nn.factorised import FactorisedAttention
from xdist.testing import count_c10d_bytes

# Odd sizes: frames that no number of ranks divides, patches that space does not fill, and on three
# and four ranks shares without a token; two heads leave ranks without one.
ODD = VDTConfig(
    sizes=(5, 5, 6), patch=(1, 2, 2), channels=2, dim=8, depth=2, head_dim=4, dtype="float64"
)


def video(sizes: tuple[int, ...], channels: int, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, *sizes, channels, dtype=torch.float64, generator=generator)


def inputs(config: VDTConfig, gshard: Any = None, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Whole x and noise, in the config's dtype."""
    dtype = getattr(torch, config.dtype)
    clean = video(config.sizes, config.channels, rows).to(dtype)
    x, noise = diffusion_inputs(clean, seed=3, samples=range(rows), masks=("ends", "box"))
    return x, noise


def shard_of(sizes: tuple[int, ...], dim: int) -> xdist.GridShard:
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    return xdist.GridShard(mesh, sizes, dim)


class Result:
    """Outputs, loss and gradients of one pass, whole."""

    def __init__(self, out: Tensor, loss: Tensor, dx: Tensor, gradients: dict[str, Tensor]) -> None:
        self.out, self.loss, self.dx, self.gradients = out, loss, dx, gradients

    def differs(self, other: Result, tolerance: float = 1e-10) -> list[str]:
        """What is farther than `tolerance` of the largest value from `other`."""
        pairs = {"out": (self.out, other.out), "loss": (self.loss, other.loss)}
        pairs |= {"dx": (self.dx, other.dx)}
        pairs |= {name: (self.gradients[name], g) for name, g in other.gradients.items()}
        wrong = []
        for name, (mine, theirs) in pairs.items():
            top = float(theirs.abs().max())
            error = float((mine - theirs).abs().max()) / (top or 1.0)
            if not error <= tolerance or not math.isfinite(top) or top == 0:
                wrong.append(f"{name}: {error:.1e}, largest {top:.1e}")
        return wrong


def passed(config: VDTConfig, gshard: Any = None, *, given: int | None = None) -> Result:
    """One forward and backward of a model of seed 0, on this rank; gathered and reduced."""
    model = build(config, seed=0)
    x, noise = inputs(config)
    leaf = x.requires_grad_()
    held, target = (
        (leaf, noise) if gshard is None else (gshard.scatter(leaf), gshard.scatter(noise))
    )
    loss = model.loss(held, target, gshard, given)
    loss.backward()
    with torch.no_grad():
        out = model(held, gshard)
        if gshard is not None:
            out = gshard.gather(out)
            xdist.reduce_gradients(model, gshard.mesh)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert leaf.grad is not None
    dx = leaf.grad if gshard is None else gshard.gather(gshard.scatter(leaf.grad))
    return Result(out.detach(), loss.detach(), dx, gradients)  # type: ignore[arg-type]


def compared(cases: list[tuple[VDTConfig, int, Result]]) -> list[str]:
    """On one rank: what differs from the given results, by case of config and sharded dim."""
    wrong = []
    for config, dim, expected in cases:
        found = passed(config, shard_of(config.sizes, dim))
        name = f"{config.strategy}, dim {dim}"
        wrong += [f"{name}: {one}" for one in found.differs(expected)]
    return wrong


def inputs_differ(config: VDTConfig) -> list[int]:
    """The dims along which this rank's inputs are not its part of the whole ones."""
    x, noise = inputs(config)
    clean = video(config.sizes, config.channels)
    wrong = []
    for dim in range(len(config.sizes)):
        gshard = shard_of(config.sizes, dim)
        mine = diffusion_inputs(
            gshard.scatter(clean), gshard, seed=3, samples=range(2), masks=("ends", "box")
        )
        if not all(
            torch.equal(a, gshard.scatter(b)) for a, b in zip(mine, (x, noise), strict=True)
        ):
            wrong.append(dim)
    return wrong


def sampled(config: VDTConfig, dim: int | None) -> Tensor:
    """A whole video in three steps, its outer frames known; dim None: on one device."""
    model, clean = build(config, seed=0), video(config.sizes, config.channels)
    known = torch.zeros(clean.shape[:-1], dtype=torch.bool)
    known[:, [0, -1]] = True
    noise = video(config.sizes, config.channels).flip(2)
    if dim is None:
        return sample(model, noise, video=clean, known=known, steps=3)
    gshard = shard_of(config.sizes, dim)
    noise, clean, known = (gshard.scatter(one) for one in (noise, clean, known))
    return gshard.gather(sample(model, noise, gshard, video=clean, known=known, steps=3))


def local_refused(dim: int) -> str:
    """What attention over dim 0 says on this rank where `dim` is sharded."""
    gshard = shard_of((4, 4), dim)
    x = torch.zeros(1, *gshard.local_sizes, 8)
    try:
        FactorisedAttention(8, (0,), head_dim=4)(x, gshard)
    except LayoutError as error:
        return str(error)
    return ""


class Bytes:
    """What one pass of a model sent on this rank: by the ledger, and by c10d."""

    def __init__(self, forward: Any, backward: Any, counted: tuple[Any, Any]) -> None:
        self.forward = (forward.sent_bytes, forward.received_bytes)
        self.backward = (backward.sent_bytes, backward.received_bytes)
        self.counted = [(c.sent_bytes, c.received_bytes) for c in counted]
        self.moves = {name: each.sent_bytes for name, each in forward.by_move.items()}


def moved(config: VDTConfig, dim: int, rows: int = 1) -> Bytes:
    """Bytes of forward and backward of the model alone (no loss), with gradients of its input."""
    model, gshard = build(config, seed=0), shard_of(config.sizes, dim)
    x = gshard.scatter(inputs(config, rows=rows)[0]).requires_grad_()
    with ledger() as forward, count_c10d_bytes() as first:
        y = model(x, gshard)
    with ledger() as backward, count_c10d_bytes() as second:
        y.square().sum().backward()
    return Bytes(forward, backward, (first, second))


def all_moved(cases: list[tuple[VDTConfig, int]]) -> list[Bytes]:
    """`moved` of each."""
    return [moved(config, dim) for config, dim in cases]


def saved_bytes(config: VDTConfig, dim: int) -> int:
    """Bytes of the storages that one forward keeps for backward on this rank, each counted once;
    the parameters' own are left out."""
    model, gshard = build(config, seed=0), shard_of(config.sizes, dim)
    x, noise = (gshard.scatter(one) for one in inputs(config, rows=1))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.loss(x, noise, gshard)
    loss.backward()
    return sum(held.values())


def trained(config: VDTConfig, dim: int, steps: int, rows: int = 2) -> list[float]:
    """The losses of `steps` steps of AdamW on the same two samples."""
    model, gshard = build(config, seed=0), shard_of(config.sizes, dim)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    clean, losses = gshard.scatter(video(config.sizes, config.channels, rows)), []
    x, noise = diffusion_inputs(clean, gshard, seed=1, samples=range(rows))
    for _ in range(steps):
        loss = model.loss(x, noise, gshard)
        optimizer.zero_grad()
        loss.backward()
        xdist.reduce_gradients(model, gshard.mesh)
        xdist.clip_grad_norm(model, 1.0, gshard.mesh)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


# --- the reference: float64, loops over places, heads and queries ----------------------------


def reference(model: VDT, x: Tensor) -> Tensor:
    """The noise of whole x, by loops; of the model it takes parameters and sizes alone."""
    config = model.config
    times = x[:, 0, 0, 0, -1].detach()
    tokens, grid = _patches(x[..., :-1], config.patch)
    y = tokens @ model.embedding.T + _places(grid, config.dim)
    wave = _wave(1000.0 * times, 32)

    def parts(modulation: Any) -> Tensor:
        hidden = nn.functional.silu(wave @ modulation.first.T)
        return hidden @ modulation.second.T + modulation.bias

    for layer in model.blocks:
        nine = parts(layer.body.modulation).chunk(9, -1)
        for i, name in enumerate(("temporal", "spatial", "mlp")):
            shift, scale, gate = (one[:, None, None, None] for one in nine[3 * i : 3 * i + 3])
            z = _normed(y) * (1 + scale) + shift
            branch = getattr(layer.body, name)
            if name == "mlp":
                z = nn.functional.gelu(z @ branch.up.T, approximate="tanh") @ branch.down.T
            else:
                z = _attention(z, branch, name == "temporal", config.head_dim)
            y = y + gate * z
    shift, scale = parts(model.modulation).chunk(2, -1)
    z = _normed(y) * (1 + scale[:, None, None, None]) + shift[:, None, None, None]
    return _unpatches(z @ model.head.T, config.patch, x.shape[1:4], config.channels)


def _normed(y: Tensor) -> Tensor:
    centred = y - y.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def _attention(z: Tensor, branch: nn.Module, over_time: bool, head_dim: int) -> Tensor:
    """One softmax after another: each row of the batch, each place, each head, each query."""
    rows, frames, high, wide, dim = z.shape
    if over_time:
        groups = [
            [(t, i, j) for t in range(frames)]
            for i, j in itertools.product(range(high), range(wide))
        ]
    else:
        space = list(itertools.product(range(high), range(wide)))
        groups = [[(t, i, j) for i, j in space] for t in range(frames)]
    out = torch.zeros_like(z)
    for b, group in itertools.product(range(rows), groups):
        seen = torch.stack([z[b][place] for place in group])
        q, k, v = (seen @ w.T for w in branch.qkv.chunk(3))
        heads = []
        for h in range(0, dim, head_dim):
            own = slice(h, h + head_dim)
            found = [
                torch.softmax(k[:, own] @ query[own] / head_dim**0.5, 0) @ v[:, own] for query in q
            ]
            heads.append(torch.stack(found))
        answer = torch.cat(heads, -1) @ branch.out.T
        for place, value in zip(group, answer, strict=True):
            out[(b, *place)] = value
    return out


def _wave(values: Tensor, count: int) -> Tensor:
    steps = torch.tensor([10_000.0 ** (-i / count) for i in range(count)], dtype=torch.float64)
    angles = values[..., None] * steps
    return torch.cat([angles.sin(), angles.cos()], -1)


def _places(grid: tuple[int, ...], dim: int) -> Tensor:
    each = dim // (2 * len(grid))
    found = torch.zeros(*grid, dim, dtype=torch.float64)
    for place in itertools.product(*map(range, grid)):
        for d, position in enumerate(place):
            wave = _wave(torch.tensor(float(position), dtype=torch.float64), each)
            found[place][2 * each * d : 2 * each * (d + 1)] = wave
    return found


def _patches(x: Tensor, patch: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Tokens of the positions of each patch, row-major, then channels; 0 beyond the border."""
    grid = tuple(-(-n // p) for n, p in zip(x.shape[1:-1], patch, strict=True))
    inside = list(itertools.product(*map(range, patch)))
    tokens = []
    for place in itertools.product(*map(range, grid)):
        parts = []
        for offset in inside:
            at = tuple(g * p + o for g, p, o in zip(place, patch, offset, strict=True))
            within = all(a < n for a, n in zip(at, x.shape[1:-1], strict=True))
            parts.append(x[(slice(None), *at)] if within else torch.zeros_like(x[:, 0, 0, 0]))
        tokens.append(torch.cat(parts, -1))
    return torch.stack(tokens, 1).unflatten(1, grid), grid


def _unpatches(y: Tensor, patch: tuple[int, ...], sizes: Any, channels: int) -> Tensor:
    found = torch.zeros(y.shape[0], *sizes, channels, dtype=y.dtype)
    for at in itertools.product(*map(range, sizes)):
        place = tuple(a // p for a, p in zip(at, patch, strict=True))
        number = 0
        for a, p in zip(at, patch, strict=True):
            number = number * p + a % p
        found[(slice(None), *at)] = y[(slice(None), *place)][
            :, number * channels : (number + 1) * channels
        ]
    return found
