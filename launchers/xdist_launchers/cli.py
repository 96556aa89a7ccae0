"""The command line. Each command imports its room when it runs, so that help and show stay fast."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

_PLAIN: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}
app = typer.Typer(**_PLAIN, help="Train on sequences too long for one device.")
launch_app = typer.Typer(**_PLAIN, help="Start the ranks of a run.")
prepare_app = typer.Typer(**_PLAIN, help="Make a data store.")
app.add_typer(launch_app, name="launch")
app.add_typer(prepare_app, name="prepare")

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="TOML file of the run")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="settings that replace those of the file"),
]
Ranks = Annotated[int | None, typer.Option(min=1, help="number of ranks (launch.ranks)")]


def _guarded(body: Callable[[], int | None], rank: int = 0) -> None:
    """Run a command's body; end with its exit code, or tell its error once."""
    from xdist_launchers.failure import failure_of, tell

    try:
        code = body() or 0
    except (typer.Exit, typer.Abort):
        raise
    except (Exception, KeyboardInterrupt) as error:
        failure = failure_of(error, rank)
        tell(failure)
        code = failure.exit_code
    raise typer.Exit(code)


def _with_ranks(overrides: list[str] | None, ranks: int | None) -> list[str]:
    """The overrides, with `--ranks` as one of them."""
    return [*(overrides or []), *([f"launch.ranks={ranks}"] if ranks is not None else [])]


@app.command()
def show(config: ConfigFile, overrides: Overrides = None, ranks: Ranks = None) -> None:
    """Print the settings as resolved, in TOML. Checks everything, loads no torch."""

    def body() -> None:
        from xdist.config import load, to_toml

        print(to_toml(load(config, _with_ranks(overrides, ranks))), end="")

    _guarded(body)


@app.command()
def doctor() -> None:
    """Say what this machine has: versions, devices, cores, memory, name clashes."""

    def body() -> int:
        from xdist_launchers.doctor import report

        lines, code = report()
        print("\n".join(lines))
        return code

    _guarded(body)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    error_file: Annotated[pathlib.Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train as one rank: alone, or one of those that a launcher started."""
    from xdist_launchers.job import run_rank

    code = run_rank(config, overrides or [], error_file)
    if code:
        # A rank that failed must not wait in exit handlers for peers that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@launch_app.command("local")
def launch_local(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="TOML file of the run")] = "",
    overrides: Overrides = None,
    ranks: Ranks = None,
    render: Annotated[
        bool, typer.Option("--print", help="print the commands as a script and start nothing")
    ] = False,
) -> None:
    """Start every rank on this host and watch over them."""

    def body() -> int:
        from xdist_launchers import local
        from xdist_launchers.job import local_job

        settings = _with_ranks(overrides, ranks)
        if "=" in config and not pathlib.Path(config).exists():
            settings = [config, *settings]
            job = local_job("", settings, render=render)
        else:
            job = local_job(config, settings, render=render)
        if render:
            print(local.script(job), end="")
            return 0
        return local.run(job)

    _guarded(body)


def main() -> None:
    """The console script `xdist`."""
    from xdist_launchers.doctor import clash

    line = clash()
    if line:
        print(line, file=sys.stderr)
        raise SystemExit(3)
    app()


if __name__ == "__main__":
    main()
