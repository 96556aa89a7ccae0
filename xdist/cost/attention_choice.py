"""Which strategy `auto` takes: the one that keeps its busiest rank shortest, by counted FLOPs and
bytes. A pure function of layout, documents, mask and shapes; every rank computes the same.

score(rank) = FLOPs + FLOPS_PER_BYTE x (bytes sent + received), forward and backward; a strategy is
as slow as its highest score.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

from xdist.cost.attention import STRATEGIES, attention_cost, unable
from xdist.cost.attention_keys import Problem

# FLOPs a device does while one byte enters or leaves it. One number for all machines, so that a
# choice never depends on where it is made: about 30 on two processes of one CPU, 700 between cards
# of one host (600 TFLOP/s, 450 GB/s each way), 6000 over a 400 Gb/s network.
FLOPS_PER_BYTE = 512
_log = logging.getLogger(__name__)


class Busiest(NamedTuple):
    """The rank with the highest score, what it computes and moves, and what all ranks move."""

    score: int
    rank: int
    flops: int
    bytes: int
    all_bytes: int

    def __str__(self) -> str:
        return f"{self.flops:.3g} FLOPs, {self.bytes} bytes on rank {self.rank}"


@dataclass(frozen=True)
class Choice:
    """What `auto` chose and why: `busiest` of each strategy that can serve the call, and `unable`,
    the reasons of the others."""

    strategy: str
    busiest: dict[str, Busiest]
    unable: dict[str, str]

    def __str__(self) -> str:
        said = ", ".join(f"{name} {one}" for name, one in self.busiest.items())
        lost = "".join(f"; not {name}: {why}" for name, why in self.unable.items())
        return f"attention: auto chose {self.strategy} (busiest ranks: {said}{lost})"


def choose(problem: Problem) -> Choice:
    """The strategy whose busiest rank has the lowest score.

    Ties go to the fewest bytes over all ranks, then to the order of `STRATEGIES`.
    """
    reasons = {name: _not_for_auto(problem, name) for name in STRATEGIES}
    busiest = {name: _busiest(problem, name) for name in STRATEGIES if not reasons[name]}

    def order(name: str) -> tuple[int, int, int]:
        return busiest[name].score, busiest[name].all_bytes, STRATEGIES.index(name)

    lost = {name: why for name, why in reasons.items() if why}
    return Choice(min(busiest, key=order), busiest, lost)


def chosen(problem: Problem) -> Choice:
    """`choose`, counted and said (level DEBUG) once for all calls with this problem."""
    if "choice" not in problem.kept:
        problem.kept["choice"] = choose(problem)
        _log.debug("%s", problem.kept["choice"])
    found: Choice = problem.kept["choice"]
    return found


def _not_for_auto(problem: Problem, strategy: str) -> str:
    if strategy == "2d" and problem.ulysses in (1, problem.parts):
        return "2d needs ring and ulysses degrees above 1"
    return unable(problem, strategy)


def _busiest(problem: Problem, strategy: str) -> Busiest:
    costs = [attention_cost(problem, strategy, rank) for rank in range(problem.parts)]
    flops = [cost.forward_flops + cost.backward_flops for cost in costs]
    scores = [f + FLOPS_PER_BYTE * cost.bytes for f, cost in zip(flops, costs, strict=True)]
    rank = scores.index(max(scores))
    every = sum(cost.bytes for cost in costs)
    return Busiest(scores[rank], rank, flops[rank], costs[rank].bytes, every)
