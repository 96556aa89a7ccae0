"""`xdist prepare volume | video | flow`: added to the commands of `xdist prepare`."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from xdist_launchers.guarded import guarded
from xdist_launchers.prepare_cli import Existing, prepare_app


class Normalise(enum.Enum):
    """What a reader gives: values in [0, 1], by mean and deviation, or as measured."""

    RANGE = "range"
    ZSCORE = "zscore"
    NONE = "none"


_Store = Annotated[str, typer.Argument(metavar="STORE", help="zarr store to write")]
_Kept = Annotated[Existing, typer.Option(help="what to do with a store that is there")]
_Seed = Annotated[int, typer.Option(help="what the samples are drawn from")]
_Samples = Annotated[int, typer.Option(help="samples to train on")]
_HeldOut = Annotated[int, typer.Option(help="samples to evaluate on")]
_Frames = Annotated[int, typer.Option(help="frames of one sample")]


@prepare_app.command("volume")
def prepare_volume(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IN.nii.gz...", help="channels of one volume, on one grid"),
    ],
    store: _Store,
    labels: Annotated[str | None, typer.Option(help="label map: integers from 0")] = None,
    maps: Annotated[
        list[str] | None,
        typer.Option("--map", help="NAME=FILE, a probability map; once for each class"),
    ] = None,
    map_scale: Annotated[float, typer.Option(help="what certain is in a map: 1, or 255")] = 1.0,
    classes: Annotated[str, typer.Option(help="names of the label map's classes: a,b,c")] = "",
    normalise: Annotated[
        Normalise, typer.Option(help="of the values that are read")
    ] = Normalise.RANGE,
    orientation: Annotated[str, typer.Option(help="where axes must grow to")] = "RAS",
    reorient: Annotated[bool, typer.Option(help="flip and permute axes to it")] = False,
    chunk: Annotated[str, typer.Option(help="voxels of a chunk along each dim: a,b,c")] = "",
    slab_dim: Annotated[int, typer.Option(help="chunks are slabs across this dim")] = 0,
    existing: _Kept = Existing.KEEP,
) -> None:
    """Write a NIfTI volume (extra: volumes) with its classes as one store, cut into slabs.

    A store that was made from the same files with the same settings is kept.
    """

    def body() -> None:
        from xdist.data.volume import Volume, prepare_volume

        named = dict(_named(one) for one in maps or [])
        made = prepare_volume(
            [Volume(tuple(images), labels, named)],
            store,
            classes=[one.strip() for one in classes.split(",") if one.strip()],
            map_scale=map_scale,
            normalise=normalise.value,
            orientation=orientation,
            reorient=reorient,
            chunk=_sizes(chunk, "--chunk") if chunk else None,
            slab_dim=slab_dim,
            existing=existing.value,
        )
        print("\n".join(made.lines()))

    guarded(body)


@prepare_app.command("video")
def prepare_video(
    store: _Store,
    samples: _Samples = 64,
    held_out: _HeldOut = 8,
    frames: _Frames = 16,
    size: Annotated[str, typer.Option(help="height,width of a frame")] = "32,32",
    shapes: Annotated[int, typer.Option(help="shapes in one sample")] = 2,
    seed: _Seed = 0,
    existing: _Kept = Existing.KEEP,
) -> None:
    """Write videos of bouncing shapes, whose law of motion is known, drawn from a seed."""

    def body() -> None:
        from xdist.data.video import Bouncing, prepare_video

        height, width = _sizes(size, "--size", 2)
        made = prepare_video(
            Bouncing(frames=frames, height=height, width=width, shapes=shapes, seed=seed),
            store,
            samples=samples,
            held_out=held_out,
            existing=existing.value,
        )
        print("\n".join(made.lines()))

    guarded(body)


@prepare_app.command("flow")
def prepare_flow(
    store: _Store,
    samples: _Samples = 16,
    held_out: _HeldOut = 2,
    frames: _Frames = 16,
    size: Annotated[int, typer.Option(help="points along each side, even")] = 32,
    viscosity: Annotated[float, typer.Option(help="1 over the Reynolds number")] = 0.01,
    waves: Annotated[int, typer.Option(help="wave number of the forcing")] = 4,
    interval: Annotated[float, typer.Option(help="time between frames")] = 0.25,
    seed: _Seed = 0,
    existing: _Kept = Existing.KEEP,
) -> None:
    """Write 2-D Kolmogorov flow (vorticity) from a spectral solver, drawn from a seed."""

    def body() -> None:
        from xdist.data.flow import Kolmogorov, prepare_flow

        made = prepare_flow(
            Kolmogorov(
                frames=frames,
                size=size,
                viscosity=viscosity,
                waves=waves,
                interval=interval,
                seed=seed,
            ),
            store,
            samples=samples,
            held_out=held_out,
            existing=existing.value,
        )
        print("\n".join(made.lines()))

    guarded(body)


def _named(text: str) -> tuple[str, str]:
    from xdist.errors import ConfigError

    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ConfigError(
            f"--map {text!r} names no class", "want NAME=FILE", "for instance --map grey=gm.nii.gz"
        )
    return name, path


def _sizes(text: str, option: str, count: int | None = None) -> tuple[int, ...]:
    from xdist.errors import ConfigError

    try:
        found = tuple(int(one) for one in text.split(","))
    except ValueError:
        found = ()
    if not found or (count is not None and len(found) != count):
        raise ConfigError(
            f"{option} {text!r} is not {count or 'a number'} of sizes", "", "for instance 32,32"
        )
    return found
