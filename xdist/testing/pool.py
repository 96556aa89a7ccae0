"""Ranks as processes of this machine that stay alive for many calls."""

from __future__ import annotations

import multiprocessing
import time
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from xdist.comm.worlds import Rendezvous
from xdist.errors import PeerLost
from xdist.testing.worker import Reply, encode, work

# How long the other ranks get to end by themselves after one rank failed.
GRACE_S = 5.0


class RankFailed(RuntimeError):  # noqa: N818 - it names what happened
    """A rank raised or died. The message is its traceback; `rank` says which, first in time.

    `kind` is the name of the exception's class ("" for a dead process) and `results` what the
    ranks that did not fail returned, by rank.
    """

    def __init__(self, rank: int, kind: str, details: str, results: dict[int, Any]) -> None:
        super().__init__(f"rank {rank} failed\n{details}")
        self.rank = rank
        self.kind = kind
        self.details = details
        self.results = results


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """`fn(*args)` in `world_size` fresh processes; the result of each rank, by rank.

    Torchrun's variables are set and no process group exists yet: `fn` calls `xdist.init_mesh` (or
    torch's init_process_group) as under a launcher. `fn` must be importable: a function of a
    module or of the running script.

    Raises:
        RankFailed: with the first failing rank and its traceback; the other ranks are stopped.
    """
    with RankPool(world_size) as pool:
        return pool.run(fn, *args)


class RankPool:
    """`world_size` processes that run one function after another, each with its rank.

    They start at the first `run`, keep their process group between calls, and end with `close`, at
    the end of a `with` block, or with this process, however it ends. They outlive an exception
    that every rank raised alike; after any other failure the next `run` starts new ones.
    """

    def __init__(self, world_size: int, *, threads: int = 1) -> None:
        if world_size < 1:
            raise ValueError(f"a pool needs at least one rank, got {world_size}")
        self.world_size = world_size
        self._threads = threads
        self._ranks: _Ranks | None = None

    def run(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """`fn(*args)` on every rank; the results by rank.

        Raises:
            RankFailed: with the first failing rank and its traceback.
        """
        if self._ranks is None:
            self._ranks = _Ranks(self.world_size, self._threads)
        replies, healthy = self._ranks.call(fn, args)
        if not healthy:
            self.close()
        failed = [(reply.at_s, rank) for rank, reply in replies.items() if reply.details]
        if failed:
            rank = min(failed)[1]
            results = {r: reply.value for r, reply in replies.items() if not reply.details}
            raise RankFailed(rank, replies[rank].kind, replies[rank].details, results)
        return [replies[rank].value for rank in range(self.world_size)]

    def close(self) -> None:
        """Stop the processes. A later `run` starts new ones."""
        if self._ranks is not None:
            self._ranks.stop()
            self._ranks = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Ranks:
    """The processes of one pool, with a pipe to each."""

    def __init__(self, world_size: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._meeting = Rendezvous()
        self._pipes: list[Connection] = []
        self._processes = []
        self._calls = 0
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=work,
                args=(theirs, rank, world_size, self._meeting.port, threads),
                name=f"xdist-rank-{rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._finalizer = weakref.finalize(self, _kill, list(self._processes), list(self._pipes))

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[dict[int, Reply], bool]:
        """Each rank's reply, and whether the processes can be used again."""
        self._calls += 1
        message = encode((self._calls, fn, args))
        for pipe in self._pipes:
            try:
                pipe.send_bytes(message)
            except OSError:
                # The process is dead: its reply below says how it ended.
                continue
        replies: dict[int, Reply] = {}
        deadline = None
        while len(replies) < len(self._pipes):
            waiting = {pipe: r for r, pipe in enumerate(self._pipes) if r not in replies}
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = wait(list(waiting), left)
            for rank in [r for pipe, r in waiting.items() if pipe in ready]:
                replies[rank] = self._receive(rank)
            if deadline is None and any(reply.details for reply in replies.values()):
                deadline = time.monotonic() + GRACE_S
            if deadline is not None and not ready:
                break
        # An error raised by all ranks alike left nothing on the way between them; after any other
        # failure a message of this call could meet the next one.
        kinds = {reply.kind for reply in replies.values()}
        healthy = len(replies) == len(self._pipes) and len(kinds) == 1
        healthy = healthy and kinds != {PeerLost.__name__}
        healthy = healthy and not any(reply.died for reply in replies.values())
        for rank in set(range(len(self._pipes))) - set(replies):
            replies[rank] = Reply(
                details=f"rank {rank} was still running {GRACE_S:.0f} s after another rank failed "
                "and was stopped",
                at_s=time.monotonic(),
                died=True,
            )
        return replies, healthy

    def _receive(self, rank: int) -> Reply:
        try:
            return Reply.decode(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            self._processes[rank].join(5)
            code = self._processes[rank].exitcode
            how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit {code}"
            return Reply(details=f"the process ended: {how}", at_s=time.monotonic(), died=True)
        except Exception:
            # The rank is fine; what it returned cannot be rebuilt here.
            details = f"the result of rank {rank} cannot be read\n{traceback.format_exc()}"
            return Reply(details=details, at_s=time.monotonic())

    def stop(self) -> None:
        """Kill and reap every process."""
        self._finalizer()


def _kill(processes: list[Any], pipes: list[Connection]) -> None:
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
        process.close()
