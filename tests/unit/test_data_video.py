"""Bouncing shapes keep to their law, and videos are functions of their seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from xdist.data.grid_store import GridStore
from xdist.data.video import Bouncing, prepare_video
from xdist.errors import ConfigError, DataError
from xdist_launchers.cli import app


def test_places_are_those_of_a_ball_that_is_moved_and_turned_back_at_walls() -> None:
    settings = Bouncing(frames=5, height=24, width=40, shapes=4, seed=3)
    for sample in range(4):
        shapes = settings.law(sample)
        place, velocity = shapes.start.copy(), shapes.velocity.copy()
        for frame in range(200):
            np.testing.assert_allclose(settings.places(shapes, frame), place, atol=1e-9)
            place += velocity
            for at in range(4):
                for axis, length in enumerate((24, 40)):
                    low, high = shapes.radius[at], length - shapes.radius[at]
                    while not low <= place[at, axis] <= high:
                        wall = low if place[at, axis] < low else high
                        place[at, axis] = 2 * wall - place[at, axis]
                        velocity[at, axis] *= -1


def test_shapes_are_drawn_where_the_law_puts_them() -> None:
    settings = Bouncing(frames=12, height=32, width=48, channels=3, shapes=1, seed=1)
    kinds = set()
    for sample in range(6):
        shapes = settings.law(sample)
        kinds.add(bool(shapes.disc[0]))
        video = settings.make(sample).astype(np.float64)
        assert video.shape == (12, 32, 48, 3)
        for frame, picture in enumerate(video):
            weight = picture[..., 0] / picture[..., 0].sum()
            centre = [
                (weight.sum(1 - axis) * (np.arange(size) + 0.5)).sum()
                for axis, size in enumerate((32, 48))
            ]
            np.testing.assert_allclose(centre, settings.places(shapes, frame)[0], atol=0.06)
        area = (np.pi if shapes.disc[0] else 4.0) * shapes.radius[0] ** 2
        drawn = (video[0] / 255 / shapes.colour[0]).sum((0, 1))
        np.testing.assert_allclose(drawn, area, rtol=0.06)
    assert kinds == {True, False}


def test_a_sample_is_a_function_of_seed_split_and_number(tmp_path: Path) -> None:
    settings = Bouncing(frames=4, height=16, width=12, seed=5)
    made = prepare_video(settings, tmp_path / "a", samples=3, held_out=2)
    assert made.samples == {"train": 3, "held_out": 2}
    again = prepare_video(settings, tmp_path / "b", samples=3, held_out=2)
    assert made.fingerprint == again.fingerprint
    assert prepare_video(settings, tmp_path / "a", samples=3, held_out=2, existing="keep").kept
    store = GridStore(tmp_path / "a")
    assert (store.kind, store.classes, store.dims) == ("video", (), 3)
    box = [(1, 4), (0, 16), (0, 12)]
    for split, count in (("train", 3), ("held_out", 2)):
        for sample in range(count):
            want = settings.make(sample, split)[1:4].astype(np.float32) / 127.5 - 1
            np.testing.assert_allclose(store.split(split).image(sample, box), want, atol=1e-6)
    assert not np.array_equal(settings.make(0), settings.make(1))
    assert not np.array_equal(settings.make(0), settings.make(0, "held_out"))
    assert not np.array_equal(settings.make(0), Bouncing(4, 16, 12, seed=6).make(0))
    # The bytes are those of any machine: integers, sums, products and square roots.
    assert int(settings.make(0).astype(np.int64).sum()) == 26_836
    with pytest.raises(DataError, match="no labels"):
        store.split("train").labels(0, box)


def test_settings_that_make_no_video_are_refused(tmp_path: Path) -> None:
    for bad in ({"frames": 0}, {"height": 4}, {"shapes": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match="cannot be drawn"):
            Bouncing(**bad)
    with pytest.raises(ConfigError, match="samples = 0"):
        prepare_video(Bouncing(), tmp_path / "s", samples=0)


def test_the_commands_write_videos_and_flows(tmp_path: Path) -> None:
    runner = CliRunner()
    words = ["prepare", "video", str(tmp_path / "v"), "--samples", "2", "--held-out", "0"]
    words += ["--frames", "3", "--size", "8,10", "--seed", "4"]
    done = runner.invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "3 x 8 x 10; samples: train 2" in done.output
    assert "kept as it is" in runner.invoke(app, words).output
    words = ["prepare", "flow", str(tmp_path / "f"), "--samples", "1", "--held-out", "1"]
    done = runner.invoke(app, [*words, "--frames", "2", "--size", "8", "--waves", "2"])
    assert done.exit_code == 0, done.output
    assert "2 x 8 x 8; samples: train 1, held_out 1" in done.output
    done = runner.invoke(app, ["prepare", "video", str(tmp_path / "x"), "--size", "8"])
    assert done.exit_code == 2
