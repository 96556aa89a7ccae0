"""What `xdist launch ray` decides without Ray: placement, ports, refusals, the rendered script."""

from __future__ import annotations

import os
import pathlib
import random
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from tests.launchers.conftest import wait_until
from tests.launchers.test_cli import xdist
from xdist.config import Config, override
from xdist.errors import ConfigError, LaunchError
from xdist_launchers import ray_private
from xdist_launchers.processes import Child
from xdist_launchers.ray_actor import RankActor, interface_of
from xdist_launchers.ray_cluster import check_environment
from xdist_launchers.ray_plan import Need, Node, bundle_sizes, order_bundles, seats, shortage


def node(name: str, cpus: float, gpus: float = 0, address: str = "") -> Node:
    return Node(name, address or f"10.0.0.{name}", f"n{name}", cpus, gpus)


def test_a_ulysses_group_shares_a_bundle_and_ring_goes_across() -> None:
    need = Need(ranks=8, ulysses=4, cpus=2, gpus=1)
    nodes = [node("1", 8, 4), node("2", 8, 4)]
    assert bundle_sizes(need, nodes) == [4, 4]
    assert need.resources(4) == {"CPU": 8, "GPU": 4}
    assert shortage(need, nodes) == ""
    placed = seats([4, 4], [nodes[1], nodes[0]])
    assert [seat.node.id for seat in placed] == ["2"] * 4 + ["1"] * 4
    assert [seat.local_rank for seat in placed] == [0, 1, 2, 3] * 2
    assert {seat.local_size for seat in placed} == {4}
    assert [seat.bundle for seat in placed] == [0] * 4 + [1] * 4


def test_a_group_too_large_for_every_node_gets_a_bundle_per_rank() -> None:
    need = Need(ranks=4, ulysses=4, cpus=1, gpus=0)
    nodes = [node("1", 2), node("2", 3)]
    assert bundle_sizes(need, nodes) == [1, 1, 1, 1]
    assert shortage(need, nodes) == ""
    # Ray may hand bundles out in any order; ranks of one node still come one after another.
    assert order_bundles(["a", "b", "a", "b"]) == [0, 2, 1, 3]


def test_two_ray_nodes_of_one_host_count_local_ranks_together() -> None:
    nodes = [node("1", 1, address="127.0.0.1"), node("2", 1, address="127.0.0.1")]
    assert [(s.local_rank, s.local_size) for s in seats([1, 1], nodes)] == [(0, 2), (1, 2)]


@pytest.mark.parametrize(
    ("need", "nodes", "parts"),
    [
        (Need(4, 1, 1, 0), [node("1", 3)], ["4 ranks of 1 CPU", "room for 3", "3 CPU"]),
        (Need(4, 2, 1, 0), [node("1", 3), node("2", 1)], ["groups of 2", "room for 2"]),
        (Need(2, 1, 1, 1), [node("1", 8, 1)], ["1 GPU each", "room for 1", "8 CPU 1 GPU"]),
        (Need(1, 1, 1, 0), [], ["room for 0", "no nodes"]),
    ],
)
def test_a_cluster_that_is_too_small_is_told_with_the_numbers(
    need: Need, nodes: list[Node], parts: list[str]
) -> None:
    said = shortage(need, nodes)
    for part in parts:
        assert part in said


def test_ports_lie_together_below_the_ephemeral_ones_and_are_free() -> None:
    first = ray_private.choose_ports(20, random.Random(3))
    assert first >= 10000
    assert first + 20 <= ray_private.ephemeral_start()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + 7))
        # The same draw meets the port in use, and goes on to another place.
        other = ray_private.choose_ports(20, random.Random(3))
    assert first + 7 not in range(other, other + 20)


def test_every_port_of_a_node_is_named_once_within_its_block() -> None:
    words = ray_private.head_words(20000, 4, 0, "/x")
    named = [int(word.partition("=")[2]) for word in words if "-port=" in word]
    named += [int(port) for port in ray_private.port_env(20000).values()]
    assert len(set(named)) == len(named)
    assert min(named) == 20000
    assert max(named) == 20000 + ray_private.port_count(4) - 1
    assert "--dashboard-host=127.0.0.1" in words
    assert "--node-ip-address=127.0.0.1" in words


# In place of `ray start`: leaves its port, and fails before its try number `good`.
_NODE = """
import os, pathlib, sys, time
folder, port, good = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(folder.parent / f"port-{folder.name}").write_text(port)
if int(folder.name[1:]) < good:
    sys.exit(f"port {port} is taken")
print("Ray runtime started", os.environ["AUTOSCALER_METRIC_PORT"], flush=True)
time.sleep(60)
"""


def test_a_port_in_use_costs_a_try_and_three_end_with_3(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_private, "ray_program", lambda: sys.executable)
    # The test process keeps its own children.
    monkeypatch.setattr(ray_private, "kill_orphans", lambda mine: None)
    monkeypatch.setattr(ray_private, "adopt_orphans", lambda: None)

    def node(name: str, good: int) -> AbstractContextManager[tuple[int, Child]]:
        (folder := tmp_path / name).mkdir()

        def words(first: int, place: str) -> list[str]:
            return ["-c", _NODE, place, str(first), str(good)]

        return ray_private.running_node(folder, {}, words, 5, lambda: False)

    with node("second", 2) as (first, child):
        assert not child.ended
        tried = [(tmp_path / "second" / f"port-r{n}").read_text() for n in (1, 2)]
        assert tried[1] == str(first)
        assert tried[0] != tried[1]
    assert child.killed_by is not None or child.ended
    assert "(try 1 of 3)" in capfd.readouterr().err
    with pytest.raises(LaunchError, match="3 tries") as caught, node("never", 9):
        pass
    assert caught.value.exit_code == 3
    assert "is taken" in caught.value.why


@pytest.mark.parametrize(
    ("environ", "address", "insecure", "part"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, "", False, "--insecure-ray"),
        ({"RAY_AUTH_MODE": "disabled"}, "h:1", False, "authentication off"),
        ({"RAY_AUTH_MODE": "disabled"}, "h:1", True, ""),
        ({"RAY_AUTH_MODE": "token"}, "h:1", False, ""),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "", False, "ray.address=10.0.0.1:6379"),
        ({"RAY_ADDRESS": "auto"}, "10.0.0.1:6379", False, ""),
        ({"RAY_ADDRESS": "auto", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "", False, "auto"),
        ({"RAY_ADDRESS": "h:6379", "RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "", False, ""),
        ({}, "", False, ""),
    ],
)
def test_switched_off_authentication_and_unnamed_clusters_are_refused(
    environ: dict[str, str], address: str, insecure: bool, part: str
) -> None:
    if not part:
        check_environment(address, environ, insecure=insecure)
        return
    with pytest.raises(LaunchError, match=part) as caught:
        check_environment(address, environ, insecure=insecure)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["ray.address=auto"], "is not HOST:PORT"),
        (["ray.address=ray://h:10001"], "is not HOST:PORT"),
        (["ray.address=h:70000"], "is not HOST:PORT"),
        (["ray.gpus_per_rank=2"], "a rank uses one card"),
        (["ray.prepare=true"], "nothing to read"),
        (['ray.sources=["a"]'], "no effect"),
    ],
)
def test_settings_that_cannot_hold_are_config_errors(settings: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        override(Config(), settings)
    override(Config(), ["ray.address=[fd00::2]:6379", "ray.prepare=true", 'ray.sources=["a"]'])


def test_print_renders_a_script_and_starts_nothing(tmp_path: pathlib.Path) -> None:
    words = ["launch", "ray", "--print", "parallel.ulysses=2", "launch.ranks=4"]
    done = xdist(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 x {2 CPU}" in done.stdout
    assert "umask 077" in done.stdout
    assert "RAY_AUTH_MODE=token" in done.stdout
    assert "RAY_USAGE_STATS_ENABLED=0" in done.stdout
    assert 'xdist launch ray "${1:?give the path of a config}" parallel.ulysses=2' in done.stdout
    assert list(tmp_path.iterdir()) == []
    given = xdist(*words, "ray.address=10.0.0.1:6379", cwd=tmp_path)
    assert "ray start" not in given.stdout
    assert "ray.address=10.0.0.1:6379" in given.stdout
    for number, script in enumerate((done.stdout, given.stdout)):
        file = tmp_path / f"{number}.sh"
        file.write_text(script)
        subprocess.run(["shellcheck", str(file)], check=True)


def test_the_command_refuses_before_ray_is_loaded(tmp_path: pathlib.Path) -> None:
    (tmp_path / "c.toml").write_text('[data]\nstore = "x.zarr"\n')
    done = xdist("launch", "ray", "c.toml", cwd=tmp_path, RAY_AUTH_MODE="disabled")
    assert done.returncode == 3
    assert "RAY_AUTH_MODE=disabled switches Ray's authentication off" in done.stderr
    done = xdist("launch", "ray", "c.toml", cwd=tmp_path, RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 3
    assert "ray.address=127.0.0.1:1" in done.stderr
    # Port 1 of loopback: nothing listens there, and Ray is not asked to wait for it.
    done = xdist("launch", "ray", "c.toml", "ray.address=127.0.0.1:1", cwd=tmp_path)
    assert done.returncode == 3
    assert "no Ray cluster answers at 127.0.0.1:1" in done.stderr


@pytest.fixture
def actor() -> Iterator[RankActor]:
    body = RankActor()
    yield body
    body.stop(0.0)


def _start(actor: RankActor, folder: pathlib.Path, code: str) -> int:
    return actor.start(["-c", code], {"RANK": "0"}, str(folder), "logs/rank-0.log", "")


def test_an_actor_tells_the_true_exit_code_signal_and_output(
    actor: RankActor, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/secret")
    code = "import os, sys; print(os.environ['RANK'], *(n for n in os.environ if 'RAY' in n))"
    _start(actor, tmp_path, code + "; sys.exit(9)")
    answer = actor.poll(20.0, False)
    assert (answer.exit_code, answer.killed_by) == (9, None)
    # The rank sees nothing of Ray's, the token's path least of all.
    assert actor.stop(1.0).said == b"0\n"
    assert stat.S_IMODE((tmp_path / "logs" / "rank-0.log").stat().st_mode) == 0o600
    pid = _start(actor, tmp_path, "import time; time.sleep(60)")
    os.kill(pid, signal.SIGKILL)
    answer = actor.poll(20.0, True)
    assert (answer.exit_code, answer.killed_by) == (None, signal.SIGKILL)
    assert answer.ended


def test_an_actor_ends_its_rank_with_sigterm_then_sigkill(
    actor: RankActor, tmp_path: pathlib.Path
) -> None:
    stubborn = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    _start(actor, tmp_path, stubborn)
    wait_until(lambda: b"ready" in (tmp_path / "logs" / "rank-0.log").read_bytes())
    assert not actor.poll(0.05, False).ended
    assert actor.stop(0.1).killed_by == signal.SIGKILL


def test_a_rank_dies_with_its_actor(tmp_path: pathlib.Path) -> None:
    code = (
        "import os, sys\nfrom xdist_launchers.ray_actor import RankActor\n"
        "a = RankActor()\n"
        f"print(a.start(['-c', 'import time; time.sleep(60)'], {{}}, {str(tmp_path)!r}, 'l', ''))\n"
        "sys.stdout.flush()\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    pid = int(done.stdout)
    wait_until(lambda: not pathlib.Path(f"/proc/{pid}").exists())


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_the_driver_notes_each_signal_that_asks_to_stop(name: str) -> None:
    code = (
        "import os, signal, sys\nfrom xdist_launchers.ray_driver import _note_signals\n"
        "seen = []\n_note_signals(seen)\n"
        "os.kill(os.getpid(), signal.Signals[sys.argv[1]])\nprint(seen)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, name],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout
    assert said == f"[{int(signal.Signals[name])}]\n"


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") == ""


def test_ray_sh_is_clean() -> None:
    script = pathlib.Path(__file__).resolve().parents[2] / "slurm" / "ray.sh"
    subprocess.run(["shellcheck", str(script)], check=True)
    assert os.access(script, os.X_OK)
