"""`xdist launch slurm`: the batch script as pure text, and its submission.

The script is thin: what needs arithmetic or the config is done by slurm_job.py, which it calls
before, as and after the ranks.
"""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

from xdist.config import Config, load, override
from xdist.config_checks import Problem, raise_problems, store_problem
from xdist.errors import ConfigError, LaunchError

USAGE = "sbatch [options] slurm/train.sh CONFIG [key=value ...]"

# What `slurm.options` may not set, and what sets it instead.
_OWNED = {
    "nodes": "slurm.nodes",
    "ntasks": "launch.ranks",
    "ntasks-per-node": "launch.ranks and slurm.nodes",
    "cpus-per-task": "slurm.cpus_per_task",
    "gpus-per-task": "slurm.gpus_per_task",
    "time": "slurm.time_minutes",
    "partition": "slurm.partition",
    "account": "slurm.account",
    "mem": "slurm.memory",
    "signal": "slurm.signal_s",
    "requeue": "slurm.requeue",
    "no-requeue": "slurm.requeue",
    "job-name": "run.name",
    "output": "run.directory and run.name",
    "error": "run.directory and run.name",
    "open-mode": "nothing: a requeued job goes on in the same log",
    "chdir": "nothing: paths of the config start where the job is submitted",
    "export": "nothing: the ranks need the batch script's environment",
    "array": "nothing: a run is one job",
    "wrap": "nothing: the script is rendered",
}

_BODY = """\
job=({job})
node="$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/^ *NodeAddr=\\([^ ]*\\).*/\\1/p')"

# Before the time limit Slurm signals this script alone; srun hands the signal on to every rank.
# At scancel Slurm tells the ranks by itself, and this script waits for them.
asked=no ranks=
trap 'asked=yes; [[ -z "$ranks" ]] || kill -USR1 "$ranks" || true' USR1
trap ':' TERM

# A step that is not told how many cards a task needs lets each task see all cards of its node:
# NCCL wants that, and LOCAL_RANK picks one.
unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK

next=start
while [[ "$next" == start ]]; do
  meeting="$("${{job[@]}}" begin {kind} "$node" "$@")"
  read -r MASTER_ADDR MASTER_PORT XDIST_NONCE <<<"$meeting"
  export MASTER_ADDR MASTER_PORT XDIST_NONCE
  srun --kill-on-bad-exit=1 --export=ALL --mpi=none --input=none --distribution=block \\
    --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}" \\
    "${{job[@]}}" rank "$@" &
  ranks=$!
  # A signal ends `wait` early; the code of a process that has ended is kept.
  while kill -0 "$ranks" 2>/dev/null; do wait "$ranks" || true; done
  code=0
  wait "$ranks" || code=$?
  ranks=
  # Prints what comes next, and ends with the code of the rank that failed first.
  code_of_srun=$code code=0
  next="$("${{job[@]}}" end "$code_of_srun" "$asked" "$@")" || code=$?
  if [[ "$next" == requeue ]]; then
    scontrol requeue "$SLURM_JOB_ID" || echo "xdist: not requeued; submit it again" >&2
  fi
done
exit "$code"
"""


def render(
    config: Config, path: str = "", overrides: Sequence[str] = (), *, python: str = ""
) -> str:
    """The batch script for `config`, which `path` and `overrides` make.

    Without a path it is slurm/train.sh: the config is the script's argument, and the Python is that
    of .venv where the job was submitted, else python3. `python` is the interpreter of a script for
    one config; XDIST_PYTHON replaces either when the job starts.

    Raises:
        ConfigError: settings of [slurm] contradict each other or the number of ranks.
    """
    lines = ["#!/usr/bin/env bash"]
    lines += [f"#SBATCH {option}" for option in _header(config, bool(path))]
    if path:
        again = shlex.join(["xdist", "launch", "slurm", path, *overrides])
        lines += [f"# Rendered by: {' '.join(again.split())}"]
    else:
        lines += [
            f"# {USAGE}",
            "# Options of sbatch replace those above: sbatch -N2 --ntasks=8 --gpus-per-task=1 ...",
            "# Written by `xdist launch slurm --print`; docs/slurm.md explains it.",
        ]
    if config.slurm.modules:
        lines += [
            "# Shells of batch jobs are no login shells: `module` may not be known yet.",
            "# shellcheck source=/dev/null",
            "type module >/dev/null 2>&1 || source /etc/profile",
            f"module load {shlex.join(config.slurm.modules)} || exit 3",
        ]
    lines += ["set -euo pipefail"]
    inside = shlex.split(config.slurm.container)
    if path:
        lines += [f"set -- {shlex.join([path, *overrides])}"]
        default = shlex.quote("python3" if inside else python or "python3")
        lines += ['python="${XDIST_PYTHON:-}"', f'[[ -n "$python" ]] || python={default}']
    else:
        lines += [f': "${{1:?usage: {USAGE}}}"']
        find = "python3" if inside else "$(command -v .venv/bin/python || command -v python3)"
        lines += [f'python="${{XDIST_PYTHON:-{find}}}"']
    words = [*map(shlex.quote, inside), '"$python"', "-P", "-m", "xdist_launchers.slurm_job"]
    body = _BODY.format(job=" ".join(words), kind="own" if path else "any")
    return "\n".join([*lines, body])


def _header(config: Config, own: bool) -> list[str]:
    """The options of sbatch, one an item. `own`: for one config, not for all."""
    slurm, ranks = config.slurm, config.ranks
    options = {
        "job-name": config.run.name if own else "xdist",
        "nodes": slurm.nodes,
        "ntasks": ranks,
        # Otherwise Slurm fills the first node as far as it can.
        "ntasks-per-node": ranks // slurm.nodes if slurm.nodes > 1 else None,
        "cpus-per-task": slurm.cpus_per_task,
        "gpus-per-task": slurm.gpus_per_task or None,
        "mem": slurm.memory or None,
        "time": slurm.time_minutes,
        "partition": slurm.partition or None,
        "account": slurm.account or None,
        "signal": f"B:USR1@{slurm.signal_s}",
        "requeue" if slurm.requeue else "no-requeue": "",
        "open-mode": "append",
        "output": _quoted(str(config.run_directory / "logs" / "slurm-%j.log"))
        if own
        else "slurm-%j.log",
    }
    lines = [
        f"--{name}={value}" if value != "" else f"--{name}"
        for name, value in options.items()
        if value is not None
    ]
    for item in slurm.options:
        name, equals, value = item.partition("=")
        lines.append(name + equals + (_quoted(value) if value else ""))
    return lines


def _quoted(value: str) -> str:
    """A value as sbatch reads it from a #SBATCH line; the settings' patterns allow no "'" in it."""
    return shlex.quote(value)


def slurm_problems(config: Config) -> list[Problem]:
    """Settings that no Slurm job can honour."""
    slurm, ranks = config.slurm, config.ranks
    found = []

    def add(keys: Sequence[str], what: str, why: str, do: str) -> None:
        split = tuple(tuple(key.split(".")) for key in keys)
        found.append(Problem(split, what, why, do))

    if ranks % slurm.nodes:
        add(
            ["slurm.nodes", "launch.ranks"],
            f"{ranks} ranks cannot be spread evenly over slurm.nodes = {slurm.nodes}",
            f"{ranks} / {slurm.nodes} = {ranks // slurm.nodes} remainder {ranks % slurm.nodes}",
            "set slurm.nodes to a divisor of the number of ranks: "
            + ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0),
        )
    if slurm.signal_s >= 60 * slurm.time_minutes:
        add(
            ["slurm.signal_s", "slurm.time_minutes"],
            "the job would be told to save before it has begun",
            f"slurm.signal_s = {slurm.signal_s} s of slurm.time_minutes = {slurm.time_minutes} min",
            "give it more time, or a later signal",
        )
    if config.run.threads > slurm.cpus_per_task:
        add(
            ["run.threads", "slurm.cpus_per_task"],
            f"run.threads = {config.run.threads} do not fit slurm.cpus_per_task = "
            f"{slurm.cpus_per_task}",
            "Slurm keeps each rank on the cores it was given",
            f"set slurm.cpus_per_task={config.run.threads}",
        )
    for item in slurm.options:
        name = item.partition("=")[0].removeprefix("--")
        # sbatch takes every beginning of a name that is not that of another one.
        owner = _OWNED.get(name) or next(
            (by for owned, by in _OWNED.items() if owned.startswith(name)), ""
        )
        if owner:
            add(
                ["slurm.options"],
                f"slurm.options may not hold {item!r}",
                f"what sets it is {owner}",
                "leave it out of slurm.options",
            )
    try:
        shlex.split(slurm.container)
    except ValueError as error:
        add(
            ["slurm.container"],
            f"slurm.container = {slurm.container!r} is not a command",
            str(error),
            "close its quotes",
        )
    path = str(config.run_directory)
    if any(letter in path for letter in "'%\\\n") or not path.isprintable():
        add(
            ["run.directory"],
            f"run.directory = {config.run.directory!r} cannot stand in a batch script",
            "sbatch gives a meaning of its own to %, \\, quotes and line breaks in the log's path",
            "choose another folder",
        )
    return found


def launch(path: str, overrides: Sequence[str], *, render_only: bool) -> str:
    """`xdist launch slurm`: the script, or what to tell the user of the submitted job."""
    if not path or ("=" in path and not pathlib.Path(path).exists()):
        if not render_only:
            raise ConfigError(
                "no config was given",
                "only --print can do without one",
                "xdist launch slurm CONFIG [key=value ...]",
            )
        config, path = override(Config(), [path, *overrides] if path else overrides), ""
    else:
        config = load(path, overrides)
    store = None if render_only else store_problem(config)
    raise_problems([*slurm_problems(config), *([store] if store else [])], path or "settings")
    script = render(config, path, overrides if path else (), python=sys.executable)
    return script if render_only else submit(config, script)


def submit(config: Config, script: str) -> str:
    """Give the script to sbatch; what to tell the user is returned.

    Raises:
        LaunchError: there is no sbatch here, or it refused.
        ConfigError: the folder of the run cannot be made.
    """
    logs = config.run_directory / "logs"
    # sbatch hands the mask on to the job: its log is this user's alone, as all files of the run.
    os.umask(0o077)
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"the folder {logs} cannot be made", str(error), "set run.directory to another folder"
        ) from error
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise LaunchError(
            "sbatch was not found",
            "this host has no Slurm commands on its PATH",
            "submit from a login node of the cluster, or render the script with --print",
        ) from None
    if done.returncode:
        raise LaunchError(
            "sbatch refused the job",
            done.stderr.strip() or f"it ended with exit code {done.returncode}",
            "`xdist launch slurm CONFIG --print` shows what was submitted",
        )
    number = done.stdout.strip().partition(";")[0]
    ranks, nodes = config.ranks, config.slurm.nodes
    return "\n".join(
        [
            f"job {number}: {config.run.name}, {ranks} rank(s) on {nodes} node(s)",
            f"log of rank 0: {logs}/slurm-{number}.log",
            f"logs of the others: {logs}/rank-N.log",
            f"how it stands: squeue --job {number}; end it: scancel {number}",
            "",
        ]
    )
