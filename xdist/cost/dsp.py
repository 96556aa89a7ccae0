"""What five ways to shard one video transformer move, a pair of spatial and temporal blocks at a
time.

A layer attends over space, over time, and has `mlps` MLPs. M = B T S C elements of the activation,
P ranks, even shares; received by one rank, forward:

    dsp           2 (M/P) (P-1)/P     the sharded dim is switched in front of the block that needs
                                      it whole, and back
    ulysses_one   4 (M/P) (P-1)/P     q, k, v to heads and the output back, in the block that mixes
                                      the sharded dim
    ulysses_both  8 (M/P) (P-1)/P     the same in both blocks
    ring          2 (M/P) (P-1)       keys and values, in the block that mixes the sharded dim
    megatron_sp   (4 + 2 mlps) M (P-1)/P    each branch gathers its input and reduce-scatters its
                                      output

Zhao et al., "DSP: Dynamic Sequence Parallelism for Multi-Dimensional Transformers" (2024),
counts the pair of two layers with an MLP each, so 8 M for Megatron-SP; VDT has one MLP a pair.
Backward each switch goes the other way; ring sends the blocks again and their gradients as sums; a
gather's gradients are reduce-scattered, as sums, and the other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

from xdist.cost.moves import gather_bytes, reduce_scatter_bytes, switch_bytes
from xdist.cost.place_attention import Heads, mixed
from xdist.cost.place_spot import Passes, Spot, at_least, switched
from xdist.errors import ConfigError, LayoutError
from xdist.layout import even_sizes

METHODS = {
    "dsp": "DSP",
    "ulysses_one": "Ulysses in one block",
    "ulysses_both": "Ulysses in both blocks",
    "ring": "ring",
    "megatron_sp": "Megatron-SP",
}
"""Names of the methods, as tables print them."""

FORMULAS = {
    "dsp": "2 (M/P) (P-1)/P",
    "ulysses_one": "4 (M/P) (P-1)/P",
    "ulysses_both": "8 (M/P) (P-1)/P",
    "ring": "2 (M/P) (P-1)",
    "megatron_sp": "(4 + 2 mlps) M (P-1)/P",
}
"""Elements that a rank receives a pair, forward, with even shares."""


@dataclass(frozen=True)
class Video:
    """One pair of blocks over the grid `sizes`, frames first, sharded along `dim`.

    switch_to: the dim that DSP shards in the block that mixes `dim`.
    """

    sizes: tuple[int, ...]
    heads: int
    head_dim: int
    dim: int = 0
    switch_to: int = 1
    batch: int = 1
    mlps: int = 1
    itemsize: int = 4

    def __post_init__(self) -> None:
        for name in ("sizes", "heads", "head_dim", "batch"):
            at_least(name, getattr(self, name), 1)
        at_least("mlps", self.mlps, 0)
        dims = len(self.sizes)
        if dims < 2 or not (0 <= self.dim < dims and 0 <= self.switch_to < dims):
            raise LayoutError(
                "a video has frames and at least one dim of space",
                f"sizes {self.sizes}, dim {self.dim}, switch_to {self.switch_to}",
            )
        if (self.dim == 0) == (self.switch_to == 0):
            raise LayoutError(
                "DSP switches between frames and a dim of space",
                f"dim {self.dim} and switch_to {self.switch_to}",
                "one of them is 0",
            )

    @property
    def channels(self) -> int:
        """C."""
        return self.heads * self.head_dim

    @property
    def elements(self) -> int:
        """M."""
        return self.batch * prod(self.sizes) * self.channels

    @property
    def mixing(self) -> tuple[int, ...]:
        """The dims of the block that mixes the sharded one."""
        return (0,) if self.dim == 0 else tuple(range(1, len(self.sizes)))


def pair_elements(method: str, elements: int, degree: int, *, mlps: int = 1) -> Fraction:
    """Elements that a rank receives a pair, forward, with even shares: `FORMULAS`.

    Raises:
        ConfigError: no such method.
    """
    _check(method)
    part, rest = Fraction(elements, degree), Fraction(degree - 1, degree)
    times = {"dsp": 2, "ulysses_one": 4, "ulysses_both": 8}
    if method in times:
        return times[method] * part * rest
    return 2 * part * (degree - 1) if method == "ring" else (4 + 2 * mlps) * elements * rest


def pair_bytes(method: str, video: Video, degree: int) -> tuple[Passes, ...]:
    """Bytes of one pair by rank, forward and backward, exact for uneven shares and heads.

    Raises:
        ConfigError: no such method.
    """
    _check(method)
    spot = Spot(video.sizes, video.dim, degree, video.batch, video.channels, video.itemsize)
    if degree == 1:
        return spot.nothing()
    if method == "dsp":
        row = video.batch * video.channels * video.itemsize
        there = switched(video.sizes, video.dim, video.switch_to, degree, row)
        back = switched(video.sizes, video.switch_to, video.dim, degree, row)
        return tuple(a + b for a, b in zip(there, back, strict=True))
    if method == "ring":
        ways = mixed(video.mixing, Heads(video.heads, video.head_dim), spot)
        return next(way.moved for way in ways if way.strategy == "ring")
    one = _to_heads if method.startswith("ulysses") else _gathered
    times = {"ulysses_one": 1, "ulysses_both": 2, "megatron_sp": 2 + video.mlps}[method]
    return tuple(_times(one(video, spot, rank), times) for rank in range(degree))


def _to_heads(video: Video, spot: Spot, rank: int) -> Passes:
    """q, k and v there, the output back."""
    heads = even_sizes(video.heads, spot.degree)
    other = spot.across * video.head_dim
    there = switch_bytes(spot.shares, heads, rank, other, video.itemsize)
    back = switch_bytes(heads, spot.shares, rank, other, video.itemsize)
    return Passes(there + there + there + back, there + back + back + back)


def _gathered(video: Video, spot: Spot, rank: int) -> Passes:
    """A branch of Megatron-SP: its input gathered, its output reduce-scattered."""
    other = spot.across * video.channels
    gather = gather_bytes(spot.shares, rank, other, video.itemsize)
    scatter = reduce_scatter_bytes(spot.shares, rank, other, video.itemsize)
    return Passes(gather + scatter, scatter + gather)


def _times(passes: Passes, count: int) -> Passes:
    total = Passes()
    for _ in range(count):
        total += passes
    return total


@dataclass(frozen=True)
class Row:
    """One method beside DSP. elements: a rank receives a pair, forward, with even shares; bytes:
    the busiest rank sends a pair, forward and backward, exactly."""

    method: str
    elements: Fraction
    bytes: int
    dsp_elements: Fraction
    dsp_bytes: int

    @property
    def ratio(self) -> Fraction:
        """DSP's elements by this method's."""
        return self.dsp_elements / self.elements if self.elements else Fraction(1)


@dataclass(frozen=True)
class Comparison:
    """The five methods on one video and number of ranks."""

    video: Video
    degree: int
    rows: tuple[Row, ...]

    def table(self) -> str:
        """Aligned plain text; every ratio names its baseline."""
        lines = [
            f"a spatial + temporal pair over {' x '.join(map(str, self.video.sizes))}, "
            f"{self.video.channels} channels, {self.degree} ranks, {self.video.mlps} MLP(s):"
        ]
        for row in self.rows:
            said = f"{float(row.elements):,.0f} elements = {FORMULAS[row.method]}"
            beside = "" if row.method == "dsp" else (
                f"; DSP moves {float(row.ratio):.3g} of {METHODS[row.method]}"
            )  # fmt: skip
            lines.append(f"  {METHODS[row.method]:<23}{row.bytes:>14,} bytes  {said}{beside}")
        return "\n".join(lines)


def comparison(video: Video, degree: int, methods: Sequence[str] = tuple(METHODS)) -> Comparison:
    """What each method moves a pair.

    Raises:
        ConfigError: no such method, or a degree below 1.
    """
    at_least("degree", degree, 1)
    count, mlps = video.elements, video.mlps

    def sent(method: str) -> int:
        return max(one.sent_bytes for one in pair_bytes(method, video, degree))

    least, least_bytes = pair_elements("dsp", count, degree, mlps=mlps), sent("dsp")
    return Comparison(
        video,
        degree,
        tuple(
            Row(name, pair_elements(name, count, degree, mlps=mlps), sent(name), least, least_bytes)
            for name in methods
        ),
    )


def _check(method: str) -> None:
    if method not in METHODS:
        raise ConfigError(f"no such method: {method!r}", "", f"one of {', '.join(METHODS)}")
