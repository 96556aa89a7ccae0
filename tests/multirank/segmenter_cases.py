"""Models of volumes on real ranks beside one device: outputs, gradients, curves, kept bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import xdist
from xdist.comm import keep, ledger
from xdist.models import axial, mamba_nd
from xdist.models.segmenter import IGNORED, Segmenter, SegmenterConfig

# Patches of 2 divide one dim of three; four ranks find three tokens along the second.
SIZES = (9, 6, 7)
CLASSES = 3
SMALL: dict[str, Any] = {
    "sizes": SIZES, "patch": (2, 2, 2), "channels": 2, "classes": CLASSES, "dim": 8, "depth": 3,
    "dtype": "float64", "head_hidden": 8, "bases": 4,
}  # fmt: skip
CONFIGS: dict[str, SegmenterConfig] = {
    "raster": mamba_nd.MambaNDConfig(**SMALL, state_dim=2),
    "rows": mamba_nd.MambaNDConfig(**SMALL, state_dim=2, scan="rows", expand=1.5),
    "none": mamba_nd.MambaNDConfig(**SMALL, scan="none"),
    "axial": axial.AxialConfig(**{**SMALL, "depth": 1}, head_dim=4),
}


def model_of(config: SegmenterConfig) -> Segmenter:
    file = axial if isinstance(config, axial.AxialConfig) else mamba_nd
    return file.build(config, seed=1)


def volume(
    sizes: tuple[int, ...], channels: int = 2, batch: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Values, and classes with a slab of them held out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *sizes, channels, dtype=torch.float64, generator=generator)
    labels = torch.randint(CLASSES, (batch, *sizes), generator=generator)
    labels[:, :, :2] = IGNORED
    return x, labels


def mesh_of_all() -> xdist.Mesh:
    return xdist.init_mesh(ring=xdist.rank.read_rank().world_size)


def apart(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest wanted value."""
    if not wanted.numel():
        return 0.0
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def against_one_device(name: str, dim: int) -> list[str]:
    """On one rank: what differs from one device, with `dim` of the voxels sharded."""
    config, mesh = CONFIGS[name], mesh_of_all()
    x, labels = volume(SIZES)
    one, many = model_of(config), model_of(config)
    whole = x.clone().requires_grad_()
    wanted = one(whole)
    said = one.loss(whole, labels)
    said.backward()

    gshard = xdist.GridShard(mesh, SIZES, dim)
    own = gshard.scatter(x).requires_grad_()
    errors = {"logits": apart(many(own, gshard), gshard.scatter(wanted))}
    loss = many.loss(own, gshard.scatter(labels), gshard)
    errors["loss"] = apart(loss, said)
    loss.backward()
    xdist.reduce_gradients(many, mesh)
    assert own.grad is not None
    assert whole.grad is not None
    errors["x"] = apart(own.grad, gshard.scatter(whole.grad))
    for (label, p), q in zip(many.named_parameters(), one.parameters(), strict=True):
        if q.grad is None or p.grad is None:
            errors[f"{label} has no gradient"] = 1.0
        else:
            errors[label] = apart(p.grad, q.grad)
    return [f"{key}: {value:.1e}" for key, value in errors.items() if not value <= 1e-10]


def curve(name: str, steps: int = 20) -> list[float]:
    """The losses of `steps` of Adam on one volume a step, sharded first along each dim in turn."""
    mesh = mesh_of_all()
    model = model_of(CONFIGS[name])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        x, labels = volume(SIZES, batch=1, seed=step % 4)
        gshard = xdist.GridShard(mesh, SIZES, step % 3)
        optimizer.zero_grad()
        loss = model.loss(gshard.scatter(x), gshard.scatter(labels), gshard)
        loss.backward()
        xdist.reduce_gradients(model, mesh)
        xdist.clip_grad_norm(model, 1.0, mesh)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def kept_bytes(name: str, sizes: tuple[int, ...], stream: str) -> tuple[int, int]:
    """Bytes of activations that a loss keeps for its backward: saved tensors, storages counted
    once, and what exchanges received; parameters are left out. And bytes that were received."""
    mesh = mesh_of_all()
    config = type(CONFIGS[name])(**{**vars(CONFIGS[name]), "sizes": sizes, "stream": stream})
    model = model_of(config)
    x, labels = volume(sizes, batch=1)
    gshard = xdist.GridShard(mesh, sizes, 0)
    own, labels = gshard.scatter(x), gshard.scatter(labels)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # so that no later tensor takes its place
        return tensor

    tapes: list[keep.Tape] = []
    recording = keep.Tape.__init__

    def noted(self: keep.Tape, *args: Any) -> None:
        recording(self, *args)
        tapes.append(self)

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with ledger() as moved, hooks, mock.patch.object(keep.Tape, "__init__", noted):
        loss = model.loss(own, labels, gshard)
    for tape in tapes:
        for exchange in tape.exchanges:
            for tensor in exchange.tensors.values():
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    assert loss.requires_grad
    return sum(storages.values()), moved.received_bytes


def bytes_as_placed(sizes: tuple[int, ...] = (12, 8, 10)) -> list[str]:
    """Where what a loss and its backward send is not what the placement counts."""
    mesh, wrong = mesh_of_all(), []
    x, labels = volume(sizes, batch=1)
    for name, stream in (("raster", "same"), ("raster", "bfloat16"), ("axial", "bfloat16")):
        config = replace(CONFIGS[name], sizes=sizes, dtype="float32", stream=stream)
        model = model_of(config)
        gshard = xdist.GridShard(mesh, sizes, 0)
        with ledger() as moved:
            model.loss(gshard.scatter(x.float()), gshard.scatter(labels), gshard, 100).backward()
        placed = model.placement(gshard.size).moved[gshard.rank].sent_bytes
        # The loss itself is a sum over ranks; patches divide these shares.
        sent = moved.sent_bytes - moved.by_move["reduce"].sent_bytes
        if sent != placed:
            wrong.append(f"{name}, {stream}: sent {sent}, placed {placed}")
    return wrong
