"""2-D Kolmogorov flow from a small pseudo-spectral solver.

Vorticity w on a periodic square of side 2 pi, driven by the force `amplitude * sin(waves y)` in x:

    dw/dt + u . grad w = viscosity * lap w - drag * w - amplitude * waves * cos(waves y)

u = (d psi/dy, -d psi/dx) with lap psi = -w. Derivatives are taken in Fourier space and products in
real space, without the upper third of wave numbers (Orszag 1971: no aliases); the linear terms are
exact by an integrating factor, the rest is the classical Runge-Kutta scheme of fourth order (Canuto
et al. 2007, Spectral Methods, section 4.2). float64 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from math import ceil, isfinite, pi
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xdist.data.draw import draws
from xdist.data.grid_write import Contents, Existing, GridSet, PreparedGrids, Row, write_grids
from xdist.data.video import STREAMS, check_counts
from xdist.errors import ConfigError, NumericsError

_STREAM = 0x666C6F77
# Samples that are advanced together. Part of the recipe: sums run in this order.
_TOGETHER = 16
# The initial vorticity has waves up to this number.
_INITIAL_WAVES = 4


@dataclass(frozen=True)
class Kolmogorov:
    """The settings of a flow: samples `[frames, size, size, 1]`, (time, y, x), float32 vorticity.

    Attributes:
        frames, interval: how many frames, and the time between them.
        size: points along each side, even, at least 8.
        viscosity, drag, amplitude, waves: of the equation; drag is Rayleigh's linear friction.
        warm_up: time before the first frame.
        step: the longest time step.
        seed: of the initial fields, 63 bits.

    Raises:
        ConfigError: a number outside its range, or a forcing that the grid does not resolve.
    """

    frames: int = 16
    size: int = 32
    interval: float = 0.25
    viscosity: float = 0.01
    drag: float = 0.1
    amplitude: float = 1.0
    waves: int = 4
    warm_up: float = 4.0
    step: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"viscosity": 0, "drag": 0, "amplitude": 0, "warm_up": 0}
        numbers = [getattr(self, name) >= low for name, low in least.items()]
        ends = [isfinite(getattr(self, name)) for name in (*least, "interval", "step")]
        fits = self.frames >= 1 and self.interval > 0 and self.step > 0
        if not all(numbers + ends) or not fits or not 0 <= self.seed < 1 << 63:
            raise ConfigError(
                "a flow cannot be computed",
                f"{self}",
                "use at least one frame, times above 0, coefficients of 0 or more",
            )
        if self.size < 8 or self.size % 2 or not 1 <= self.waves < self.size / 3:
            raise ConfigError(
                "the grid does not resolve the forcing",
                f"{self.size} points a side hold waves below {self.size / 3:.1f}, waves = "
                f"{self.waves}",
                "use an even size of 8 or more, and fewer waves than a third of it",
            )

    def initial(self, first: int, count: int, split: str = "train") -> NDArray[np.float64]:
        """Drawn smooth vorticity without mean, `[count, size, size]`, mean square 1."""
        side = 2 * _INITIAL_WAVES + 1
        numbers = np.arange(first, first + count)
        words = draws(self.seed, _STREAM + STREAMS[split], numbers, 2 * side * side)
        parts = (words.astype(np.float64) / 2.0**31 - 1.0).reshape(count, 2, side, side)
        at = np.arange(self.size) * (2 * pi / self.size)
        turn = np.exp(1j * np.arange(-_INITIAL_WAVES, _INITIAL_WAVES + 1)[:, None] * at)
        field = np.einsum("nab,ay,bx->nyx", parts[:, 0] + 1j * parts[:, 1], turn, turn).real
        field -= field.mean((1, 2), keepdims=True)
        found: NDArray[np.float64] = field / np.sqrt((field**2).mean((1, 2), keepdims=True))
        return found

    def advance(self, vorticity: NDArray[np.float64], time: float) -> NDArray[np.float64]:
        """Vorticity `[..., size, size]` after `time`, in equal steps of at most `step`.

        Raises:
            NumericsError: the solution left the finite numbers.
        """
        steps = ceil(time / self.step - 1e-9)
        if steps == 0:
            return vorticity
        found = np.fft.rfft2(vorticity)
        with np.errstate(over="ignore", invalid="ignore"):
            half = np.exp(-0.5 * (time / steps) * self._decay)
            for _ in range(steps):
                found = self._step(found, time / steps, half)
        if not np.isfinite(found).all():
            raise NumericsError(
                "the flow grew beyond all bounds",
                f"steps of {time / steps:.4g}, {self.size} points a side",
                "use a smaller step or more viscosity",
            )
        return np.fft.irfft2(found, s=(self.size, self.size))

    def make(self, first: int, count: int, split: str = "train") -> NDArray[np.float32]:
        """Samples `first` to `first + count`, float32 `[count, frames, size, size, 1]`."""
        now = self.advance(self.initial(first, count, split), self.warm_up)
        frames = [now]
        for _ in range(self.frames - 1):
            now = self.advance(now, self.interval)
            frames.append(now)
        return np.stack(frames, axis=1).astype(np.float32)[..., None]

    def velocity(self, spectrum: NDArray[np.complex128]) -> tuple[NDArray[np.float64], ...]:
        """Velocities in x and in y, in real space, from the spectrum of the vorticity."""
        stream = spectrum * self._inverse_laplacian
        shape = (self.size, self.size)
        along_x = np.fft.irfft2(1j * self._wave_y * stream, s=shape)
        along_y = np.fft.irfft2(-1j * self._wave_x * stream, s=shape)
        return along_x, along_y

    def _step(
        self, now: NDArray[np.complex128], step: float, half: NDArray[np.float64]
    ) -> NDArray[np.complex128]:
        """One Runge-Kutta step; `half` is the decay over half of it."""
        a = step * self._change(now)
        b = step * self._change(half * (now + 0.5 * a))
        c = step * self._change(half * now + 0.5 * b)
        d = step * self._change(half * (half * now + c))
        found: NDArray[np.complex128] = half * half * (now + a / 6) + half * (b + c) / 3 + d / 6
        return found

    def _change(self, now: NDArray[np.complex128]) -> NDArray[np.complex128]:
        """Advection and forcing of a spectrum."""
        shape = (self.size, self.size)
        along_x, along_y = self.velocity(now)
        slope_x = np.fft.irfft2(1j * self._wave_x * now, s=shape)
        slope_y = np.fft.irfft2(1j * self._wave_y * now, s=shape)
        carried = np.fft.rfft2(along_x * slope_x + along_y * slope_y)
        found: NDArray[np.complex128] = self._kept * (self._force - carried)
        return found

    @cached_property
    def _wave_y(self) -> NDArray[np.float64]:
        return np.fft.fftfreq(self.size, 1 / self.size).astype(np.float64)[:, None]

    @cached_property
    def _wave_x(self) -> NDArray[np.float64]:
        return np.fft.rfftfreq(self.size, 1 / self.size).astype(np.float64)[None]

    @cached_property
    def _square(self) -> NDArray[np.float64]:
        return self._wave_x**2 + self._wave_y**2

    @cached_property
    def _inverse_laplacian(self) -> NDArray[np.float64]:
        found: NDArray[np.float64] = 1.0 / np.maximum(self._square, 1.0)
        found[0, 0] = 0.0
        return found

    @cached_property
    def _decay(self) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.viscosity * self._square + self.drag
        return found

    @cached_property
    def _kept(self) -> NDArray[np.bool_]:
        low = self.size / 3
        return (np.abs(self._wave_x) < low) & (np.abs(self._wave_y) < low)

    @cached_property
    def _force(self) -> NDArray[np.complex128]:
        y = np.arange(self.size)[:, None] * (2 * pi / self.size)
        curl = -self.amplitude * self.waves * np.cos(self.waves * y) * np.ones(self.size)
        return np.fft.rfft2(curl)


def prepare_flow(
    flow: Kolmogorov,
    store: str | Path,
    *,
    samples: int,
    held_out: int = 0,
    existing: Existing = "error",
) -> PreparedGrids:
    """Write flows as a store of grids (time, y, x); a reader gives vorticity of variance about 1.

    It is divided by the standard deviation of the first samples.

    Raises:
        ConfigError: no samples.
        DataError: a store in the way.
        NumericsError: as `Kolmogorov.advance`.
    """
    check_counts(samples, held_out)
    counts = {"train": samples, "held_out": held_out}

    def parts(split: str, begin: int) -> Iterator[NDArray[np.float32]]:
        for first in range(begin, counts[split], _TOGETHER):
            yield flow.make(first, min(_TOGETHER, counts[split] - first), split)

    def rows(blocks: Iterator[NDArray[np.float32]]) -> Iterator[Row]:
        return ((one, None) for block in blocks for one in block)

    start = flow.make(0, min(_TOGETHER, samples))
    spread = float(start.std(dtype=np.float64)) or 1.0
    blocks = {"train": chain([start], parts("train", _TOGETHER)), "held_out": parts("held_out", 0)}
    splits = [name for name, count in counts.items() if count]
    contents = Contents(
        kind="flow",
        channels=("vorticity",),
        classes=(),
        grids=[
            GridSet(
                sizes=(flow.frames, flow.size, flow.size),
                samples=counts[name],
                dtype="float32",
                rows=rows(blocks[name]),
                offset=(0.0,),
                scale=(1.0 / spread,),
                value_range=(float(np.ptp(start)),),
            )
            for name in splits
        ],
        splits={name: [at] for at, name in enumerate(splits)},
        recipe={"made": "kolmogorov", "samples": counts} | asdict(flow),
    )
    return write_grids(store, contents, existing=existing)
