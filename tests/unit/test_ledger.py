"""The ledger and the words of a lost peer, without any process group."""

from __future__ import annotations

import threading

import pytest

from xdist.comm import faults
from xdist.comm.ledger import CONTROL, ledger, record
from xdist.comm.pending import Pending


def test_ledgers_nest_and_control_stands_apart() -> None:
    with ledger() as outer:
        record("ring", 10, 20)
        with ledger() as inner:
            record("halo", 1, 2)
            record(CONTROL, 8, 8)
    record("ring", 5, 5)
    assert (outer.sent_bytes, outer.received_bytes, outer.calls) == (11, 22, 2)
    assert (inner.sent_bytes, inner.control_bytes) == (1, 8)
    assert {name: one.sent_bytes for name, one in outer.by_move.items()} == {"ring": 10, "halo": 1}


def test_ledger_counts_other_threads() -> None:
    with ledger() as moved:
        threads = [
            threading.Thread(target=lambda: [record("scan", 1, 1) for _ in range(500)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (moved.sent_bytes, moved.calls) == (2000, 2000)


def test_pending_finishes_once() -> None:
    calls: list[int] = []
    pending = Pending(lambda: calls.append(1) or len(calls)).then(lambda n: n + 1)  # type: ignore[func-returns-value]
    assert [pending.wait(), pending.wait()] == [2, 2]
    assert calls == [1]


class _Store(dict[str, bytes]):
    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


class _GoneStore(_Store):
    def set(self, key: str, value: str) -> None:
        raise RuntimeError("Connection reset by peer")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "ANSWER_S", 0.1)


def _lost(store: _Store, group: tuple[int, ...] = (0, 1, 2)) -> faults.PeerLost:
    scene = faults.Scene(store, 1, 3, group, "node0")
    return faults.peer_lost(RuntimeError("Connection closed by peer [::1]:5"), "ring", scene)


def test_a_silent_rank_elsewhere_is_the_lost_one(quick: None) -> None:
    store = _Store()
    store.set("xdist/rank/2", "node7 pid:[1] 42 99")
    store.set("xdist/fault/0", "1")
    error = _lost(store)
    assert (error.move, error.rank, error.host, error.exit_code) == ("ring", 2, "node7", 7)
    assert "Connection closed by peer" in error.why


def test_a_process_that_ended_here_is_found_before_silent_ones(quick: None) -> None:
    store = _Store()
    faults.sign_in(store, 0)
    host, namespace, *_ = store["xdist/rank/0"].decode().split()
    # A process id that is in use, by a process that started at another time.
    store.set("xdist/rank/2", f"{host} {namespace} 1 1234567")
    assert _lost(store).rank == 2


def test_without_the_store_rank_0_is_gone(quick: None) -> None:
    error = _lost(_GoneStore())
    assert (error.rank, error.host) == (0, "node0")


def test_a_wrong_argument_is_no_lost_peer() -> None:
    assert not faults.is_broken_connection(RuntimeError("Tensors must be contiguous"))
    assert faults.is_broken_connection(RuntimeError("Timed out waiting 600000ms for recv"))
