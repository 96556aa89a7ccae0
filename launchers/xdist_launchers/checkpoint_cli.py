"""`xdist checkpoint verify | export | import`."""

from __future__ import annotations

import pathlib
from typing import Annotated, Any

import typer

from xdist_launchers.guarded import guarded

_PLAIN: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}
checkpoint_app = typer.Typer(**_PLAIN, help="Verify, export and import checkpoints.")

Where = Annotated[
    pathlib.Path,
    typer.Argument(metavar="RUN|FOLDER", help="folder of a run, or of one checkpoint"),
]


@checkpoint_app.command()
def verify(where: Where) -> None:
    """Hash every file of every checkpoint. Exit code 4 when one is damaged."""

    def body() -> int:
        from xdist.checkpoint.export import checkpoints_of
        from xdist.checkpoint.read import open_checkpoint, reason
        from xdist.errors import CheckpointError

        code = 0
        for path in checkpoints_of(where):
            try:
                found = open_checkpoint(path)
            except CheckpointError as error:
                code = error.exit_code
                print(f"{path.name} is damaged: {reason(error)}")
            else:
                count = len(found.specs)
                print(f"{path.name} is whole: {count} tensors, {found.total_bytes:,} bytes")
        return code

    guarded(body)


@checkpoint_app.command()
def export(
    where: Where,
    out: Annotated[pathlib.Path, typer.Argument(metavar="OUT", help="folder to make")],
    max_file_bytes: Annotated[int, typer.Option(min=1, help="size of one file, about")] = 5 << 30,
) -> None:
    """Write the parameters as HuggingFace lays them out: safetensors, an index, config.json.

    Of a run, the newest whole checkpoint is taken.
    """

    def body() -> None:
        from xdist.checkpoint.export import export_checkpoint

        for line in export_checkpoint(where, out, max_file_bytes=max_file_bytes):
            print(line)

    guarded(body)


@checkpoint_app.command("import")
def import_(
    file: Annotated[
        pathlib.Path, typer.Argument(metavar="FILE", help="state dict written by torch.save")
    ],
    run: Annotated[
        pathlib.Path, typer.Argument(metavar="RUN", help="folder of the run that starts from it")
    ],
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="run whatever code FILE holds, if it holds any")
    ] = False,
) -> None:
    """Turn a foreign pickle into a checkpoint from which RUN starts. Only parameters are taken."""

    def body() -> None:
        from xdist_launchers.checkpoint_import import import_pickle

        for line in import_pickle(file, run, trust_pickle=trust_pickle):
            print(line)

    guarded(body)
