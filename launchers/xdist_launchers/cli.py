"""The command line. Each command imports its room when it runs, so that help and show stay fast."""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Annotated, Any

import typer

from xdist_launchers.checkpoint_cli import checkpoint_app
from xdist_launchers.guarded import guarded
from xdist_launchers.prepare_grids_cli import prepare_app

_PLAIN: dict[str, Any] = {
    "no_args_is_help": True,
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
}
app = typer.Typer(**_PLAIN, help="Train on sequences too long for one device.")
launch_app = typer.Typer(**_PLAIN, help="Start the ranks of a run.")
app.add_typer(launch_app, name="launch")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(prepare_app, name="prepare")

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="TOML file of the run")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="settings that replace those of the file"),
]
Ranks = Annotated[int | None, typer.Option(min=1, help="number of ranks (launch.ranks)")]


def _with_ranks(overrides: list[str] | None, ranks: int | None) -> list[str]:
    """The overrides, with `--ranks` as one of them."""
    return [*(overrides or []), *([f"launch.ranks={ranks}"] if ranks is not None else [])]


@app.command()
def show(config: ConfigFile, overrides: Overrides = None, ranks: Ranks = None) -> None:
    """Check the settings and print them as resolved."""

    def body() -> None:
        from xdist.config import load, to_toml

        print(to_toml(load(config, _with_ranks(overrides, ranks))), end="")

    guarded(body)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Ranks = None,
    rehearse: Annotated[
        bool, typer.Option("--dry-run", help="also run a step of every stage without values")
    ] = False,
) -> None:
    """Predict bytes across ranks and peak memory. Starts nothing."""

    def body() -> None:
        from xdist.config import load

        settings = load(config, _with_ranks(overrides, ranks))

        from xdist.plan import plan

        print(plan(settings).table(), flush=True)
        if rehearse:
            from xdist.dry_run import dry_run

            print(dry_run(settings).table())

    guarded(body)


@app.command()
def certify(config: ConfigFile, overrides: Overrides = None) -> None:
    """Prove that the config's model is the same on 1, 2, 3 ranks."""

    def body() -> None:
        from xdist.config import load

        settings = load(config, overrides or [])

        from xdist.certify import certify_config

        report = certify_config(settings)
        print(report.table(), flush=True)
        if not report.passed:
            from xdist.errors import NumericsError

            raise NumericsError(
                f"certification failed: {len(report.findings)} finding(s)",
                "they stand under the table",
                "mend the module, or leave out the setting that breaks it",
            )

    guarded(body)


@app.command()
def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="folder of a run, e.g. runs/NAME")],
) -> None:
    """Write report.html of a run, finished or not."""

    def body() -> None:
        from xdist.errors import ConfigError

        _private()
        folder = pathlib.Path(run)
        if not (folder / "status.json").exists():
            known = sorted(str(path.parent) for path in pathlib.Path("runs").glob("*/status.json"))
            raise ConfigError(
                f"{run} is not the folder of a run",
                "it holds no status.json",
                f"runs here: {', '.join(known)}" if known else "give a folder, e.g. runs/NAME",
            )
        from xdist.train.report import write_report

        print(write_report(folder))

    guarded(body)


@app.command()
def doctor(
    config: Annotated[
        str, typer.Argument(metavar="[CONFIG]", help="a run whose run.directory is looked at")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Say what this machine has, what is missing for which feature, and how to add it."""

    def body() -> int:
        from xdist_launchers import findings
        from xdist_launchers.doctor import findings as look

        directory = pathlib.Path("runs")
        if config:
            from xdist.config import load

            directory = load(config, []).run_directory
        found = look(directory)
        if as_json:
            print(findings.as_json(found))
        elif sys.stdout.isatty():
            findings.show(found)
        else:
            print("\n".join(findings.lines(found)))
        return findings.exit_code(found)

    guarded(body)


@launch_app.callback()
def _private() -> None:
    # Logs, losses and configs of a run are its owner's: files 0600, folders 0700.
    os.umask(0o077)


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    error_file: Annotated[pathlib.Path | None, typer.Option(hidden=True)] = None,
    mpi: Annotated[
        bool, typer.Option("--mpi", help="mpirun started this rank: ask MPI where to meet")
    ] = False,
) -> None:
    """Train as one rank: alone, or started by a launcher."""
    _private()
    if mpi:
        from xdist_launchers.mpi import run_rank
    else:
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
        from xdist_launchers import environment, local
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
        environment.check_launcher("xdist launch local")
        return local.run(job)

    guarded(body)


@launch_app.command("mpi")
def launch_mpi(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="TOML file of the run")] = "",
    overrides: Overrides = None,
    ranks: Ranks = None,
    render: Annotated[
        bool, typer.Option("--print", help="print the mpirun command as a script; start nothing")
    ] = False,
) -> None:
    """Start the ranks by mpirun, on one host or several."""

    def body() -> int:
        from xdist_launchers import environment, mpi, mpi_watch

        settings = _with_ranks(overrides, ranks)
        path = config
        if "=" in config and not pathlib.Path(config).exists():
            path, settings = "", [config, *settings]
        job = mpi.mpi_job(path, settings, render=render)
        if render:
            print(mpi.script(job), end="")
            return 0
        environment.check_launcher("xdist launch mpi")
        return mpi_watch.run(job)

    guarded(body)


@launch_app.command("ray")
def launch_ray(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="TOML file of the run")] = "",
    overrides: Overrides = None,
    ranks: Ranks = None,
    render: Annotated[
        bool, typer.Option("--print", help="print what would be started; start nothing")
    ] = False,
    insecure: Annotated[
        bool,
        typer.Option("--insecure-ray", help="use a cluster although RAY_AUTH_MODE is not token"),
    ] = False,
) -> None:
    """Start the ranks as Ray actors: on the cluster at ray.address, or on a private one."""

    def body() -> int:
        from xdist_launchers import environment, ray_driver, ray_script

        settings = _with_ranks(overrides, ranks)
        path = config
        if "=" in config and not pathlib.Path(config).exists():
            path, settings = "", [config, *settings]
        resolved, job = ray_driver.ray_job(path, settings, render=render)
        if render:
            print(ray_script.script(resolved, job), end="")
            return 0
        environment.check_launcher("xdist launch ray")
        return ray_driver.run(resolved, job, insecure=insecure)

    guarded(body)


@launch_app.command("slurm")
def launch_slurm(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="TOML file of the run")] = "",
    overrides: Overrides = None,
    ranks: Ranks = None,
    render: Annotated[
        bool, typer.Option("--print", help="print the batch script and submit nothing")
    ] = False,
) -> None:
    """Submit a job of Slurm, one task a rank; it saves before its time limit and is requeued."""

    def body() -> None:
        from xdist_launchers.slurm import launch

        print(launch(config, _with_ranks(overrides, ranks), render_only=render), end="")

    guarded(body)


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
