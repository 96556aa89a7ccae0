"""The video diffusion transformer on one device: inputs, masks, loss, placement, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xdist.errors import ConfigError, LayoutError, ShapeError, StrategyError
from xdist.models.vdt import VDTConfig, build
from xdist.models.vdt_inputs import compose, diffusion_inputs, known_positions, level
from xdist.models.vdt_sample import sample
from xdist.nn.factorised import FactorisedAttention

SIZES = VDTConfig(sizes=(4, 4, 6), patch=(1, 2, 2), channels=2, dim=8, depth=1, head_dim=4)


def clean(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 4, 4, 6, 2, generator=torch.Generator().manual_seed(0))


def test_masks_are_those_of_their_names() -> None:
    def frames(mask: str, sizes: tuple[int, ...] = (6, 4, 4)) -> list[int]:
        known = known_positions(mask, sizes, torch.Generator().manual_seed(1))
        assert (known.flatten(1).all(1) | ~known.flatten(1).any(1)).all()
        return known.flatten(1).all(1).nonzero().flatten().tolist()

    assert frames("nothing") == []
    assert frames("first") == [0, 1, 2]
    assert frames("ends") == [0, 5]
    assert frames("image") == [0]
    assert 0 < len(frames("scattered")) < 6
    assert frames("ends", (1, 4, 4)) == frames("image", (1, 4, 4)) == []
    box = known_positions("box", (6, 4, 5), torch.Generator().manual_seed(1))
    assert (box == box[0]).all()
    assert int((~box[0]).sum()) == 2 * 2
    with pytest.raises(ConfigError, match="no mask 'last'"):
        known_positions("last", (2, 2), torch.Generator())


def test_known_positions_come_in_clean_and_the_rest_noisy() -> None:
    video, noise = clean(), torch.randn(2, 4, 4, 6, 2)
    known = torch.zeros(2, 4, 4, 6, dtype=torch.bool)
    known[:, 0] = True
    times = torch.tensor([0.25, 1.0])
    x = compose(video, noise, known, times)
    assert torch.equal(x[:, 0, ..., :2], video[:, 0])
    signal, spread = level(times.view(2, 1, 1, 1, 1))
    noisy = signal * video + spread * noise
    torch.testing.assert_close(x[:, 1:, ..., :2], noisy[:, 1:])
    torch.testing.assert_close(x[1, 1:, ..., :2], noise[1, 1:])  # nothing is left at time 1
    assert torch.equal(x[..., 2], known.float())
    assert (x[0, ..., 3] == 0.25).all()
    assert (x[1, ..., 3] == 1).all()
    with pytest.raises(ShapeError, match="known has the video's shape"):
        compose(video, noise, known[:1], times)


def test_draws_follow_from_seed_and_sample() -> None:
    video = clean()
    x, noise = diffusion_inputs(video, seed=5, samples=(8, 9))
    again, _ = diffusion_inputs(video[1:], seed=5, samples=(9,))
    assert torch.equal(x[1:], again)
    other, _ = diffusion_inputs(video, seed=6, samples=(8, 9))
    assert not torch.equal(x, other)
    assert noise.std() == pytest.approx(1.0, abs=0.1)
    with pytest.raises(ShapeError, match="2 rows, 1 numbers"):
        diffusion_inputs(video, seed=5, samples=(8,))


def test_only_unknown_positions_are_learnt() -> None:
    """A target changed where positions are known leaves loss and gradients as they are."""
    model = build(SIZES, seed=0)
    x, noise = diffusion_inputs(clean(), seed=0, samples=(0, 1), masks=("ends",))
    known = x[..., 2:3] == 1
    loss = model.loss(x, noise)
    assert loss == model.loss(x, torch.where(known, 99.0, noise))
    unknown = int((~known).sum())
    torch.testing.assert_close(loss, model.loss(x, noise, valid_tokens=unknown))
    x[..., 2] = 1
    empty = model.loss(x, noise)
    empty.backward()
    assert empty == 0
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())


def test_every_parameter_has_a_role_and_a_gradient() -> None:
    model = build(SIZES, seed=0)
    x, noise = diffusion_inputs(clean(), seed=0, samples=(0, 1))
    model.loss(x, noise).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    roles = model.parameter_roles()
    hidden = {name.split("body.")[1] for name, role in roles.items() if role == "hidden"}
    assert hidden == {
        "temporal.qkv", "temporal.out", "spatial.qkv", "spatial.out", "mlp.up", "mlp.down"
    }  # fmt: skip
    assert set(roles) == {name for name, _ in model.named_parameters()}
    assert model.parameter_count() == sum(p.numel() for p in model.parameters())


def test_the_model_takes_the_placement_of_the_plan() -> None:
    """Two switches a pair, none of them written in the model."""
    placed = build(replace(SIZES, depth=3, sizes=(8, 16, 16))).placement(4, dim=0)
    names = [one.block.name for one in placed.blocks]
    assert names[:4] == ["patches", "temporal 0", "spatial 0", "mlp 0"]
    for one in placed.blocks:
        if "temporal" in one.block.name:
            assert one.dim != 0
        if "spatial" in one.block.name:
            assert one.dim == 0
    assert placed.switches == 6
    assert placed.strategies == ("",) * len(names)


def test_sampling_with_a_model_that_knows_the_noise_gives_the_video() -> None:
    """And what is known comes through as it is, whatever the model says."""
    video = clean().clamp(-1, 1).double()
    known = torch.zeros(2, 4, 4, 6, dtype=torch.bool)
    known[:, 0] = True
    times = []

    def knowing(x: torch.Tensor, gshard: object) -> torch.Tensor:
        assert torch.equal(x[:, 0, ..., :2], video[:, 0])
        assert torch.equal(x[..., 2], known.double())
        times.append(float(x[0, 0, 0, 0, -1]))
        signal, spread = level(x[..., -1:])
        return (x[..., :2] - signal * video) / spread

    noise = torch.randn(2, 4, 4, 6, 2, dtype=torch.float64)
    for limit in (None, 1.0):
        found = sample(knowing, noise, video=video, known=known, steps=7, limit=limit)
        torch.testing.assert_close(found, video)
    assert times[:7] == pytest.approx([i / 8 for i in range(7, 0, -1)])
    made = sample(build(SIZES, seed=0), torch.zeros(1, 4, 4, 6, 2), steps=2)
    assert made.isfinite().all()
    for wrong in ({"video": video}, {"video": video[:1], "known": known}):
        with pytest.raises(ShapeError):
            sample(knowing, noise, **wrong)
    with pytest.raises(ShapeError, match="without channels"):
        sample(knowing, noise, video=video, known=known[..., :2])
    with pytest.raises(ConfigError, match="at least one step"):
        sample(knowing, noise, steps=0)


def test_a_video_of_other_sizes_runs() -> None:
    model = build(SIZES, seed=0)
    x = torch.zeros(1, 3, 5, 7, 4)
    assert model(x).shape == (1, 3, 5, 7, 2)


def test_bad_sizes_and_inputs_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one dim of space"):
        VDTConfig(sizes=(8,))
    with pytest.raises(ConfigError, match="dsp, ulysses_both"):
        VDTConfig(sizes=(8, 8), strategy="usp")
    for wrong, words in (
        ({"patch": (0, 1)}, r"patch = \(0, 1\)"),
        ({"depth": 0}, "depth = 0"),
        ({"head_dim": 0}, "head_dim = 0"),
        ({"dtype": "bfloat16"}, "it has float32, float64"),
    ):
        with pytest.raises(ConfigError, match=words):
            VDTConfig(**{"sizes": (8, 8)} | wrong)
    with pytest.raises(ShapeError, match="2 of the video, known, time"):
        build(SIZES)(torch.zeros(1, 4, 4, 6, 3))
    with pytest.raises(StrategyError, match="no way 'usp'"):
        FactorisedAttention(8, (0,), head_dim=4)(torch.zeros(1, 2, 2, 8), way="usp")
    with pytest.raises(LayoutError, match="the grid has 2 dims"):
        FactorisedAttention(8, (2,), head_dim=4)(torch.zeros(1, 2, 2, 8))
    with pytest.raises(ConfigError, match="each once"):
        FactorisedAttention(8, (1, 1))
