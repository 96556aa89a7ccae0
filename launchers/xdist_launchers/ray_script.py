"""`xdist launch ray --print`: the same start as a bash script, for reading or for running."""

from __future__ import annotations

import shlex

from xdist.config import Config
from xdist_launchers.job import Job
from xdist_launchers.ray_driver import need_of
from xdist_launchers.ray_plan import Need
from xdist_launchers.ray_private import head_words, loopback_env, port_env, security_env

FIRST_PORT = 20000  # of the script; `xdist launch ray` itself draws free ones


def script(config: Config, job: Job) -> str:
    """A private cluster, then the driver on it; only the driver when ray.address is set."""
    need = need_of(config)
    words = shlex.split(job.again)
    lines = ["#!/usr/bin/env bash", f"# {need}, by Ray", *_placement(need), "set -euo pipefail"]
    if config.ray.address:
        lines += [
            f"# the cluster at {config.ray.address} is used; RAY_AUTH_TOKEN_PATH names its token",
            "export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0",
            _command(words),
        ]
    else:
        lines += [*_head(need), _command([*words, f"ray.address=127.0.0.1:{FIRST_PORT}"])]
    return "\n".join([*lines, ""])


def _command(words: list[str]) -> str:
    """The config of a job that has none is the script's first argument."""
    return " ".join('"${1:?give the path of a config}"' if not w else shlex.quote(w) for w in words)


def _placement(need: Need) -> list[str]:
    groups = need.ranks // need.ulysses
    resources = ", ".join(f"{v:g} {k}" for k, v in need.resources(need.ulysses).items())
    line = f"# placement group, PACK: {groups} x {{{resources}}}, one bundle for each ulysses group"
    return [f"{line} of {need.ulysses}"]


def _head(need: Need) -> list[str]:
    cpus = need.ranks * need.cpus
    env = security_env("") | loopback_env() | port_env(FIRST_PORT)
    del env["RAY_AUTH_TOKEN_PATH"]
    words = head_words(FIRST_PORT, cpus, None if need.gpus else 0, "FOLDER/ray")
    options = " ".join(words).replace("FOLDER", '"$folder"')
    return [
        "umask 077",
        "# Short, and not in TMPDIR: Ray's sockets lie below, of at most 107 bytes of path.",
        'folder="$(mktemp -d /tmp/xray-XXXXXX)"',
        'mkdir "$folder/ray"',
        "head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \\n' > \"$folder/token\"",
        'export RAY_AUTH_TOKEN_PATH="$folder/token"',
        *(f"export {name}={value}" for name, value in env.items()),
        f'ray {options} > "$folder/head.log" 2>&1 &',
        "head=$!",
        'trap \'kill "$head"; wait "$head" || true; rm -rf "$folder"\' EXIT',
        'until grep -q "Ray runtime started" "$folder/head.log"; do',
        '  kill -0 "$head" || { cat "$folder/head.log"; exit 3; }; sleep 0.2',
        "done",
    ]
