"""Law 1 for every mixer in the registry: any layout and documents equal one rank, in float64."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import xdist
from xdist.nn import MIXERS, build_mixer
from xdist.testing import RankPool, layouts, relative_error

N, DIM = 29, 16
PACKED = (0, 0, 2, 3, 3, 11, 26, N)
LAYOUTS = ("contiguous", "zigzag", "drawn", "uneven", "empty")
SIZES: dict[str, dict[str, Any]] = {
    "attention": {"window": 6},
    "linear": {"feature_map": "hedgehog"},
    "gated_linear": {},
    "lightning": {"layer": 2, "layers": 3},
    "gated_deltanet": {"key_heads": 2, "expand_v": 1.5},
    "mamba2": {"groups": 2, "state_dim": 6},
    "mamba": {"state_dim": 3},
    "sse": {"partitions": 3, "top_k": 2},
}


def mixer_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    options = {} if name == "mamba" else {"head_dim": 4}
    return build_mixer(name, DIM, **options, **SIZES.get(name, {})).double()


def results(name: str, shard: Any) -> dict[str, Tensor]:
    """Output, dx and the gradient of every parameter on this rank."""
    mixer = mixer_of(name)
    generator = torch.Generator().manual_seed(1)
    x, dout = torch.randn(2, 2, N, DIM, generator=generator, dtype=torch.float64)
    x = x[:, shard.positions].requires_grad_()
    out = mixer(x, shard)
    held = dict(mixer.named_parameters())
    dx, *grads = torch.autograd.grad(out, [x, *held.values()], dout[:, shard.positions])
    return {"y": out.detach(), "dx": dx} | dict(zip(held, grads, strict=True))


def run_rank(parts: int) -> dict[tuple[str, str, bool], dict[str, Tensor]]:
    """Every mixer x layout x documents on this rank."""
    mesh = xdist.init_mesh(ring=parts)
    found = {}
    for kind, packed in product(LAYOUTS, (False, True)):
        shard = xdist.SequenceShard(mesh, layouts(N, parts)[kind], PACKED if packed else None)
        for name in MIXERS:
            found[name, kind, packed] = results(name, shard)
    return found


@cache
def one_rank(name: str, packed: bool) -> dict[str, Tensor]:
    layout = xdist.Layout.contiguous(N, 1)
    documents = PACKED if packed else None
    return results(name, xdist.SequenceShard(xdist.init_mesh(), layout, documents))


def check(parts: int, ranks: list[dict[tuple[str, str, bool], dict[str, Tensor]]]) -> None:
    for case in ranks[0]:
        name, kind, packed = case
        layout = layouts(N, parts)[kind]
        for tensor, want in one_rank(name, packed).items():
            each = [rank[case][tensor] for rank in ranks]
            whole = sum(each) if tensor not in ("y", "dx") else torch.full_like(want, torch.nan)
            assert isinstance(whole, Tensor)
            if tensor in ("y", "dx"):
                for rank, part in enumerate(each):
                    whole[:, layout.positions(rank)] = part
            error = relative_error(whole, want)
            assert error <= 1e-10, f"{tensor} of {case} on {parts} ranks is off by {error:.1e}"


def test_every_mixer_equals_one_rank_on_any_layout(
    pool2: RankPool, pool3: RankPool, pool4: RankPool
) -> None:
    """One to four ranks; contiguous, zigzag, drawn, uneven and empty shares; with and without
    packed documents: output, dx and the sum over ranks of every parameter's gradient."""
    check(1, [run_rank(1)])
    for parts, pool in ((2, pool2), (3, pool3), (4, pool4)):
        check(parts, pool.run(run_rank, parts))


def test_a_shard_of_one_rank_is_no_shard() -> None:
    x = torch.randn(2, N, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shard = xdist.SequenceShard(xdist.init_mesh(), xdist.Layout.contiguous(N, 1))
    for name in MIXERS:
        mixer = mixer_of(name)
        assert torch.equal(mixer(x), mixer(x, shard)), name
