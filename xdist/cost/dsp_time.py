"""How long the exchanges of a video transformer take, and how fast it trains: a prediction.

A cluster is described by a few stated speeds; nothing is measured here. Each method sends what its
own paper sends, all of it in the activations' dtype, which favours those that send sums:

    switch   a rank's bytes, in equal parts to all others; those inside the node and those between
             nodes travel at the same time, and the slower ones count
    ring     each hop waits for its slowest link; blocks travel behind the attention they belong
             to, and only what exceeds it counts
    gather   every byte enters a node once, over all its cards, and is then passed around inside;
             the slower of both counts (a reduce-scatter is the same backwards)

and `message_s` for each exchange or hop. Switches and gathers hide behind nothing. A rank computes
its share of the matrix products at `flops_per_s`; where ranks have uneven shares of frames, rows
or heads, all wait for the largest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from xdist.cost.dsp import METHODS, Video, pair_elements
from xdist.cost.place_spot import at_least
from xdist.errors import ConfigError
from xdist.layout import even_sizes

# Forward once, backward twice.
PASSES = 3


@dataclass(frozen=True)
class Cluster:
    """Stated speeds. inside, between: of one rank, each way, to its node and to other nodes."""

    name: str
    node_ranks: int
    inside_bytes_per_s: float
    between_bytes_per_s: float
    message_s: float
    flops_per_s: float

    def switch_s(self, sent_bytes: float, degree: int) -> float:
        """One all-to-all in which each rank sends so many bytes, in equal parts."""
        if degree == 1:
            return 0.0
        near = min(self.node_ranks, degree)
        inside = sent_bytes * (near - 1) / (degree - 1) / self.inside_bytes_per_s
        between = sent_bytes * (degree - near) / (degree - 1) / self.between_bytes_per_s
        return self.message_s + max(inside, between)

    def ring_s(self, block_bytes: float, degree: int) -> float:
        """Each rank's block once around all ranks."""
        crosses = degree > self.node_ranks
        link = self.between_bytes_per_s if crosses else self.inside_bytes_per_s
        return (degree - 1) * (self.message_s + block_bytes / link)

    def gather_s(self, all_bytes: float, degree: int) -> float:
        """An all-gather of a tensor of so many bytes, or its reduce-scatter."""
        if degree == 1:
            return 0.0
        near = min(self.node_ranks, degree)
        inside = all_bytes * (degree - 1) / degree / self.inside_bytes_per_s
        between = all_bytes * (1 - near / degree) / (near * self.between_bytes_per_s)
        return self.message_s + max(inside, between)


H100 = Cluster("H100: 450 GB/s inside 8, 50 GB/s between", 8, 450e9, 50e9, 10e-6, 400e12)
"""NVLink 4 and one 400 Gb/s card a GPU, each way, as their data sheets say; 400 of 989 dense
bfloat16 TFLOP/s."""


@dataclass(frozen=True)
class Predicted:
    """One method over all pairs of a training step. seconds, on the slowest rank; tokens_per_s: of
    all ranks; faster: how much faster DSP is, as a fraction; sent_bytes: a rank, all pairs."""

    method: str
    communication_s: float
    compute_s: float
    tokens_per_s: float
    faster: float
    sent_bytes: float

    @property
    def step_s(self) -> float:
        """Both, one after the other."""
        return self.communication_s + self.compute_s


@dataclass(frozen=True)
class Prediction:
    """The methods on one video, cluster and number of ranks."""

    video: Video
    cluster: Cluster
    degree: int
    pairs: int
    rows: tuple[Predicted, ...]

    def table(self) -> str:
        """Aligned plain text; every speed-up names its baseline."""
        lines = [
            f"predicted: {' x '.join(map(str, self.video.sizes))} tokens, {self.video.channels} "
            f"channels, {self.pairs} pairs, {self.degree} ranks; {self.cluster.name}"
        ]
        for row in self.rows:
            beside = "" if row.method == "dsp" else (
                f"  DSP is {100 * row.faster:,.1f} % faster than {METHODS[row.method]}"
            )  # fmt: skip
            lines.append(
                f"  {METHODS[row.method]:<23}{1e3 * row.communication_s:>9,.1f} ms moving"
                f"{1e3 * row.compute_s:>9,.1f} ms computing{row.tokens_per_s:>14,.0f} tokens/s"
                f"{beside}"
            )
        return "\n".join(lines)


def pair_flops(video: Video, mlp_ratio: float = 4.0) -> dict[str, float]:
    """Multiply-adds counted twice of one pair, forward: of projections, scores over time and over
    space, and MLPs."""
    tokens = video.batch * prod(video.sizes)
    seen = {"temporal": video.sizes[0], "spatial": prod(video.sizes[1:])}
    c = video.channels
    return {
        "projections": 2 * 8.0 * tokens * c * c,
        **{name: 4.0 * tokens * c * keys for name, keys in seen.items()},
        "mlps": 4.0 * mlp_ratio * video.mlps * tokens * c * c,
    }


def predict(
    video: Video, degree: int, cluster: Cluster = H100, *, pairs: int = 28,
    mlp_ratio: float = 4.0, methods: Sequence[str] = tuple(METHODS),
) -> Prediction:  # fmt: skip
    """Times of `pairs` spatial + temporal pairs, forward and backward, by method.

    Raises:
        ConfigError: no such method, or methods without "dsp".
        ShapeError: degree or pairs below 1.
    """
    at_least("degree", degree, 1)
    at_least("pairs", pairs, 1)
    if "dsp" not in methods:
        raise ConfigError("the comparison is with dsp", f"methods are {tuple(methods)}")
    tokens = video.batch * prod(video.sizes)
    times = {}
    for method in methods:
        compute, attention = _compute_s(method, video, degree, cluster, mlp_ratio)
        times[method] = (
            pairs * _moving_s(method, video, degree, cluster, attention),
            (pairs * compute),
        )
    least = sum(times["dsp"])
    return Prediction(
        video, cluster, degree, pairs,
        tuple(
            Predicted(
                method, moving, compute, tokens / (moving + compute),
                (moving + compute) / least - 1, pairs * _sent(method, video, degree),
            )
            for method, (moving, compute) in times.items()
        ),
    )  # fmt: skip


def _sent(method: str, video: Video, degree: int) -> float:
    """Bytes a rank sends a pair, forward and backward: what it receives, with even shares. Ring's
    blocks travel again, and their gradients."""
    forward = float(pair_elements(method, video.elements, degree, mlps=video.mlps))
    return forward * video.itemsize * (3 if method == "ring" else 2)


def _moving_s(
    method: str, video: Video, degree: int, cluster: Cluster, attention_s: float
) -> float:
    """Seconds of a pair's exchanges, forward and backward, that hide behind nothing; attention_s:
    of the block that mixes the sharded dim, forward."""
    if degree == 1:
        return 0.0
    whole = video.elements * video.itemsize
    if method == "megatron_sp":
        # A gather and a reduce-scatter for each branch and direction.
        return 2 * 2 * (2 + video.mlps) * cluster.gather_s(whole, degree)
    if method == "ring":
        block = 2 * whole / degree
        there = cluster.ring_s(block, degree)
        # Backward the blocks and their gradients, behind twice the work.
        back = cluster.ring_s(2 * block, degree)
        return max(0.0, there - attention_s) + max(0.0, back - 2 * attention_s)
    sent = whole / degree * (degree - 1) / degree
    if method == "dsp":
        return 2 * 2 * cluster.switch_s(sent, degree)
    blocks = 2 if method == "ulysses_both" else 1
    # q, k and v in one exchange, the output in another.
    once = cluster.switch_s(3 * sent, degree) + cluster.switch_s(sent, degree)
    return 2 * blocks * once


def _compute_s(
    method: str, video: Video, degree: int, cluster: Cluster, mlp_ratio: float
) -> tuple[float, float]:
    """Seconds of a pair, forward and backward, on the rank with the most; and those of the scores
    of the block that mixes the sharded dim, forward."""
    flops = pair_flops(video, mlp_ratio)
    mixing, other = ("temporal", "spatial") if video.dim == 0 else ("spatial", "temporal")
    here, heads = _largest(video.sizes[video.dim], degree), _largest(video.heads, degree)
    there = _largest(video.sizes[video.switch_to], degree)
    half = flops["projections"] / 2
    shares = {
        "dsp": here * (half + flops[other] + flops["mlps"]) + there * (half + flops[mixing]),
        "ulysses_one": here * (2 * half + flops[other] + flops["mlps"]) + heads * flops[mixing],
        "ulysses_both": here * (2 * half + flops["mlps"])
        + heads * (flops[mixing] + flops[other]),
        "ring": here * sum(flops.values()),
        "megatron_sp": heads * (2 * half + flops[mixing] + flops[other])
        + flops["mlps"] / degree,
    }  # fmt: skip
    return PASSES * shares[method] / cluster.flops_per_s, here * flops[mixing] / cluster.flops_per_s


def _largest(size: int, degree: int) -> float:
    """The largest share of a dim, as a fraction."""
    return max(even_sizes(size, degree)) / size
