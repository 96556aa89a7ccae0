"""Dropout inside attention, drawn from what every rank knows. Pure integers."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from operator import index

from xdist.errors import ShapeError

_MASK = 2**64 - 1


@dataclass(frozen=True)
class Dropout:
    """Which attention probabilities are dropped: a pure function of what names them.

    The probability of query position i for key position j, of global head h and batch row b, is
    dropped or kept (and then divided by 1 - `rate`) by a hash of (`seed`, `step`, `layer`,
    `first_row` + b, h, i, j), positions global: the same for every number of ranks, strategy and
    layout, and in a recompute.

    Args:
        rate: the share of probabilities dropped, 0 <= rate < 1.
        seed: of the run.
        step: of the training; another step drops others.
        layer: of the model; another layer drops others.
        first_row: the global number of batch row 0, so that data ranks differ.

    Raises:
        ShapeError: a rate that is no number in [0, 1), or a number that is not an integer of 64
            bits from 0.
    """

    rate: float
    seed: int
    step: int = 0
    layer: int = 0
    first_row: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.rate, bool) or not isinstance(self.rate, Real):
            raise ShapeError("dropout takes a rate in [0, 1)", f"got {self.rate!r}")
        if not 0.0 <= self.rate < 1.0:
            raise ShapeError("dropout takes a rate in [0, 1)", f"got {self.rate}")
        for name in ("seed", "step", "layer", "first_row"):
            value = getattr(self, name)
            try:
                number = index(value)
            except TypeError as error:
                raise ShapeError(f"dropout: {name} must be an integer", f"got {value!r}") from error
            if not 0 <= number <= _MASK:
                raise ShapeError(f"dropout: {name} must lie in [0, 2^64)", f"got {number}")
            object.__setattr__(self, name, number)

    @property
    def key(self) -> int:
        """64 bits of (seed, step, layer)."""
        return _mixed(_mixed(_mixed(self.seed) ^ self.step) ^ self.layer)


def _mixed(x: int) -> int:
    """A bijection of 64-bit numbers that spreads each bit over all (Steele et al. 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
