"""Patches of sharded grids: embedding and merging over the borders of shares, law 1 and bytes."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

import xdist
from xdist.cost.conv_nd import patch_bytes, patch_sizes, unpatch_bytes
from xdist.errors import ShapeError
from xdist.nn import PatchEmbed, PatchMerge, patches, unpatches
from xdist.testing import RankPool, count_c10d_bytes, relative_error

# Patches that divide and that do not, straddle borders, leave ranks without any, exceed a dim.
CASES = (
    ((9,), (2,)),
    ((7, 4), (3, 2)),
    ((5, 6, 3), (2, 2, 2)),
    ((2, 5, 3), (1, 3, 5)),
    ((3, 2, 5, 4), (2, 2, 2, 3)),
)


def whole(sizes: tuple[int, ...], channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *sizes, channels, dtype=torch.float64, generator=generator)


def tokens_by_loops(x: Tensor, patch: tuple[int, ...], fill: float) -> Tensor:
    """[B,T1..Tk,p1*..*pk*C], value by value; differentiable."""
    sizes = x.shape[1:-1]
    tokens = []
    for token in product(*(range(n) for n in patch_sizes(sizes, patch))):
        values = []
        for inside in product(*(range(p) for p in patch)):
            at = [t * p + i for t, p, i in zip(token, patch, inside, strict=True)]
            held = all(a < n for a, n in zip(at, sizes, strict=True))
            flat = 0
            for a, n in zip(at, sizes, strict=True):
                flat = flat * n + a
            none = x.new_full((x.shape[0], x.shape[-1]), fill)
            values.append(x.flatten(1, -2)[:, flat] if held else none)
        tokens.append(torch.cat(values, -1))
    return torch.stack(tokens, 1).unflatten(1, patch_sizes(sizes, patch))


def run_cases(fill: float) -> list[str]:
    """On one rank, of every case and sharded dim, there and back: what went wrong."""
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    wrong = []
    for sizes, patch in CASES:
        x = whole(sizes, 2, 0).requires_grad_()
        want = tokens_by_loops(x, patch, fill)
        dtokens = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
        (dx,) = torch.autograd.grad((want * dtokens).sum(), x)
        for dim in range(len(sizes)):
            name = f"{sizes} {patch} dim {dim}"
            gshard = xdist.GridShard(mesh, sizes, dim)
            leaf = gshard.scatter(x.detach()).requires_grad_()
            arguments = (sizes, dim, gshard.size, patch[dim], gshard.rank, 4, 8)
            with xdist.comm.ledger() as moved, count_c10d_bytes() as counted:
                tokens, grid = patches(leaf, gshard, patch, fill)
            said = patch_bytes(*arguments)
            if not moved.sent_bytes == counted.sent_bytes == said.sent_bytes:
                wrong.append(f"{name}: sent {moved.sent_bytes}, formula {said}")
            with xdist.comm.ledger() as moved:
                tokens.backward(grid.scatter(dtokens))
            if moved.sent_bytes != patch_bytes(*arguments, backward=True).sent_bytes:
                wrong.append(f"{name}: sent back {moved.sent_bytes}")
            if not torch.equal(tokens.detach(), grid.scatter(want.detach())):
                wrong.append(f"{name}: other tokens")
            assert leaf.grad is not None
            if not torch.equal(leaf.grad, gshard.scatter(dx)):
                wrong.append(f"{name}: another gradient")
            leaf = tokens.detach().requires_grad_()
            with xdist.comm.ledger() as moved, count_c10d_bytes() as counted:
                again, back = unpatches(leaf, grid, sizes, patch)
            said = unpatch_bytes(*arguments)
            if not moved.sent_bytes == counted.sent_bytes == said.sent_bytes:
                wrong.append(f"{name}: back sent {moved.sent_bytes}, formula {said}")
            if back != gshard or not torch.equal(again.detach(), gshard.scatter(x.detach())):
                wrong.append(f"{name}: not the inverse")
            other = whole(sizes, 2, 2)
            with xdist.comm.ledger() as moved:
                again.backward(gshard.scatter(other))
            if moved.sent_bytes != unpatch_bytes(*arguments, backward=True).sent_bytes:
                wrong.append(f"{name}: back sent back {moved.sent_bytes}")
            assert leaf.grad is not None
            if not torch.equal(leaf.grad, grid.scatter(tokens_by_loops(other, patch, 0))):
                wrong.append(f"{name}: another gradient back")
    return wrong


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_patches_straddle_borders_and_come_back(ranks: int, request: pytest.FixtureRequest) -> None:
    """There and back bit for bit, gradients too; ledger = formula = a second count."""
    if ranks == 1:
        assert run_cases(0.5) == []
        return
    for wrong in request.getfixturevalue(f"pool{ranks}").run(run_cases, 0.5):
        assert wrong == []


def labels_and_sizes() -> list[str]:
    """Integer labels without channels; bytes of grids of other lengths."""
    mesh = xdist.init_mesh(ring=3)
    sizes, patch, wrong = (7, 4), (2, 3), []
    labels = torch.arange(2 * 28).view(2, *sizes)
    want = tokens_by_loops(labels.unsqueeze(-1), patch, -100)
    for dim in (0, 1):
        gshard = xdist.GridShard(mesh, sizes, dim)
        tokens, grid = patches(gshard.scatter(labels), gshard, patch, fill=-100)
        if tokens.dtype != torch.int64 or not torch.equal(tokens, grid.scatter(want)):
            wrong.append(f"dim {dim}: other labels")
    sent = []
    for length in (13, 13 + 6, 13 + 600):
        gshard = xdist.GridShard(mesh, (length, 3), 0)
        with xdist.comm.ledger() as moved:
            tokens, grid = patches(torch.ones(1, *gshard.local_sizes, 2), gshard, 2)
            unpatches(tokens, grid, gshard.sizes, 2)
        sent.append((moved.sent_bytes, moved.received_bytes))
    if not sent[0] == sent[1] == sent[2] != (0, 0):
        wrong.append(f"bytes by length: {sent}")
    return wrong


def test_labels_and_bytes_that_do_not_grow_with_the_length(pool3: RankPool) -> None:
    assert pool3.run(labels_and_sizes) == [[]] * 3


def embed_and_merge(dim: int) -> dict[str, Tensor]:
    """This rank's part of two resolutions one after another, and its parts of all gradients."""
    mesh = xdist.init_mesh(ring=xdist.rank.read_rank().world_size)
    torch.manual_seed(0)
    embed = PatchEmbed(2, 4, (2, 1, 2)).double()
    merge = PatchMerge(4, (2, 2, 2)).double()
    gshard = xdist.GridShard(mesh, (7, 5, 6), dim)
    leaf = gshard.scatter(whole(gshard.sizes, 2, 0)).requires_grad_()
    tokens, fine = embed(leaf, gshard)
    merged, coarse = merge(tokens, fine)
    assert (fine.sizes, coarse.sizes) == ((4, 5, 3), (2, 3, 2))
    merged.backward(coarse.scatter(whole(coarse.sizes, 8, 1)))
    assert leaf.grad is not None
    found = {"out": coarse.gather(merged.detach()), "dx": gshard.gather(leaf.grad)}
    for module in (embed, merge):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            found[f"{type(module).__name__}.{name}"] = parameter.grad
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_embedding_and_merging_equal_one_device(ranks: int, request: pytest.FixtureRequest) -> None:
    """Two resolutions, odd sizes, each dim sharded; outputs and every gradient."""
    one = embed_and_merge(0)
    pool: RankPool = request.getfixturevalue(f"pool{ranks}")
    for dim in range(3):
        found = pool.run(embed_and_merge, dim)
        for name, want in one.items():
            parts = [rank[name] for rank in found]
            apart = "." in name
            got = torch.stack(parts).sum(0) if apart else parts[0]
            assert relative_error(got, want) <= 1e-10, (name, dim)


def test_an_embedding_is_a_convolution_whose_stride_is_its_kernel() -> None:
    embed = PatchEmbed(3, 5, (2, 3)).double()
    x = whole((6, 7), 3, 0)
    tokens, _ = embed(x)
    weight = embed.projection.weight.unflatten(1, (2, 3, 3)).movedim(-1, 1)
    filled = torch.nn.functional.pad(x, (0, 0, 0, 2))
    want = xdist.conv_nd(filled, weight, embed.projection.bias, stride=(2, 3), padding="valid")
    assert relative_error(tokens, want.detach()) <= 1e-12


def test_wrong_patches_are_refused_with_the_numbers() -> None:
    x = torch.zeros(1, 6, 4, 2)
    for call, words in (
        (lambda: patches(x, None, (2, 0)), r"\(2, 0\)"),
        (lambda: patches(x, None, (2, 2, 2, 2)), "a batch and 4 grid dims"),
        (lambda: patches(x.unsqueeze(-1), None, (2, 2)), r"\(1, 6, 4, 2, 1\)"),
        (lambda: unpatches(x, None, (9, 8), 2), r"\(5, 4\) patches of \(2, 2\)"),
        (lambda: unpatches(x, None, (12, 8), 2), "2 channels for 4 positions"),
    ):
        with pytest.raises(ShapeError, match=words):
            call()
