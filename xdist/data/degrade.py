"""What a scanner does to an image: a smooth multiplicative bias field, and noise.

Every value is a function of (seed, sample, position): a rank that reads a slab gets what one that
reads the whole grid gets there, and nothing is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from math import inf, pi, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdist.data.draw import draws, philox
from xdist.errors import ConfigError

# Waves of the field along each dim: half a wave each, so that it stays smooth.
_WAVES = 3
_LATTICE = 9
_STREAM_BIAS, _STREAM_NOISE = 0x62696173, 0x6E6F6973
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Degradation:
    """A recipe: `value * (1 + bias * field) + noise / 255 * range * gaussian`.

    Attributes:
        bias: the largest part by which the field dims or brightens, in [0, 1). The field is a sum
            of products of cosines, up to two half waves a dim, with drawn weights; one a sample,
            the same for all its channels.
        noise: standard deviation of the Gaussian noise, of 255 parts of the image's range.
        seed: of both, 64 bits.

    Raises:
        ConfigError: a bias outside [0, 1), noise below zero, a seed of more than 64 bits.
    """

    bias: float = 0.0
    noise: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.bias < 1 or not 0 <= self.noise < inf or not 0 <= self.seed < 1 << 64:
            raise ConfigError(
                "a degradation cannot be made",
                f"bias {self.bias}, noise {self.noise}, seed {self.seed}",
                "use a bias in [0, 1), a noise of 0 or more, and a seed of 64 bits",
            )

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        return self.bias > 0 or self.noise > 0

    def facts(self) -> dict[str, Any]:
        """The recipe as JSON."""
        return asdict(self)

    def apply(
        self,
        values: NDArray[np.float32],
        sample: int,
        sizes: Sequence[int],
        origin: Sequence[int],
        value_range: Sequence[float],
    ) -> NDArray[np.float32]:
        """Degrade a box of a sample; a new array.

        values: float32 `[s1, ..., sk, C]`, as stored; sizes: the sample's whole grid; origin: where
        the box starts; value_range: largest less smallest value of each channel of the sample.
        """
        found = values.copy()
        if self.bias:
            field = 1.0 + self.bias * self.field(sample, sizes, origin, values.shape[:-1])
            found *= field.astype(np.float32)[..., None]
        if self.noise and found.size:
            scale = np.asarray(value_range, dtype=np.float64) * (self.noise / 255.0)
            places = _places(sizes, origin, values.shape[:-1], values.shape[-1])
            noise = _gaussian(self.seed, sample, places).reshape(values.shape)
            found += scale.astype(np.float32) * noise
        return found

    def field(
        self, sample: int, sizes: Sequence[int], origin: Sequence[int], box: Sequence[int]
    ) -> NDArray[np.float64]:
        """The bias field, from -1 to 1 on the whole grid (about), float64 of shape `box`."""
        weights = _weights(self.seed, sample, len(sizes))
        at = [
            (np.arange(start, start + count) + 0.5) / size
            for start, count, size in zip(origin, box, sizes, strict=True)
        ]
        return _waves(weights, at)


@cache
def _weights(seed: int, sample: int, dims: int) -> NDArray[np.float64]:
    """The weights of the waves `[3] * dims`, so that the field is 1 at most on a coarse lattice."""
    words = draws(seed, _STREAM_BIAS, np.array([sample]), _WAVES**dims)[0]
    weights = (words.astype(np.float64) / 2.0**31 - 1.0).reshape((_WAVES,) * dims)
    # A constant is no bias; long waves weigh more.
    for wave in product(range(_WAVES), repeat=dims):
        weights[wave] *= 1.0 / (sum(wave) ** 2) if any(wave) else 0.0
    lattice = np.linspace(0.0, 1.0, _LATTICE)
    return weights / np.abs(_waves(weights, [lattice] * dims)).max()


def _waves(weights: NDArray[np.float64], at: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The sum of the products of cosines: one dim at a time."""
    found = weights
    for u in at:
        basis = np.cos(pi * np.arange(_WAVES)[:, None] * u)
        # The first dim is summed away, and comes back as the last.
        found = np.tensordot(found, basis, axes=(0, 0))
    return found


def _places(
    sizes: Sequence[int], origin: Sequence[int], box: Sequence[int], channels: int
) -> NDArray[np.int64]:
    """The number of each value of a box in its whole sample, int64, flat."""
    found = np.zeros((1,) * len(box), dtype=np.int64)
    for dim, (start, count) in enumerate(zip(origin, box, strict=True)):
        stride = prod(sizes[dim + 1 :])
        line = (start + np.arange(count, dtype=np.int64)) * stride
        found = found + line.reshape([-1 if d == dim else 1 for d in range(len(box))])
    return (found[..., None] * channels + np.arange(channels)).reshape(-1)


def _gaussian(seed: int, sample: int, places: NDArray[np.int64]) -> NDArray[np.float32]:
    """A standard normal number for each place: Box and Muller (1958), on two words of Philox."""
    found = np.empty(places.size, dtype=np.float32)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for start in range(0, places.size, _BLOCK):
        number = places[start : start + _BLOCK].astype(np.uint64)
        kind = np.full(number.shape, _STREAM_NOISE, dtype=np.uint64)
        who = np.full(number.shape, sample, dtype=np.uint64)
        first, second, _, _ = philox((number & low, number >> half, who, kind), key)
        radius = np.sqrt(-2.0 * np.log((first + 0.5) / 2.0**32))
        found[start : start + _BLOCK] = radius * np.cos(2.0 * pi * (second / 2.0**32))
    return found
