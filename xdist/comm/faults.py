"""From a broken connection to PeerLost with a name: which rank was lost, on which host.

At start every rank signs host and process into the store. After an error each survivor writes its
last moves there; where they contradict each other, no rank is lost: their calls differ. The lost
rank is one whose process is gone from this host, else one that left its group on purpose, else one
of the group that wrote nothing. Knows only a key-value store, no torch.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from xdist.comm.recorder import Move, mismatch, move_from
from xdist.errors import DesyncError, PeerLost

# How long a rank that is alive gets to write that it saw the error too.
ANSWER_S = 2.0
_POLL_S = 0.05
_TOLD_MOVES = 16  # of a rank, to the others
_BROKEN = re.compile(
    r"closed by peer|connection (was )?(reset|refused|closed)|broken pipe|timed? ?out|socket"
    r"|(read|write) error|aborted|nccl|remote (process|worker)|peer .* (failed|lost)",
    re.IGNORECASE,
)


class Store(Protocol):
    """The part of a torch store that is used here."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class Scene:
    """What a rank knows when its connection broke: world ranks throughout."""

    store: Store
    me: int
    world_size: int
    group: Sequence[int]
    store_host: str
    moves: Sequence[Move] = ()


def is_broken_connection(error: BaseException) -> bool:
    """Whether torch's error speaks of a lost or silent peer (and not of a wrong argument)."""
    return bool(_BROKEN.search(str(error)))


def sign_in(store: Store, rank: int) -> None:
    """Write where this rank runs: host, process-id namespace, process id and its start time."""
    pid = os.getpid()
    store.set(f"xdist/rank/{rank}", f"{_host()} {_namespace()} {pid} {_process_state(pid)[1]}")


def sign_out(store: Store, rank: int) -> None:
    """Write that this rank left its process group on purpose."""
    store.set(f"xdist/left/{rank}", "1")


def peer_lost(error: BaseException, move: str, scene: Scene) -> PeerLost | DesyncError:
    """What to raise for torch's `error` in `move`; takes up to about 2 s to find a name.

    PeerLost, or DesyncError where every rank is there and they do not make the same moves.
    """
    started = time.monotonic()
    try:
        rank, how = _find(scene, started)
        differ = _contradiction(scene) if rank is None else ""
        if differ:
            return DesyncError(
                "the ranks do not make the same moves: " + differ,
                f"seen by rank {scene.me} of {scene.world_size} after {_first_line(error)}",
                "look for a move that only some ranks make, or make with other shapes (a condition "
                "on a rank's own data?)",
            )
        host = _signature(scene.store, rank)[0] if rank is not None else ""
    except (RuntimeError, OSError):
        # Rank 0 holds the store; a store nobody can reach says that rank 0 is gone.
        rank, how, host = 0, "the store it holds is gone", scene.store_host
    detail = _first_line(error)
    who = "a rank" if rank is None else f"rank {rank} on {host or 'an unknown host'}"
    return PeerLost(
        f"{who} was lost during {move}: {how}",
        f"seen by rank {scene.me} of {scene.world_size} (group of ranks {list(scene.group)}): "
        f"{detail}",
        "look at the lost rank's own messages (killed? out of memory?), then start again: training "
        "resumes from the last checkpoint",
        move=move,
        rank=rank,
        host=host,
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _contradiction(scene: Scene) -> str:
    """How the last moves of the group's ranks contradict each other, "" where they do not."""
    told = {}
    for rank in scene.group:
        if not scene.store.check([f"xdist/fault/{rank}"]):
            continue
        moves = json.loads(scene.store.get(f"xdist/fault/{rank}"))
        told[rank] = [move_from(fields) for fields in moves]
    return mismatch(told)


def _find(scene: Scene, started: float) -> tuple[int | None, str]:
    store = scene.store
    last = [move.fields() for move in scene.moves[-_TOLD_MOVES:]]
    store.set(f"xdist/fault/{scene.me}", json.dumps(last))
    others = [rank for rank in range(scene.world_size) if rank != scene.me]
    found: tuple[int | None, str] | None = None
    while found is None:
        silent = [rank for rank in others if not store.check([f"xdist/fault/{rank}"])]
        gone = [rank for rank in silent if _is_gone(store, rank)]
        if gone:
            found = (gone[0], "its process has ended")
        elif not [rank for rank in silent if rank in scene.group]:
            found = _others_verdict(store)
        if found is None and time.monotonic() - started > ANSWER_S:
            found = _guess(store, [rank for rank in silent if rank in scene.group])
        time.sleep(_POLL_S)
    rank, how = found
    store.set(f"xdist/verdict/{scene.me}", f"{-1 if rank is None else rank} {how}")
    store.set("xdist/verdict", f"{-1 if rank is None else rank} {how}")
    if scene.me == 0:
        # Rank 0 often holds the store: it stays until the others have read it.
        answered = [other for other in others if other != rank]
        while time.monotonic() - started < 2 * ANSWER_S and not all(
            store.check([f"xdist/verdict/{other}"]) for other in answered
        ):
            time.sleep(_POLL_S)
    return rank, how


def _others_verdict(store: Store) -> tuple[int | None, str] | None:
    if not store.check(["xdist/verdict"]):
        return None
    number, _, how = store.get("xdist/verdict").decode().partition(" ")
    return (None if int(number) < 0 else int(number)), how


def _guess(store: Store, silent: list[int]) -> tuple[int | None, str]:
    left = [rank for rank in silent if store.check([f"xdist/left/{rank}"])]
    if left:
        return left[0], "it left the process group"
    if not silent:
        return None, "every rank of the group is alive; the connection between two broke"
    # The verdict of a rank with a better view, before a guess.
    said = _others_verdict(store)
    if said is not None:
        return said
    also = f" (nor did ranks {silent[1:]})" if len(silent) > 1 else ""
    return silent[0], f"it did not answer within {ANSWER_S:.0f} s{also}"


def _signature(store: Store, rank: int) -> list[str]:
    key = f"xdist/rank/{rank}"
    return store.get(key).decode().split() if store.check([key]) else ["", "", "0", ""]


def _is_gone(store: Store, rank: int) -> bool:
    host, namespace, pid, born = _signature(store, rank)
    if (host, namespace) != (_host(), _namespace()):
        return False
    state, started = _process_state(int(pid))
    return state in ("", "Z", "X") or started != born


def _process_state(pid: int) -> tuple[str, str]:
    """State letter and start time of a process of this host; empty when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", "0"
    # The command's name, in brackets, may itself hold brackets and blanks.
    fields = text.rpartition(")")[2].split()
    return fields[0], fields[19]


def _host() -> str:
    return socket.gethostname().replace(" ", "-") or "localhost"


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"none-{os.getpid()}"
