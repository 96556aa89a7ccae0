"""Which rank goes where in a Ray cluster: pure arithmetic over nodes, bundles and ranks.

The ranks of one ulysses group exchange most, so they share a bundle, which Ray never splits over
nodes; ring and data cross nodes. Only a group too large for every node gets a bundle per rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Need:
    """What a run asks of a cluster. `cpus` and `gpus` are those of one rank."""

    ranks: int
    ulysses: int
    cpus: int
    gpus: int

    def resources(self, ranks: int) -> dict[str, float]:
        """The bundle of that many ranks, in Ray's words."""
        cards = {"GPU": float(ranks * self.gpus)} if self.gpus else {}
        return {"CPU": float(ranks * self.cpus), **cards}

    def __str__(self) -> str:
        cards = f" and {self.gpus} GPU" if self.gpus else ""
        return f"{self.ranks} ranks of {self.cpus} CPU{cards} each"


@dataclass(frozen=True)
class Node:
    """One node of the cluster, and what it has in all."""

    id: str
    address: str
    host: str
    cpus: float
    gpus: float

    def holds(self, need: Need) -> int:
        """How many ranks fit on it."""
        by_cards = int(self.gpus // need.gpus) if need.gpus else need.ranks
        return min(int(self.cpus // need.cpus), by_cards)

    def __str__(self) -> str:
        cards = f" {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.host} ({self.address}): {self.cpus:g} CPU{cards}"


def bundle_sizes(need: Need, nodes: Sequence[Node]) -> list[int]:
    """Ranks of each bundle: a ulysses group where a node can hold one, else single ranks."""
    largest = max((node.holds(need) for node in nodes), default=0)
    size = need.ulysses if need.ulysses <= largest else 1
    return [size] * (need.ranks // size)


def shortage(need: Need, nodes: Sequence[Node]) -> str:
    """Why the cluster cannot hold the run, with the numbers; "" when it can."""
    size = bundle_sizes(need, nodes)[0]
    held = sum(node.holds(need) // size * size for node in nodes)
    if held >= need.ranks:
        return ""
    packed = f" in groups of {size} that share a node" if size > 1 else ""
    has = "; ".join(map(str, nodes)) or "no nodes"
    return f"{need} are wanted{packed}, there is room for {held}: {has}"


def order_bundles(nodes: Sequence[str]) -> list[int]:
    """Bundles in the order in which ranks fill them, given the node id of each.

    All bundles of a node come one after another, so that neighbours in rank are near each other.
    """
    first = {node: index for index, node in reversed(list(enumerate(nodes)))}
    return sorted(range(len(nodes)), key=lambda bundle: (first[nodes[bundle]], bundle))


@dataclass(frozen=True)
class Seat:
    """Where a rank sits. Local ranks count within a host, which may run several Ray nodes."""

    rank: int
    bundle: int
    node: Node
    local_rank: int
    local_size: int


def seats(sizes: Sequence[int], nodes: Sequence[Node]) -> list[Seat]:
    """The seat of every rank, given the size and the node of each bundle."""
    placed = [
        (bundle, nodes[bundle])
        for bundle in order_bundles([node.id for node in nodes])
        for _ in range(sizes[bundle])
    ]
    addresses = [node.address for _, node in placed]
    return [
        Seat(
            rank,
            bundle,
            node,
            local_rank=addresses[:rank].count(node.address),
            local_size=addresses.count(node.address),
        )
        for rank, (bundle, node) in enumerate(placed)
    ]
