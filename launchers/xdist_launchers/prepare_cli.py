"""`xdist prepare text | task`; prepare_grids_cli adds those of grids."""

from __future__ import annotations

import enum
import sys
from typing import Annotated, Any

import typer

from xdist_launchers.guarded import guarded

_PLAIN: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}
prepare_app = typer.Typer(**_PLAIN, help="Make a data store.")


class Existing(enum.Enum):
    """What to do with a store that is there: `keep` wants the same files in it."""

    ERROR = "error"
    KEEP = "keep"
    REPLACE = "replace"


@prepare_app.command("text")
def prepare_text(
    sources: Annotated[list[str], typer.Argument(metavar="FILES|DIRS...", help="what to read")],
    store: Annotated[str, typer.Argument(metavar="STORE", help="zarr store to write")],
    pattern: Annotated[str, typer.Option(help="files to take inside folders, e.g. '*.py'")] = "*",
    held_out: Annotated[float, typer.Option(help="share of files kept out of training")] = 0.05,
    vocabulary_size: Annotated[
        int | None, typer.Option(help="sources are 1-D .npy files of token ids below this")
    ] = None,
    existing: Annotated[
        Existing, typer.Option(help="what to do with a store that is there")
    ] = Existing.KEEP,
) -> None:
    """Write files as one store of bytes (or token ids): checksummed, with documents and held-out.

    A store that already holds the same files is kept.
    """

    def body() -> None:
        from xdist.data.prepare import prepare_text

        made = prepare_text(
            sources,
            store,
            held_out_fraction=held_out,
            vocabulary_size=vocabulary_size,
            pattern=pattern,
            existing=existing.value,
            on_progress=_prepared if sys.stderr.isatty() else None,
        )
        print("\n".join(made.lines()))

    guarded(body)


def _prepared(done_bytes: int, total_bytes: int) -> None:
    end = "\n" if done_bytes >= total_bytes else ""
    print(f"\r{done_bytes / 1e6:.1f} of {total_bytes / 1e6:.1f} MB", end=end, file=sys.stderr)


@prepare_app.command("task")
def prepare_task(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="mqar, passkey, copy or state_tracking")
    ],
    store: Annotated[str, typer.Argument(metavar="STORE", help="zarr store to write")],
    length: Annotated[int, typer.Option(help="tokens of one sample")],
    samples: Annotated[int, typer.Option(help="samples to train on")] = 10_000,
    held_out: Annotated[int, typer.Option(help="samples to evaluate on")] = 256,
    held_out_length: Annotated[
        int | None, typer.Option(help="tokens of a held-out sample, if not --length")
    ] = None,
    seed: Annotated[int, typer.Option(help="what the samples are drawn from")] = 0,
    vocab: Annotated[int | None, typer.Option(help="mqar, copy: number of token ids")] = None,
    pairs: Annotated[int | None, typer.Option(help="mqar: keys with a value")] = None,
    queries: Annotated[int | None, typer.Option(help="mqar: keys that are asked for")] = None,
    power: Annotated[float | None, typer.Option(help="mqar: exponent of the distances")] = None,
    digits: Annotated[int | None, typer.Option(help="passkey: digits of the number")] = None,
    group: Annotated[str | None, typer.Option(help="state_tracking: parity, s3, a5 or s5")] = None,
    existing: Annotated[
        Existing, typer.Option(help="what to do with a store that is there")
    ] = Existing.KEEP,
) -> None:
    """Write samples of a synthetic task with the answers that are scored, drawn from a seed.

    A store that was made with the same settings is kept.
    """

    def body() -> None:
        from xdist.data.task_store import prepare_task

        made = prepare_task(
            name,
            store,
            length=length,
            samples=samples,
            held_out=held_out,
            held_out_length=held_out_length,
            seed=seed,
            existing=existing.value,
            vocab=vocab,
            pairs=pairs,
            queries=queries,
            power=power,
            digits=digits,
            group=group,
        )
        print("\n".join(made.lines()))

    guarded(body)
