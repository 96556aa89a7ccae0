"""Checks of models of grids: what they need, what they read of no other section's settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from xdist.config_checks import Problem, nearest
from xdist.errors import GeometryError

if TYPE_CHECKING:
    from xdist.config import Config
    from xdist.config_text import Path

# The models of grids, and the kind of data that each is trained on.
GRIDS = {"vdt": "video", "mamba_nd": "volume", "axial": "volume"}
# Settings that only models of grids read.
OF_GRIDS: tuple[Path, ...] = (
    ("model", "sizes"),
    ("model", "patch"),
    ("model", "channels"),
    ("model", "classes"),
    ("model", "depth"),
    ("parallel", "dim"),
    ("parallel", "grid"),
    ("data", "kind"),
    ("data", "crop_box"),
    ("data", "slab"),
    ("data", "bias"),
    ("data", "noise"),
    ("data", "degrade_seed"),
    ("evaluate", "samples"),
    ("certify", "sizes"),
)
# Settings that no model of grids reads.
OF_TOKENS: tuple[Path, ...] = (
    ("model", "vocab_size"),
    ("model", "pattern"),
    ("model", "conv_width"),
    ("model", "window"),
    ("model", "ngram_orders"),
    ("model", "ngram_buckets"),
    ("parallel", "layout"),
    ("parallel", "attention"),
    ("parallel", "recurrent"),
    ("data", "documents"),
    ("train", "tile_tokens"),
    ("evaluate", "tokens"),
    ("evaluate", "length"),
    ("certify", "length"),
)
OF_VOLUMES: tuple[Path, ...] = (
    ("model", "classes"),
    ("data", "slab"),
    ("data", "bias"),
    ("data", "noise"),
    ("data", "degrade_seed"),
)
OF_VIDEO: tuple[Path, ...] = (("parallel", "grid"),)


def grid_problems(config: Config) -> list[Problem]:
    """What a model of grids cannot honour, and settings of grids where the model is another."""
    kind = config.model.kind
    if kind not in GRIDS:
        crops = [s for s, stage in enumerate(config.train.curriculum) if stage.crop]
        paths = [*OF_GRIDS, *[("train", "curriculum", stage, "crop") for stage in crops]]
        return list(_without_effect(config, paths))
    lengths = [
        ("train", "curriculum", stage, "length") for stage in range(len(config.train.curriculum))
    ]
    other = OF_VIDEO if GRIDS[kind] == "volume" else OF_VOLUMES
    found = list(_without_effect(config, [*OF_TOKENS, *lengths, *other]))
    found += _refused(config)
    return found + (_sizes(config) or [*_crops(config), *_crop_box(config), *_slab(config)])


def _value(section: object, path: Path) -> object:
    """The value at a path below a section."""
    for part in path:
        section = section[part] if isinstance(part, int) else getattr(section, part)  # type: ignore[index]
    return section


def _without_effect(config: Config, paths: list[Path]) -> Iterator[Problem]:
    kind = config.model.kind
    for path in paths:
        # Of a list's item the default stands in its own section.
        item = _value(config, path[:-1])
        default = getattr(type(item)(), str(path[-1]))
        if getattr(item, str(path[-1])) == default:
            continue
        shown = ".".join(map(str, path))
        yield Problem(
            (path, ("model", "kind")),
            f"{shown} has no effect with {kind}",
            "that model reads no such setting",
            "leave it out" + (", or set model.kind" if path in OF_GRIDS else ""),
        )


def _refused(config: Config) -> Iterator[Problem]:
    kind = config.model.kind
    if config.data.kind != GRIDS[kind]:
        yield Problem(
            (("data", "kind"), ("model", "kind")),
            f'{kind} is not trained on data.kind = "{config.data.kind}"',
            f"it needs {GRIDS[kind]} data",
            f"set data.kind={GRIDS[kind]}",
        )
    if config.train.precision == "bfloat16":
        yield Problem(
            (("train", "precision"), ("model", "kind")),
            f'train.precision = "bfloat16" cannot be honoured by {kind}',
            "it computes in the dtype of its parameters",
            "nearest valid settings: train.precision=float32",
        )
    if config.engine.name == "deepspeed":
        yield Problem(
            (("engine", "name"), ("model", "kind")),
            f'engine.name = "deepspeed" cannot hold {kind}',
            "it was not shown to train one as one rank does",
            "nearest valid settings: engine.name=fsdp, or engine.name=plain",
        )
    if config.data.on_bad == "skip" and GRIDS[kind] == "video":
        yield Problem(
            (("data", "on_bad"), ("model", "kind")),
            f'data.on_bad = "skip" cannot be honoured by {kind}',
            "each position of its samples counts: none can be left out of a batch",
            "nearest valid settings: data.on_bad=stop",
        )
    if config.ray.prepare:
        yield Problem(
            (("ray", "prepare"), ("model", "kind")),
            f"ray.prepare = true cannot prepare the data of {kind}",
            "its tasks read text",
            f"prepare the store with `xdist prepare {GRIDS[kind]}` and leave ray.prepare out",
        )


def _sizes(config: Config) -> list[Problem]:
    """The dims of a sample, of a token, of what is certified, and the sharded one."""
    model, dims = config.model, len(config.model.sizes)
    if not dims:
        return [
            Problem(
                (("model", "sizes"), ("model", "kind")),
                f"model.sizes is not set, which {model.kind} needs",
                "it says how many positions a whole sample has along each dim",
                "write e.g. sizes = [197, 233, 189]",
            )
        ]
    found = []
    for key, sizes in (("model.patch", model.patch), ("certify.sizes", config.certify.sizes)):
        if sizes and len(sizes) != dims:
            section, _, name = key.partition(".")
            found.append(_dims(((section, name), ("model", "sizes")), key, sizes, model.sizes))
    if config.parallel.dim >= dims:
        found.append(
            Problem(
                (("parallel", "dim"), ("model", "sizes")),
                f"parallel.dim = {config.parallel.dim} is no dim of model.sizes",
                f"model.sizes = {list(model.sizes)} has the dims 0 to {dims - 1}",
                "nearest valid settings: " + ", or ".join(
                    f"parallel.dim={d}" for d in nearest(config.parallel.dim, range(dims))
                ),
                GeometryError,
            )
        )  # fmt: skip
    return found


def _dims(keys: tuple[Path, ...], key: str, sizes: object, whole: tuple[int, ...]) -> Problem:
    given = list(sizes)  # type: ignore[call-overload]
    return Problem(
        keys,
        f"{key} = {given} has {len(given)} dims",
        f"model.sizes = {list(whole)} has {len(whole)}",
        "give one number a dim, or [] for the default",
    )


def _crops(config: Config) -> Iterator[Problem]:
    """Each stage's crop lies inside a sample, and every sequence rank gets tokens of it."""
    model, ranks, dim = config.model, config.parallel.sequence_ranks, config.parallel.dim
    patch = model.patch or (1,) * len(model.sizes)
    for index, stage in enumerate(config.train.curriculum):
        path: Path = ("train", "curriculum", index, "crop")
        name = f"train.curriculum.{index}.crop"
        crop = stage.crop or model.sizes
        if len(crop) != len(model.sizes):
            yield _dims((path, ("model", "sizes")), name, crop, model.sizes)
            continue
        if any(c > s for c, s in zip(crop, model.sizes, strict=True)):
            fits = [min(c, s) for c, s in zip(crop, model.sizes, strict=True)]
            yield Problem(
                (path, ("model", "sizes")),
                f"{name} = {list(crop)} is larger than a sample",
                f"model.sizes = {list(model.sizes)}",
                f"nearest valid settings: {name}={fits}",
            )
            continue
        tokens = [-(-c // p) for c, p in zip(crop, patch, strict=True)]
        if tokens[dim] < ranks:
            other = max(range(len(tokens)), key=lambda d: tokens[d])
            turn = [f"parallel.dim={other}"] if tokens[other] >= ranks else []
            yield Problem(
                (path, ("parallel", "dim"), ("parallel", "ring"), ("parallel", "ulysses")),
                f"stage {index} cannot share dim {dim} among {ranks} sequence ranks",
                f"a sample of {list(crop)} positions has {tokens[dim]} tokens along that dim, "
                f"{ranks - tokens[dim]} ranks would hold none",
                "nearest valid settings: "
                + ", or ".join([*turn, f"ring x ulysses = {tokens[dim]}, or a larger crop"]),
                GeometryError,
            )


def _crop_box(config: Config) -> Iterator[Problem]:
    """The box that crops lie in is a part of a sample that holds each of them."""
    box, sizes = config.data.crop_box, config.model.sizes
    if not box:
        return
    crops = [stage.crop for stage in config.train.curriculum if stage.crop]
    keys: tuple[Path, ...] = (("data", "crop_box"), ("model", "sizes"))
    if not crops:
        yield Problem(
            keys,
            f"data.crop_box = {list(box)} has no effect",
            "no stage of train.curriculum has a crop",
            "leave it out, or give a stage a crop",
        )
        return
    least = [max(sides) for sides in zip(*crops, strict=False)]
    spans = list(zip(box[::2], box[1::2], strict=False))
    fits = len(box) == 2 * len(sizes) and all(
        stop <= size and stop - start >= crop
        for (start, stop), size, crop in zip(spans, sizes, least, strict=False)
    )
    if not fits:
        whole = [side for size in sizes for side in (0, size)]
        yield Problem(
            keys,
            f"data.crop_box = {list(box)} is no part of a sample that holds every crop",
            f"model.sizes = {list(sizes)}, the largest crop is {least}",
            f"write [start, stop] of each dim, e.g. crop_box = {whole}",
        )


def _slab(config: Config) -> Iterator[Problem]:
    """The slab whose classes are held out lies inside a sample, and something is left."""
    slab, sizes = config.data.slab, config.model.sizes
    if not slab or GRIDS[config.model.kind] != "volume":
        return
    keys: tuple[Path, ...] = (("data", "slab"), ("model", "sizes"))
    example = f"write e.g. slab = [0, {sizes[0] * 2 // 5}, {max(sizes[0] // 2, 1)}]"
    if len(slab) != 3 or slab[0] >= len(sizes):
        yield Problem(
            keys,
            f"data.slab = {list(slab)} is not [dim, start, stop]",
            f"model.sizes = {list(sizes)} has the dims 0 to {len(sizes) - 1}",
            example,
        )
        return
    dim, start, stop = slab
    if not start < stop <= sizes[dim] or stop - start == sizes[dim]:
        yield Problem(
            keys,
            f"data.slab = {list(slab)} holds out no part of dim {dim}",
            f"it has {sizes[dim]} positions; some must be held out and some be left to train on",
            example,
        )
