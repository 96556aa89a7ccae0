"""What a launcher starts: one job of N ranks, and the body of one rank."""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence

from xdist.config import Config, load, override
from xdist.config_checks import Problem, raise_problems, store_problem, world_problem
from xdist_launchers.failure import Failure, failure_of, inform_torchrun, tell, write_failure

END_S = 60.0  # for a rank to end, once it has saved


@dataclasses.dataclass(frozen=True)
class Job:
    """A checked config and the words that make each rank read the same one.

    `command` starts one rank; it gets the path of the rank's failure record appended.
    `stop_timeout_s` is the longest time from the first signal to the end of the ranks.
    """

    command: tuple[str, ...]
    ranks: int
    threads: int
    directory: pathlib.Path
    max_restarts: int
    init_timeout_s: float
    again: str
    stop_timeout_s: float

    def log_file(self, rank: int) -> pathlib.Path:
        """Where a rank other than 0 prints."""
        return self.directory / "logs" / f"rank-{rank}.log"

    def error_file(self, rank: int) -> pathlib.Path:
        """Where a rank leaves why it failed."""
        return error_file(self.directory, rank)

    @property
    def met_file(self) -> pathlib.Path:
        """What rank 0 leaves when all ranks have met; set-up comes after it."""
        return self.directory / "logs" / "met"

    def started_file(self, rank: int) -> pathlib.Path:
        """What a rank leaves when it has loaded everything and is about to meet the others."""
        return started_file(self.error_file(rank))


def started_file(record: pathlib.Path) -> pathlib.Path:
    """The name beside a rank's failure record, e.g. logs/rank-1.started."""
    return record.with_name(record.name.replace(".error.json", ".started"))


def error_file(directory: pathlib.Path, rank: int) -> pathlib.Path:
    """Where a rank of a run leaves why it failed, with its traceback."""
    return directory / "logs" / f"rank-{rank}.error.json"


def local_job(
    path: str, overrides: Sequence[str], *, render: bool = False, launcher: str = "local"
) -> Job:
    """Read and check the config before anything is started; raises ConfigError.

    `path` may be "" when the job is only rendered: the settings are the defaults then.
    """
    if not path and not render:
        from xdist.errors import ConfigError

        raise ConfigError(
            "no config was given",
            "only --print can do without one",
            f"xdist launch {launcher} CONFIG --ranks N",
        )
    config = load(path, overrides) if path else override(Config(), overrides)
    if not render:
        _raise_any(path, store_problem(config))
    ranks = config.ranks
    # Every rank reads the same number of ranks, whether it came from the file or from degrees.
    settings = [item for item in overrides if not item.startswith("launch.ranks=")]
    words = [path, *settings]
    return Job(
        command=(*program(), "train", *words, f"launch.ranks={ranks}", "--error-file"),
        ranks=ranks,
        threads=config.run.threads,
        directory=config.run_directory,
        max_restarts=config.launch.max_restarts,
        init_timeout_s=config.launch.init_timeout_s,
        again=shlex.join(["xdist", "launch", launcher, *words, "--ranks", str(ranks)]),
        stop_timeout_s=stop_timeout_s(config),
    )


def stop_timeout_s(config: Config) -> float:
    """How long ranks that were asked to stop may take until they have saved and ended, seconds.

    A signal finds them in a step; a save may be due after it, and the next step may have begun
    before all of them know; then comes the last save. The watchdog bounds each of the four.
    """
    longest = max(config.train.first_step_timeout_s, config.train.step_timeout_s)
    return 4 * longest + END_S


def _raise_any(path: str, *found: Problem | None) -> None:
    raise_problems([problem for problem in found if problem], path)


def program() -> tuple[str, ...]:
    """The command line of this very installation; -P keeps the current folder off sys.path."""
    return (sys.executable, "-P", "-m", "xdist_launchers.cli")


def run_rank(path: str, overrides: Sequence[str], record: pathlib.Path | None) -> int:
    """Train as the rank that the environment names; returns the exit code.

    A failure is written to `record`, and whoever gave that path tells the user. Without one it is
    told here: by the rank it happened on, or by rank 0 alone when all ranks fail alike.
    """
    rank, directory = 0, None
    try:
        from xdist.rank import read_rank
        from xdist_launchers import environment

        environment.check()
        here = read_rank()
        rank = here.rank
        config = load(path, overrides)
        directory = config.run_directory
        _raise_any(path, world_problem(config, here.world_size), store_problem(config))
        if config.launch.ranks is None:
            config = override(config, [f"launch.ranks={here.world_size}"])

        faulthandler.enable()
        from xdist.console import say
        from xdist.plan import plan
        from xdist.train import run

        if rank == 0:
            # What will be measured is said beforehand; no process group is there yet.
            say(plan(config).table(), sys.stdout)
        if record is not None:
            started_file(record).touch()
        return run(config, on_abort=lambda error: _leave(error, rank, directory, record))
    except (Exception, KeyboardInterrupt) as error:
        _leave(error, rank, directory, record)
        return failure_of(error).exit_code


def _leave(
    error: BaseException, rank: int, directory: pathlib.Path | None, record: pathlib.Path | None
) -> None:
    """Write this rank's failure record; tell it where no launcher will."""
    failure = failure_of(error, rank)
    inform_torchrun(failure)
    path = record
    if path is None and directory is not None and os.path.isdir(directory):
        path = error_file(directory, rank)
    written = path is not None and _written(failure, path)
    if record is not None and written:
        return
    # Errors of settings and those that all ranks agreed on are raised by every rank.
    alike = failure.exit_code == 2 or getattr(error, "agreed", False)
    if rank == 0 or not alike:
        tell(failure, str(path) if written else "")


def _written(failure: Failure, path: pathlib.Path) -> bool:
    """Write a rank's record, and say whether the disk took it."""
    from xdist.console import on_disk

    with on_disk(str(path)):
        write_failure(failure, path)
        return True
    return False
