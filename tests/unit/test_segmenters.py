"""The volume segmenters against loops over tokens, in float64; their options, roles and errors."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.multirank.segmenter_cases import CONFIGS, SIZES, apart, model_of, volume
from xdist.errors import ConfigError, DataError, ShapeError
from xdist.models.axial import AxialConfig
from xdist.models.mamba_nd import DirectionalScan, MambaNDConfig
from xdist.models.segmenter import Segmenter
from xdist_kernels.selective_scan.reference import selective_scan_reference


def norm(x: Tensor, weight: Tensor) -> Tensor:
    mean = x.square().mean(-1, keepdim=True)
    return x / (mean + 1e-6).sqrt() * weight


def patched(x: Tensor) -> Tensor:
    """[B, 9, 6, 7, C] -> [B, 5, 3, 4, 8 C], zeros behind the last voxels, one patch at a time."""
    found = x.new_zeros(x.shape[0], 5, 3, 4, 8 * x.shape[-1])
    for place in itertools.product(range(5), range(3), range(4)):
        values = []
        for step in itertools.product(range(2), repeat=3):
            at = [2 * p + s for p, s in zip(place, step, strict=True)]
            inside = all(a < n for a, n in zip(at, SIZES, strict=True))
            values.append(x[:, at[0], at[1], at[2]] if inside else torch.zeros_like(x[:, 0, 0, 0]))
        found[:, place[0], place[1], place[2]] = torch.cat(values, -1)
    return found


def convolved(x: Tensor, layer: Any) -> Tensor:
    y = F.conv3d(x.movedim(-1, 1), layer.conv, layer.conv_bias, padding=1, groups=x.shape[-1])
    return y.movedim(1, -1)


def scanned(x: Tensor, layer: DirectionalScan) -> Tensor:
    """f(norm(x)) of a Mamba-ND layer; rows of the dims that its order leaves out."""
    hidden = norm(x, layer.enter.norm.weight)
    u = F.silu(convolved(hidden @ layer.enter.proj.t(), layer))
    y = u * layer.leave.D
    if layer.select is not None:
        for i in range(2):
            y = y + one_way(u, layer, i)
    gate = F.silu(norm(x, layer.leave.norm.weight) @ layer.leave.gate.t())
    return (y * gate) @ layer.leave.out.t()


def one_way(u: Tensor, layer: DirectionalScan, i: int) -> Tensor:
    select = layer.select
    assert select is not None
    rank, states = select.step.shape[2], layer.A_log.shape[2]
    small = u @ select.select.t()
    dt = F.softplus(small[..., i * rank : (i + 1) * rank] @ select.step[i].t() + select.dt_bias[i])
    b, c = (small[..., 2 * rank + (2 * kind + i) * states :][..., :states] for kind in range(2))
    rows = [d for d in range(3) if d not in layer.order]
    order = [0, *(d + 1 for d in (*rows, *layer.order)), 4]
    flat = [x.permute(order).flatten(0, len(rows)).flatten(1, -2) for x in (u, dt, b, c)]
    y, _ = selective_scan_reference(
        flat[0], flat[1], -layer.A_log[i].exp(), flat[2], flat[3], reverse=bool(i)
    )
    y = y.view(u.permute(order).shape)
    return y.permute([order.index(d) for d in range(5)])


def attended(x: Tensor, attention: Any) -> Tensor:
    """Softmax over the line of each token, one line at a time."""
    (dim,), heads = attention.dims, attention.heads
    lines = x.movedim(dim + 1, -2)
    q, k, v = (
        y.unflatten(-1, (heads, -1)).transpose(-3, -2)
        for y in (lines @ attention.qkv.t()).chunk(3, -1)
    )
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    y = (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)
    return (y @ attention.out.t()).movedim(-2, dim + 1)


def branch(x: Tensor, body: nn.Module) -> Tensor:
    if isinstance(body, DirectionalScan):
        return scanned(x, body)
    inner: Any = body.inner
    hidden = norm(x, body.norm.weight)  # type: ignore[union-attr, arg-type]
    if hasattr(inner, "attention"):
        return attended(hidden, inner.attention)
    if hasattr(inner, "conv"):
        return convolved(hidden, inner)
    return F.silu(hidden @ inner.up.t()) @ inner.down.t()


def reference(model: Segmenter, x: Tensor) -> Tensor:
    raw = patched(x)
    h = raw @ model.embedding.t() + model.embedding_bias
    for layer in model.blocks:
        h = h + branch(h, layer.body)
    head = model.head.radial
    h = norm(h, model.head.norm.weight)
    gain, shift = (h @ head.scale.t()).unbind(-1)
    values = raw * gain.exp()[..., None] + shift[..., None]
    phi = torch.exp(-0.5 * ((values[..., None] - head.centres) / head.width) ** 2).flatten(-2)
    hidden = F.silu(h @ head.from_token.t() + phi @ head.from_raw.t() + head.bias)
    logits = (hidden @ head.out.t() + head.out_bias).unflatten(-1, (2, 2, 2, -1))
    whole = logits.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(x.shape[0], 10, 6, 8, -1)
    return whole[:, : SIZES[0], : SIZES[1], : SIZES[2]]


@pytest.mark.parametrize("name", list(CONFIGS))
def test_one_device_is_the_definition(name: str) -> None:
    """Logits, loss and every gradient, with and without recomputing."""
    x, labels = volume(SIZES)
    model = model_of(CONFIGS[name])
    given = x.clone().requires_grad_()
    wanted = reference(model, given)
    loss = F.cross_entropy(wanted.movedim(-1, 1), labels)
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, [given, *named.values()])
    for recompute in (True, False):
        own = x.clone().requires_grad_()
        same = model_of(replace(CONFIGS[name], recompute=recompute))
        assert apart(same(own), wanted) < 1e-10
        found = same.loss(own, labels)
        assert apart(found, loss) < 1e-10
        mine = torch.autograd.grad(found, [own, *same.parameters()])
        errors = {
            label: apart(a, b) for label, a, b in zip(["x", *named], mine, grads, strict=True)
        }
        assert {label: e for label, e in errors.items() if e > 1e-10} == {}


def test_three_layers_scan_six_directions() -> None:
    config = MambaNDConfig(sizes=SIZES, patch=(2, 2, 2))
    assert [config.order(i) for i in range(4)] == [(0, 1, 2), (0, 2, 1), (1, 2, 0), (0, 1, 2)]
    rows = replace(config, scan="rows")
    assert [rows.order(i) for i in range(3)] == [(2,), (1,), (0,)]


def test_without_scans_all_else_stays() -> None:
    """The same parameters but those of the scans."""
    both = {name: model_of(CONFIGS[name]).state_dict() for name in ("raster", "none")}
    gone = {name.rpartition(".")[2] for name in both["raster"].keys() - both["none"].keys()}
    assert gone == {"A_log", "select", "step", "dt_bias"}
    assert both["none"].keys() < both["raster"].keys()


def test_the_stream_is_narrow_where_asked() -> None:
    """In bfloat16 the answers are near, and gradients reach every parameter."""
    x, labels = volume(SIZES)
    wide, narrow = (
        model_of(replace(CONFIGS["raster"], dtype="float32", stream=stream))
        for stream in ("same", "bfloat16")
    )
    assert 0 < apart(narrow(x.float()), wide(x.float())) < 0.05
    narrow.loss(x.float(), labels).backward()
    assert all(p.grad is not None for p in narrow.parameters())


def test_no_labels_no_loss() -> None:
    model = model_of(CONFIGS["none"])
    x, labels = volume(SIZES)
    loss = model.loss(x, torch.full_like(labels, -100))
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_roles_name_what_muon_may_turn() -> None:
    roles = model_of(CONFIGS["raster"]).parameter_roles()
    hidden = {name.rpartition(".")[2] for name, role in roles.items() if role == "hidden"}
    assert hidden == {"proj", "gate", "out", "up", "down", "from_token", "from_raw"}
    assert roles["head.radial.out"] == "other"
    assert roles["layers.0.body.A_log"] == roles["embedding"] == "table"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"scan": "spiral"}, "scan = 'spiral'"),
    ({"kernel": 2}, "kernel = 2"),
    ({"kernel": -1}, "kernel = -1"),
    ({"step_rank": 0}, "step_rank = 0"),
    ({"state_dim": 0}, "state_dim = 0"),
    ({"expand": 0.0}, "0.0 x dim 32 = 0"),
    ({"expand": 1.3}, "1.3 x dim 32 = 41.6"),
    ({"expand": float("nan")}, "expand = nan"),
    ({"stream": "int8"}, "'int8'"),
    ({"low": 5.0}, "from low = 5.0 to high = 4.0"),
    ({"bases": 1}, "bases = 1"),
    ({"head_hidden": 0}, "head_hidden = 0"),
    ({"classes": 0}, "classes = 0"),
    ({"depth": 0}, "depth = 0"),
    ({"channels": 0}, "channels = 0"),
    ({"dim": -32}, "dim = -32"),
    ({"mlp_ratio": 0.0}, "mlp_ratio = 0.0"),
    ({"patch": (2, 0, 2)}, r"patch = \(2, 0, 2\)"),
    ({"sizes": (9, -6, 7)}, r"sizes = \(9, -6, 7\)"),
    ({"dtype": "int8"}, "dtype = 'int8'"),
]


def test_options_that_cannot_be_built_are_refused_by_the_config() -> None:
    """With the number, and where a config sets it; nothing reaches torch."""
    for wrong, words in WRONG:
        with pytest.raises(ConfigError, match=words):
            MambaNDConfig(**{"sizes": SIZES, "patch": (2, 2, 2)} | wrong)
    with pytest.raises(ConfigError, match="kernel = 0") as caught:
        AxialConfig(sizes=SIZES, kernel=0)
    assert caught.value.do == "set model.options.kernel"
    with pytest.raises(ConfigError, match="kernel = 4 has no middle tap"):
        AxialConfig(sizes=SIZES, kernel=4)


def test_labels_that_are_no_classes_are_refused() -> None:
    model = model_of(CONFIGS["none"])
    x, labels = volume(SIZES)
    classes = model.config.classes
    for label, remedy in ((classes, f"with classes = {classes + 1}"), (-1, "renumber them")):
        wrong = labels.clone()
        wrong[0, 2, 1, 3] = label
        with pytest.raises(DataError, match=rf"from {label} to {label}.*\(0, 2, 1, 3\)") as caught:
            model.loss(x, wrong)
        assert caught.value.what.endswith(f"1 of {labels.numel():,} on this rank")
        assert f"from 0 to {classes - 1}" in caught.value.why
        assert remedy in caught.value.do
    labels[labels == -100] = 255
    assert model.loss(x, labels, ignore_index=255).isfinite()


def test_bad_inputs_are_refused() -> None:
    model = model_of(CONFIGS["none"])
    x, labels = volume(SIZES)
    with pytest.raises(ShapeError, match="2 channels"):
        model(x[..., :1])
    with pytest.raises(ShapeError, match="labels do not fit"):
        model.loss(x, labels[:, 1:])
