"""The page "add a recurrence", followed: its op, outside the package, passes law 1 on ranks."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import xdist
from xdist.errors import ConfigError
from xdist.testing import RankPool, layouts, relative_error

PAGE = Path(__file__).resolve().parents[2] / "docs" / "add_a_recurrence.md"
N = 150  # several tiles of the page's op on a rank
CUTS = (0, 0, 40, 41, 41, 110, N)


def scripts() -> list[str]:
    """The page's Python blocks: the op, and the script that shows that it is exact."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page's op, saved where a user would save it."""
    path = tmp_path_factory.mktemp("own") / "gate.py"
    path.write_text(scripts()[0], encoding="utf-8")
    return str(path)


def load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("gate", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def draw() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = (2, N, 3, 4)
    return {
        "x": normal(*shape),
        "g": -0.1 * torch.rand(shape, generator=generator, dtype=torch.float64),
        "initial_state": normal(2, len(CUTS) - 1, 3, 4, 1),
        "dout": normal(*shape),
        "dfinal": normal(2, len(CUTS) - 1, 3, 4, 1),
    }


def loop(packed: bool) -> dict[str, Tensor]:
    """A loop over tokens, document by document."""
    drawn = draw()
    dout, dfinal = drawn.pop("dout"), drawn.pop("dfinal")
    cuts = CUTS if packed else (0, N)
    if not packed:
        drawn["initial_state"], dfinal = drawn["initial_state"][:, 0], dfinal[:, 0]
    leaves = {name: t.requires_grad_() for name, t in drawn.items()}
    states = leaves["initial_state"] if packed else leaves["initial_state"][:, None]
    outs, finals = [], []
    for number in range(len(cuts) - 1):
        h = states[:, number, ..., 0]
        for t in range(cuts[number], cuts[number + 1]):
            h = leaves["g"][:, t].exp() * h + leaves["x"][:, t]
            outs.append(h)
        finals.append(h[..., None])
    out, final = torch.stack(outs, 1), torch.stack(finals, 1)
    final = final if packed else final[:, 0]
    loss = (out * dout).sum() + (final * dfinal).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, "final": final, **{f"d{k}": g for k, g in zip(leaves, grads, strict=True)}}


def on_a_rank(path: str, cases: list[tuple]) -> list[dict[str, Tensor]]:
    gate = load(path).gate
    found = []
    for segments, packed, strategy, algorithm in cases:
        mesh = xdist.init_mesh(ring=len(segments))
        layout = xdist.Layout.from_segments(N, segments)
        shard = xdist.SequenceShard(mesh, layout, CUTS if packed else None)
        drawn = draw()
        if not packed:
            drawn["initial_state"], drawn["dfinal"] = (
                drawn[name][:, 0] for name in ("initial_state", "dfinal")
            )
        x, g, dout = (drawn[name][:, shard.positions] for name in ("x", "g", "dout"))
        leaves = [t.requires_grad_() for t in (x, g, drawn["initial_state"])]
        out, final = gate(
            *leaves[:2], shard, initial_state=leaves[2], output_final_state=True,
            strategy=strategy, algorithm=algorithm,
        )  # fmt: skip
        loss = (out * dout).sum() + (final * drawn["dfinal"]).sum() / layout.parts
        grads = torch.autograd.grad(loss, leaves)
        names = ("out", "final", "dx", "dg", "dinitial_state")
        tensors = (out.detach(), final.detach(), *grads)
        found.append(dict(zip(names, tensors, strict=True)))
    return found


def check(path: str, parts: int, pool: RankPool | None) -> None:
    kinds = [[layout.segments(r) for r in range(parts)] for layout in layouts(N, parts).values()]
    ways = (("scan", "gather"), ("scan", "chain"), ("scan", "pipelined"), ("switch", "auto"))
    cases = [(kind, packed, *way) for kind, packed, way in product(kinds, (False, True), ways)]
    ranks = [on_a_rank(path, cases)] if pool is None else pool.run(on_a_rank, path, cases)
    wanted = {packed: loop(packed) for packed in (False, True)}
    for number, (segments, packed, *_) in enumerate(cases):
        layout = xdist.Layout.from_segments(N, segments)
        own = [one[number] for one in ranks]
        for name, want in wanted[packed].items():
            if name == "final":
                found = own[0][name]
            elif name == "dinitial_state":
                found = sum(one[name] for one in own)
            else:
                found = torch.full_like(want, torch.nan)
                for rank, one in enumerate(own):
                    found[:, layout.positions(rank)] = one[name]
            assert relative_error(found, want.detach()) < 1e-10, (name, cases[number])


def test_the_page_defines_an_op_in_under_sixty_lines() -> None:
    lines = [line for line in scripts()[0].splitlines() if line.strip()]
    assert len(lines) < 60
    assert not any(word in scripts()[0] for word in ("rank", "torch.distributed", "group"))


def test_law_1_of_the_op_on_one_to_four_ranks(
    module: str, pool2: RankPool, pool3: RankPool, pool4: RankPool
) -> None:
    for parts, pool in ((1, None), (2, pool2), (3, pool3), (4, pool4)):
        check(module, parts, pool)


def test_the_script_of_the_page_runs(module: str) -> None:
    script = Path(module).with_name("show.py")
    script.write_text(scripts()[1], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    error = float(re.findall(r"tensor\(([-\d.e]+)", done.stdout)[0])
    assert error < 1e-12


class InPlace(xdist.Recurrence):
    """Sums of x [B, n, H, D], made in the state itself."""

    transition = "none"

    def state_shape(self, inputs: Any) -> tuple[int, int, int, int]:
        batch, _, heads, dim = inputs[0].shape
        return batch, heads, 1, dim

    def transition_of(self, tile: Any) -> None:
        return None

    def run(self, tile: Any, state: Tensor) -> tuple[Tensor, Tensor]:
        outs = [state.add_(x[:, :, None])[:, :, 0].clone() for x in tile[0].unbind(1)]
        return torch.stack(outs, 1), state


def test_a_state_changed_in_place_is_an_error() -> None:
    """Other documents start from the same tensor; where no version tells, the state is a copy."""
    x, cuts = torch.ones(1, 6, 1, 1), [0, 3, 6]
    shard = xdist.SequenceShard(xdist.Mesh.one_rank(), xdist.Layout.contiguous(6, 1), cuts)
    with pytest.raises(ConfigError, match=r"InPlace changed the state .* in place\n.*\n.*clone"):
        xdist.recurrence(InPlace(), x, shard=shard)
    with torch.inference_mode():
        sums = xdist.recurrence(InPlace(), x.clone(), shard=shard)
    assert sums.flatten().tolist() == [1, 2, 3, 1, 2, 3]
