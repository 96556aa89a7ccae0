"""Meeting on real stores: other jobs, other settings, double and missing ranks are named."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from tests.launchers.conftest import PATHS
from xdist.comm import sockets
from xdist.comm.join import Ticket, join
from xdist.errors import LaunchError, PortError, XdistError

SETTINGS = 'run.name = "a"\ntrain.accumulation = 1\n'


@pytest.fixture
def store() -> dist.Store:
    """A real store of this process; ranks are threads with handles of their own."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _client(store: Any) -> dist.Store:
    return dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)


def _meet(
    store: Any, tickets: dict[int, Ticket], timeout_s: float = 20
) -> dict[int, list[str] | XdistError]:
    """Join as each rank of `tickets` at once; what each got."""
    got: dict[int, list[str] | XdistError] = {}

    def one(rank: int) -> None:
        try:
            got[rank] = join(_client(store), rank, tickets[rank], timeout_s=timeout_s)
        except LaunchError as error:
            got[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in tickets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


def test_ranks_of_one_job_meet(store: dist.Store) -> None:
    ticket = Ticket("ab" * 16, SETTINGS, 3)
    got = _meet(store, dict.fromkeys(range(3), ticket))
    host = os.uname().nodename
    assert got == dict.fromkeys(range(3), [host] * 3)


def test_other_settings_are_refused_by_all_with_both_named(store: dist.Store) -> None:
    mine, other = Ticket("", SETTINGS, 2), Ticket("", SETTINGS.replace("1", "2"), 2)
    got = _meet(store, {0: mine, 1: other})
    for error in got.values():
        assert isinstance(error, LaunchError)
        assert "rank 1 on " in error.what
        assert f"config {other.digest} here, config {mine.digest} on rank 0" in error.why
        assert "train.accumulation = 2 (rank 0: 1)" in error.why
        assert error.exit_code == 3


def test_another_world_size_is_refused(store: dist.Store) -> None:
    got = _meet(store, {0: Ticket("", SETTINGS, 2), 1: Ticket("", SETTINGS, 3)})
    assert "WORLD_SIZE is 3 here and 2 on rank 0" in str(got[1])


def test_a_foreign_joiner_is_turned_away_and_the_job_goes_on(store: dist.Store) -> None:
    mine, foreign = Ticket("aa" * 16, SETTINGS, 2), Ticket("bb" * 16, SETTINGS, 2)
    done: dict[int, list[str] | XdistError] = {}
    first = threading.Thread(target=lambda: done.update(_meet(store, {0: mine})))
    first.start()
    turned_away = _meet(store, {1: foreign})[1]
    assert isinstance(turned_away, LaunchError)
    assert "met the ranks of another job" in turned_away.what
    assert "this one is of job bbbbbbbbbbbb, rank 0 (host " in turned_away.why
    assert "of job aaaaaaaaaaaa" in turned_away.why
    done.update(_meet(store, {1: mine}))
    first.join()
    host = os.uname().nodename
    assert done == {0: [host] * 2, 1: [host] * 2}


def test_a_second_process_of_one_rank_is_refused(store: dist.Store) -> None:
    ticket = Ticket("", SETTINGS, 1)
    store.set("xdist/joined/0", "elsewhere 17")
    error = _meet(store, {0: ticket})[0]
    assert isinstance(error, LaunchError)
    assert "two processes say that they are rank 0 of 1" in error.what
    assert "elsewhere 17" in error.why


def test_missing_ranks_are_named_with_the_time_waited(store: dist.Store) -> None:
    ticket = Ticket("", SETTINGS, 4)
    got = _meet(store, {0: ticket, 2: ticket}, timeout_s=0.5)
    for error in got.values():
        assert isinstance(error, LaunchError)
        assert error.what == "2 of 4 ranks joined; missing rank 1, 3"
        assert "waited 0.5 s; those that joined are on " in error.why


def test_a_store_without_rank_0_is_named(store: dist.Store) -> None:
    error = _meet(store, {1: Ticket("", SETTINGS, 2)}, timeout_s=0.3)[1]
    assert "rank 0 never wrote to it" in str(error)


def test_a_taken_port_a_foreign_address_and_an_unknown_name_have_errors_of_their_own() -> None:
    with sockets.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortError, match=f"port {port} of 127.0.0.1 is taken") as caught:
            sockets.listen("127.0.0.1", port)
        assert caught.value.exit_code == 3
    # 192.0.2.0/24 is kept for documents: no host has it.
    with pytest.raises(LaunchError, match="is not an address of rank 0's host"):
        sockets.listen("192.0.2.1", 0)
    with pytest.raises(LaunchError, match="is no address that host"):
        sockets.listen("no-such-host.invalid", 0)


RANK = """
import os, socket, sys, time, xdist
from xdist.errors import XdistError
if sys.argv[2:] == ["apart"]:
    socket.gethostname = lambda: "host" + os.environ["RANK"]
try:
    xdist.init_mesh(ulysses=2, device="cpu", settings=sys.argv[1], join_timeout_s=900)
except XdistError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
print("met", flush=True)
sys.stdin.read()
"""


def _ranks(
    settings: list[str], port: int, nonces: list[str], *more: str
) -> list[subprocess.Popen[str]]:
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, text, *more],
            env=os.environ
            | common
            | {"RANK": str(rank), "XDIST_NONCE": nonce, "PYTHONPATH": PATHS},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, (text, nonce) in enumerate(zip(settings, nonces, strict=True))
    ]


def _free_port() -> int:
    with sockets.listen("127.0.0.1", 0) as probe:
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_two_processes_with_different_settings_both_end_with_3() -> None:
    ranks = _ranks(["a.b = 1\n", "a.b = 2\n"], _free_port(), ["", ""])
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [3, 3]
    assert all("a.b = 2 (rank 0: 1)" in out for out in outputs), outputs


def test_a_rank_0_that_never_listens_is_named_after_the_join_timeout() -> None:
    """It was killed before it opened its port; torch's client would wait several timeouts."""
    code = "import xdist; xdist.init_mesh(join_timeout_s=1.0)"
    with socket.socket() as held:
        # Bound, so that nobody else takes it, and not listening.
        held.bind(("127.0.0.1", 0))
        port = str(held.getsockname()[1])
        env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | env | {"PYTHONPATH": PATHS},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert f"rank 0 does not listen at 127.0.0.1 port {port}" in done.stderr
    assert "for 1 s" in done.stderr


def test_ranks_that_met_on_one_host_listen_on_the_loopback_interface_only() -> None:
    ranks = _ranks(["", ""], _free_port(), ["n" * 32] * 2)
    try:
        for rank in ranks:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "met\n"
        listening = [
            connection.laddr
            for rank in ranks
            for connection in psutil.Process(rank.pid).net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(listening) >= 2
        assert {address.ip for address in listening} <= {"127.0.0.1", "::1"}
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.slow
def test_a_process_that_finds_the_port_taken_says_so() -> None:
    with sockets.listen("127.0.0.1", 0) as taken:
        ranks = _ranks(["", ""], taken.getsockname()[1], ["", ""])
        # At once, and not after join_timeout_s.
        out = ranks[0].communicate(timeout=120)[0]
        assert ranks[0].returncode == 3
        assert "is taken on host" in out
        ranks[1].kill()
        ranks[1].communicate()


def test_ranks_of_several_hosts_are_told_that_c10d_is_unauthenticated() -> None:
    ranks = _ranks(["", ""], _free_port(), ["", ""], "apart")
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    line = "xdist: 2 hosts; c10d is unauthenticated: use a private network\n"
    assert [out.count(line) for out in outputs] == [1, 0], outputs
    assert all("met\n" in out for out in outputs)
