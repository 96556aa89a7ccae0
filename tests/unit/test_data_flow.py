"""The flow solver against exact solutions, invariants and its own order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from xdist.data.flow import Kolmogorov, prepare_flow
from xdist.data.grid_store import GridStore
from xdist.errors import ConfigError, NumericsError


def _grid(size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    at = np.arange(size) * (2 * np.pi / size)
    return at[:, None], at[None]


def test_vortices_that_only_decay() -> None:
    """Taylor and Green 1937: 2 cos x cos y exp(-2 viscosity t) is exact."""
    flow = Kolmogorov(size=16, viscosity=0.1, drag=0.0, amplitude=0.0, step=0.1)
    y, x = _grid(16)
    start = 2 * np.cos(x) * np.cos(y)
    np.testing.assert_allclose(flow.advance(start, 3.0), start * np.exp(-0.6), atol=1e-12)


def test_the_laminar_flow_stands_still() -> None:
    flow = Kolmogorov(size=24, viscosity=0.2, drag=0.1, amplitude=1.5, waves=3, step=0.05)
    y, x = _grid(24)
    still = -1.5 * 3 / (0.2 * 9 + 0.1) * np.cos(3 * y) + 0 * x
    np.testing.assert_allclose(flow.advance(still, 1.0), still, atol=1e-7)


def test_the_first_change_is_that_of_the_equation() -> None:
    """Three waves of a stream function, all derivatives by hand."""
    flow = Kolmogorov(size=20, viscosity=0.03, drag=0.2, amplitude=0.7, waves=2, step=1.0)
    y, x = _grid(20)
    # Amplitude, wave numbers in x and y, phase.
    waves = [(0.5, 1, 2, 0.3), (-0.4, 2, -1, 1.0), (0.3, 3, 0, 2.0)]
    w, w_x, w_y, along_x, along_y, laplacian = (np.zeros((20, 20)) for _ in range(6))
    for a, p, q, phase in waves:
        cosine, sine = np.cos(p * x + q * y + phase), np.sin(p * x + q * y + phase)
        square = p * p + q * q
        w += a * square * cosine
        w_x -= a * square * p * sine
        w_y -= a * square * q * sine
        laplacian -= a * square * square * cosine
        along_x -= a * q * sine
        along_y += a * p * sine
    want = -(along_x * w_x + along_y * w_y) + 0.03 * laplacian - 0.2 * w
    want -= 0.7 * 2 * np.cos(2 * y)

    def slope(step: float) -> NDArray[np.float64]:
        return (flow.advance(w, step) - w) / step

    # Richardson: the error of first order falls out.
    found = (slope(4e-4) - 6 * slope(2e-4) + 8 * slope(1e-4)) / 3
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_without_friction_energy_and_enstrophy_stay() -> None:
    flow = Kolmogorov(size=16, viscosity=0.0, drag=0.0, amplitude=0.0, waves=2, step=0.01)
    start = flow.advance(flow.initial(0, 1)[0], 0.01)

    def invariants(w: NDArray[np.float64]) -> tuple[float, float]:
        along_x, along_y = flow.velocity(np.fft.rfft2(w))
        return float((along_x**2 + along_y**2).mean()), float((w * w).mean())

    np.testing.assert_allclose(invariants(flow.advance(start, 1.0)), invariants(start), rtol=1e-7)
    assert np.abs(flow.advance(start, 1.0) - start).max() > 0.5


def test_the_scheme_is_of_fourth_order() -> None:
    def after(step: float) -> NDArray[np.float64]:
        flow = Kolmogorov(size=16, viscosity=0.02, waves=3, step=step, seed=1)
        return flow.advance(flow.initial(0, 1)[0], 0.8)

    exact = after(0.0025)
    errors = [np.abs(after(step) - exact).max() for step in (0.04, 0.02)]
    assert 13 < errors[0] / errors[1] < 19


def test_a_store_is_a_function_of_its_seed(tmp_path: Path) -> None:
    flow = Kolmogorov(frames=3, size=16, interval=0.2, warm_up=0.4, step=0.05, seed=2, waves=3)
    made = prepare_flow(flow, tmp_path / "a", samples=3, held_out=1)
    assert made.fingerprint == prepare_flow(flow, tmp_path / "b", samples=3, held_out=1).fingerprint
    split = GridStore(tmp_path / "a").split("train")
    box = [(0, 3), (0, 16), (0, 16)]
    frames = np.stack([split.image(sample, box)[..., 0] for sample in range(3)])
    assert abs(frames.std() - 1) < 1e-3
    truth = flow.make(0, 3)[..., 0]
    np.testing.assert_allclose(frames, truth / truth.std(dtype=np.float64), rtol=1e-5)
    # A frame follows from the one before it, up to float32 on the disk.
    after = flow.advance(truth[1, 0].astype(np.float64), 0.2)
    np.testing.assert_allclose(after, truth[1, 1], atol=1e-5)
    assert np.abs(truth[0] - truth[1]).max() > 0.1
    assert np.abs(flow.make(0, 1, "held_out")[0, ..., 0] - truth[0]).max() > 0.1


def test_settings_that_make_no_flow_are_refused() -> None:
    for bad in ({"frames": 0}, {"viscosity": -1.0}, {"step": 0.0}, {"drag": float("inf")}):
        with pytest.raises(ConfigError, match="cannot be computed"):
            Kolmogorov(**bad)
    for bad in ({"size": 9}, {"size": 16, "waves": 6}, {"waves": 0}):
        with pytest.raises(ConfigError, match="does not resolve the forcing"):
            Kolmogorov(**bad)
    wild = Kolmogorov(size=16, viscosity=0.0, amplitude=1e6, step=1.0)
    with pytest.raises(NumericsError, match="use a smaller step"):
        wild.advance(wild.initial(0, 1), 60.0)
