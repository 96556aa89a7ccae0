"""One start of all ranks as Ray actors, and watching them until all have ended."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from xdist.console import pass_on
from xdist.errors import LaunchError
from xdist_launchers.failure import Failure, read_failure, say
from xdist_launchers.job import END_S, Job
from xdist_launchers.rank_env import LOOPBACK, common_env, new_nonce, rank_env, rendezvous_env
from xdist_launchers.ray_actor import Answer, RankActor
from xdist_launchers.ray_cluster import Cluster
from xdist_launchers.ray_plan import Need, Seat, bundle_sizes, seats, shortage

PEER_GRACE_S = 3.0  # for the others to notice by themselves, and to say what they were doing
CAUSE_S = 8.0  # the longest wait for the death that made its peers fail
UNREACHABLE_S = 3.0  # for a connection to an actor to come back
TERM_S = 2.0  # from SIGTERM to SIGKILL
PREEMPTED = 75  # a rank that was asked to stop, and saved


@dataclass
class Watched:
    """One rank: where it sits, its actor, and what is known of it."""

    seat: Seat
    actor: Any
    pending: Any = None
    answer: Answer = field(default_factory=lambda: Answer(None, None, 0, 0.0, b""))
    heard_at: float = field(default_factory=time.monotonic)
    ended_at: float | None = None
    unreachable: str = ""
    lost: str = ""

    @property
    def ended(self) -> bool:
        return self.ended_at is not None

    @property
    def failed(self) -> bool:
        return self.ended and (bool(self.lost) or self.answer.exit_code != 0)

    def lose(self, why: str) -> None:
        self.lost, self.ended_at, self.pending = why, time.monotonic(), None


class Attempt:
    """All ranks in one placement group, from reserving it to giving it back."""

    def __init__(
        self, cluster: Cluster, job: Job, need: Need, heartbeat_s: float, signals: list[int]
    ) -> None:
        self.cluster, self.job, self.need = cluster, job, need
        self.heartbeat_s, self.signals = heartbeat_s, signals
        self.ranks: list[Watched] = []
        self._group: Any = None
        self._sizes: list[int] = []
        self._cards: list[str] = []
        self.met = False

    def run(self) -> None:
        """Start the ranks and return when all have ended; those that must be are ended.

        Raises:
            LaunchError: the cluster had no room within launch.init_timeout_s.
        """
        try:
            self._place()
            if not self.signals:
                self._start()
                self._watch()
        finally:
            self._end()

    def codes(self) -> set[int | None]:
        """Exit codes of the ranks; None stands for one that did not end by itself."""
        return {None if rank.lost else rank.answer.exit_code for rank in self.ranks}

    def _place(self) -> None:
        """Reserve a placement group and start an actor on each seat."""
        until = time.monotonic() + self.job.init_timeout_s
        told = False
        while not self.signals:
            nodes = self.cluster.nodes()
            short = shortage(self.need, nodes)
            if not short and self._reserve(until) and self._seat():
                return
            if time.monotonic() > until:
                raise LaunchError(
                    "the Ray cluster has no room for the run",
                    f"{short or 'what there is is in use by others'}; waited launch."
                    f"init_timeout_s = {self.job.init_timeout_s:g} s",
                    "add nodes, or ask for less: launch.ranks, ray.cpus_per_rank, "
                    "ray.gpus_per_rank",
                )
            if short and not told:
                told = True
                say(f"xdist: waiting for room: {short}")
            time.sleep(0.2)

    def _reserve(self, until: float) -> bool:
        """Whether the group was there before the nodes changed, the time was up or a signal came.

        A node that dies meanwhile would be waited for in vain.
        """
        self._sizes = bundle_sizes(self.need, self.cluster.nodes())
        bundles = [self.need.resources(size) for size in self._sizes]
        self._group = self.cluster.reserve(bundles, min(5.0, max(0.1, until - time.monotonic())))
        return self._group is not None

    def _seat(self) -> bool:
        """Start the actors; whether all of them answer."""
        need, alive = self.need, {node.id: node for node in self.cluster.nodes()}
        homes = self.cluster.bundle_nodes(self._group)
        if all(home in alive for home in homes):
            places = seats(self._sizes, [alive[home] for home in homes])
            self.ranks = [
                Watched(
                    seat,
                    self.cluster.actor(RankActor, self._group, seat.bundle, need.cpus, need.gpus),
                )
                for seat in places
            ]
            with contextlib.suppress(Exception):
                self._cards = self._ask("cards")
                return True
        self._give_back()
        return False

    def _ask(self, method: str, *arguments: Any) -> list[Any]:
        """One question to every actor at once; the answers by rank."""
        asked = [getattr(rank.actor, method).remote(*arguments) for rank in self.ranks]
        return [self.cluster.get(reference, self.job.init_timeout_s) for reference in asked]

    def _start(self) -> None:
        """Every rank's process, with the address of rank 0's node to meet at."""
        job = self.job
        hosts = {rank.seat.node.address for rank in self.ranks}
        address = self.ranks[0].seat.node.address if len(hosts) > 1 else LOOPBACK
        port = self.cluster.get(self.ranks[0].actor.free_port.remote(address), job.init_timeout_s)
        meeting = rendezvous_env(address, port, new_nonce())
        (job.directory / "logs").mkdir(parents=True, exist_ok=True)
        job.met_file.unlink(missing_ok=True)
        references = []
        for rank in self.ranks:
            seat = rank.seat
            job.error_file(seat.rank).unlink(missing_ok=True)
            job.started_file(seat.rank).unlink(missing_ok=True)
            # The interpreter is that of the actor's node.
            words = [*job.command[1:], str(job.error_file(seat.rank))]
            references.append(
                rank.actor.start.remote(
                    words,
                    self._env(seat) | meeting,
                    os.getcwd(),
                    str(job.log_file(seat.rank)),
                    seat.node.address if len(hosts) > 1 else "",
                )
            )
        for rank, reference in zip(self.ranks, references, strict=True):
            self._started(rank, reference)

    def _started(self, rank: Watched, reference: Any) -> None:
        try:
            self.cluster.get(reference, self.job.init_timeout_s)
        except Exception as error:
            if self.cluster.is_lost(error):
                rank.lose(self._why_lost(rank, first_line(error)))
                return
            node = rank.seat.node
            raise LaunchError(
                f"rank {rank.seat.rank} cannot start on node {node.host} ({node.address})",
                str(getattr(error, "cause", None) or error).strip().splitlines()[-1],
                f"folder {os.getcwd()} and this installation must be on every node of the cluster",
            ) from error
        rank.heard_at = time.monotonic()

    def _env(self, seat: Seat) -> dict[str, str]:
        env = common_env(
            world_size=self.need.ranks,
            local_world_size=seat.local_size,
            threads=self.job.threads,
            launcher="ray",
        )
        # Ray shows each actor its own cards; LOCAL_RANK counts through all cards of the host.
        cards = [
            card
            for rank, card in zip(self.ranks, self._cards, strict=True)
            if rank.seat.node.address == seat.node.address
        ]
        env["CUDA_VISIBLE_DEVICES"] = ",".join(cards) if self.need.gpus else ""
        return env | rank_env(seat.rank, seat.local_rank)

    def _watch(self) -> None:
        """Return when all ranks have ended, or when those that run have to be ended."""
        began = time.monotonic()
        first_failure = None
        while not all(rank.ended for rank in self.ranks) and not self.signals:
            self._listen()
            now = time.monotonic()
            if any(rank.failed for rank in self.ranks):
                first_failure = first_failure or now
                grace_s = PEER_GRACE_S if self._cause_known() else CAUSE_S
                if now - first_failure > grace_s:
                    return
            elif not self.met:
                self.met = self.job.met_file.exists()
                if not self.met and now - began > self.job.init_timeout_s:
                    return

    def _cause_known(self) -> bool:
        """Whether a failure is known that is not the loss of a peer."""
        for rank in self.ranks:
            record = read_failure(self.job.error_file(rank.seat.rank))
            if rank.failed and (rank.lost or record is None or not record.is_consequence):
                return True
        return False

    def _listen(self) -> None:
        """Ask every rank that runs how it is, and note who is silent."""
        beat_s = min(0.5, self.heartbeat_s / 4)
        waiting = {}
        for rank in self.ranks:
            if rank.ended:
                continue
            if rank.pending is None:
                rank.pending = rank.actor.poll.remote(beat_s, rank.seat.rank == 0)
            waiting[rank.pending] = rank
        for reference in self.cluster.ready(list(waiting), 0.1):
            self._heard(waiting[reference], reference)
        for rank in waiting.values():
            silent_s = time.monotonic() - rank.heard_at
            if not rank.ended and rank.unreachable and silent_s > UNREACHABLE_S:
                rank.lose(self._why_lost(rank, rank.unreachable))
            elif not rank.ended and silent_s > self.heartbeat_s:
                rank.lose(self._why_silent(rank))

    def _heard(self, rank: Watched, reference: Any) -> None:
        rank.pending = None
        try:
            answer = self.cluster.get(reference, self.heartbeat_s)
        except Exception as error:
            rank.unreachable = first_line(error)
            if not self.cluster.may_come_back(error):
                rank.lose(self._why_lost(rank, rank.unreachable))
            return
        rank.unreachable, rank.heard_at = "", time.monotonic()
        self._note(rank, answer)

    def _note(self, rank: Watched, answer: Answer) -> None:
        if answer.said:
            self._print(answer)
        rank.answer = answer
        if answer.ended and rank.ended_at is None:
            rank.ended_at = time.monotonic()

    def _why_lost(self, rank: Watched, said: str) -> str:
        node = rank.seat.node
        where = f"Ray node {node.id[:12]} on {node.host} ({node.address})"
        # Actors of a node die with it, a moment before the cluster says so.
        until = time.monotonic() + 1.0
        while (death := self.cluster.death_of(node.id)) is None and time.monotonic() < until:
            time.sleep(0.05)
        if death is not None:
            return f"{where} left the cluster: {death.strip().splitlines()[0]}"
        return f"its actor on {where} is gone: {said}"

    def _why_silent(self, rank: Watched) -> str:
        node = rank.seat.node
        return (
            f"its actor on Ray node {node.id[:12]} on {node.host} ({node.address}) was silent for "
            f"ray.heartbeat_s = {self.heartbeat_s:g} s"
        )

    def _end(self) -> None:
        """End what runs: after a signal of the user the ranks finish their step and save first."""
        try:
            if self.signals and any(not rank.ended for rank in self.ranks):
                self._finish_step()
            left = [rank for rank in self.ranks if not rank.lost]
            asked = [(rank, rank.actor.stop.remote(TERM_S)) for rank in left]
            until = time.monotonic() + TERM_S + 5.0
            for rank, reference in asked:
                with contextlib.suppress(Exception):
                    answer = self.cluster.get(reference, max(0.1, until - time.monotonic()))
                    if rank.seat.rank == 0:
                        self._print(answer)
        finally:
            self._give_back()

    def _print(self, answer: Answer) -> None:
        pass_on(answer.said, sys.stdout)

    def _finish_step(self) -> None:
        say("xdist: stopping after this step; a second signal stops at once")
        for rank in self.ranks:
            if not rank.ended:
                rank.actor.send.remote(signal.SIGTERM)
        until = time.monotonic() + self.job.stop_timeout_s
        while time.monotonic() < until and len(self.signals) < 2:
            self._listen()
            if self._hopeless() or all(rank.ended for rank in self.ranks):
                return

    def _hopeless(self) -> bool:
        """Whether those that still run will not end by themselves, or not with a save.

        A rank was lost or failed, and the others wait for it; or one ended well, and long ago.
        """
        ended = [rank.ended_at for rank in self.ranks if rank.ended_at is not None]
        codes = {None if rank.lost else rank.answer.exit_code for rank in self.ranks if rank.ended}
        first = min(ended, default=time.monotonic())
        return not codes <= {0, PREEMPTED} or time.monotonic() - first > END_S

    def _give_back(self) -> None:
        for rank in self.ranks:
            self.cluster.kill(rank.actor)
        if self._group is not None:
            self.cluster.release(self._group)
            self._group = None


def first_line(error: Exception) -> str:
    """The first line of what an error says, shortened."""
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def first_failure(attempt: Attempt) -> tuple[Watched, Failure | None]:
    """The rank whose failure caused the others, and the record it left."""
    records = {
        rank.seat.rank: read_failure(attempt.job.error_file(rank.seat.rank))
        for rank in attempt.ranks
    }

    def order(rank: Watched) -> tuple[bool, bool, bool, float]:
        # An actor or its node is never lost because a rank failed.
        record = None if rank.lost else records[rank.seat.rank]
        # gloo ends a process with SIGABRT when it loses a peer at a bad moment.
        aborted = rank.answer.killed_by == signal.SIGABRT
        consequence = record is not None and record.is_consequence
        return (not rank.lost, consequence, aborted, rank.ended_at or 0.0)

    rank = min((rank for rank in attempt.ranks if rank.failed), key=order)
    return rank, None if rank.lost else records[rank.seat.rank]
