"""Mixers are what their papers say: token loops written from the equations, initial values, errors.

Layers that HuggingFace Transformers has too are compared with it in test_hf_mixers.py.
"""

from __future__ import annotations

import ast
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xdist.errors import ConfigError
from xdist.nn import ALIASES, MIXERS, build_mixer
from xdist.nn.hgrn2 import _bounded, lower_bounds
from xdist.nn.rotary import rotate
from xdist.testing import relative_error

DIM, HEADS, HEAD, N = 12, 3, 4, 17


def built(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return build_mixer(name, DIM, head_dim=HEAD, **options).double()


def tokens(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, N, DIM, generator=generator, dtype=torch.float64)


def heads_of(x: Tensor) -> Tensor:
    """[B, n, H x D] -> [B, H, n, D]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def together(y: Tensor) -> Tensor:
    """[B, H, n, D] -> [B, n, H x D]."""
    return y.transpose(1, 2).flatten(2)


def rms(y: Tensor, weight: Tensor | float = 1.0, eps: float = 1e-6) -> Tensor:
    return y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def loop(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """o_t = q_t^T S_t with S_t = diag(decay_t) S_{t-1} + k_t v_t^T; decay [B, H, n, K or 1]."""
    state = v.new_zeros(*q.shape[:2], q.shape[-1], v.shape[-1])
    found = []
    for t in range(q.shape[2]):
        state = decay[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        found.append((q[:, :, t, :, None] * state).sum(2))
    return torch.stack(found, 2)


@pytest.mark.parametrize("feature_map", ["elu", "relu", "hedgehog"])
@pytest.mark.parametrize("normaliser", [True, False])
def test_linear_attention_is_a_ratio_of_sums(feature_map: str, normaliser: bool) -> None:
    mixer = built("linear", feature_map=feature_map, normaliser=normaliser)
    if feature_map == "hedgehog":
        torch.nn.init.normal_(mixer.map_q)
        torch.nn.init.normal_(mixer.map_k)
    x = tokens()

    def features(z: Tensor, of: Tensor | None) -> Tensor:
        if feature_map == "elu":
            return torch.where(z > 0, z + 1, z.exp())
        if feature_map == "relu":
            return z.clamp(min=0)
        assert of is not None
        mapped = z @ of
        return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1)

    q, k, v = (heads_of(part) for part in (x @ mixer.qkv.T).chunk(3, -1))
    q = features(q, getattr(mixer, "map_q", None))
    k = features(k, getattr(mixer, "map_k", None))
    weights = (q @ k.mT).tril()
    y = weights @ v
    if normaliser:
        y = y / (weights.sum(-1, keepdim=True) + 1e-6)
    assert relative_error(mixer(x), together(y) @ mixer.out.T) < 1e-12


def test_hedgehog_starts_as_the_identity_and_relu_survives_an_empty_row() -> None:
    mixer = built("linear", feature_map="hedgehog")
    assert torch.equal(mixer.map_q[1], torch.eye(HEAD, dtype=torch.float64))
    relu = built("linear", feature_map="relu")
    with torch.no_grad():
        relu.qkv[: HEADS * HEAD] = 0.0
    assert torch.equal(relu(tokens()), torch.zeros(2, N, DIM, dtype=torch.float64))


def test_retention_decays_by_position_and_turns_pairs() -> None:
    mixer = built("retention")
    x = tokens()
    # Exact in float32, too.
    gammas = [1 - 2.0 ** (-5 - head) for head in range(HEADS)]
    assert torch.allclose(mixer.log_decay(x).exp(), torch.tensor(gammas).double(), rtol=1e-15)
    q, k, v = (x @ mixer.qkv.T).split([HEADS * HEAD, HEADS * HEAD, 2 * HEADS * HEAD], -1)
    # A pair turned by position t is a complex number times exp(i t rate).
    rates = torch.tensor([1.0, 1e-4], dtype=torch.float64)
    turn = torch.polar(torch.ones(N, 2).double(), torch.arange(N)[:, None] * rates)

    def turned(z: Tensor) -> Tensor:
        pairs = torch.view_as_complex(z.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    apart = torch.arange(N)[:, None] - torch.arange(N)
    decay = torch.stack([torch.tensor(g).double() ** apart.clamp(min=0) for g in gammas])
    scores = turned(heads_of(q)) @ turned(heads_of(k)).mT * HEAD**-0.5
    y = together(rms((scores * decay).tril() @ heads_of(v)))
    want = (y * F.silu(x @ mixer.gate.T)) @ mixer.out.T
    assert relative_error(mixer(x), want) < 1e-12
    assert torch.equal(rotate(x[:, :, None], torch.zeros(N)), x[:, :, None])


def test_gla_has_a_low_rank_gate_of_temperature_16() -> None:
    mixer = built("gla")
    torch.nn.init.normal_(mixer.gate_bias)
    x = tokens()
    q, k, v = (x @ mixer.qkv.T).split([HEADS * 2, HEADS * 2, HEADS * HEAD], -1)
    alpha = (x @ mixer.gate_down.T @ mixer.gate_up.T + mixer.gate_bias).sigmoid() ** (1 / 16)
    y = loop(heads_of(q) * 2**-0.5, heads_of(k), heads_of(v), heads_of(alpha))
    y = together(rms(y, mixer.norm.weight)) * F.silu(x @ mixer.gate.T)
    assert relative_error(mixer(x), y @ mixer.out.T) < 1e-12
    assert mixer.gate_down.shape == (16, DIM)


@pytest.mark.parametrize("learned", [False, True])
def test_hgrn2_ties_the_input_gate_to_the_forget_gate(learned: bool) -> None:
    mixer = built("hgrn2", lower_bound=0.3)
    x = tokens()
    bound = torch.linspace(0, 0.9, DIM).double()
    low = bound if learned else 0.3
    q, raw, v = (x @ mixer.qfi.T).chunk(3, -1)
    f = low + (1 - low) * raw.sigmoid()
    y = loop(heads_of(F.silu(q)), heads_of(1 - f), heads_of(v), heads_of(f))
    want = rms(together(y), mixer.norm.weight) @ mixer.out.T
    given = {"lower_bound": bound} if learned else {}
    assert relative_error(mixer(x, **given), want) < 1e-12
    bounds = lower_bounds(torch.randn(4, DIM))
    assert torch.equal(bounds[0], torch.zeros(DIM))
    assert bool((bounds.diff(dim=0) > 0).all())
    assert float(bounds.max()) < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hgrn2_with_the_lowest_layers_bound_is_finite(dtype: torch.dtype) -> None:
    """The learned bound of layer 0 is 0: any gate gives what no bound gives, with gradients."""
    mixer = built("hgrn2").to(dtype)
    with torch.no_grad():
        mixer.qfi[HEADS * HEAD : 2 * HEADS * HEAD].mul_(3000.0)
    x = tokens().to(dtype)
    found = []
    for layer in (None, 0, 2):
        gamma = torch.zeros(3, DIM, dtype=dtype, requires_grad=True)
        given = {} if layer is None else {"lower_bound": lower_bounds(gamma)[layer]}
        y = mixer(x, **given)
        grads = torch.autograd.grad(
            y.square().sum(), [*mixer.parameters(), gamma], allow_unused=True
        )
        assert all(bool(g.isfinite().all()) for g in (y, *grads) if g is not None)
        found.append([y, *grads[:-1]])
    assert all(torch.equal(a, b) for a, b in zip(*found[:2], strict=True))


@pytest.mark.parametrize("low", [0.0, 1e-300, 1e-3, 0.9])
def test_hgrn2s_gradient_of_a_bound(low: float) -> None:
    """Of a bound of 0 too, against the formula."""
    raw = torch.linspace(-12, 12, 49).double().requires_grad_()
    bound = torch.full_like(raw, low).requires_grad_()
    found = torch.autograd.grad(_bounded(raw, bound).sum(), (raw, bound))
    f = raw.sigmoid()
    wanted = torch.autograd.grad(torch.log(bound + (1 - bound) * f).sum(), (raw, bound))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"negative_eigenvalues": True, "output_gate": True}])
def test_deltanet_overwrites_what_a_key_holds(options: dict[str, bool]) -> None:
    mixer = built("deltanet", **options)
    x = tokens()
    u = F.pad(x @ mixer.qkv.T, (0, 0, 3, 0))
    convolved = F.silu(sum(u[:, w : w + N] * mixer.conv[:, w] for w in range(4)))
    q, k, v = (heads_of(part) for part in convolved.chunk(3, -1))
    q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
    reach = 2.0 if options else 1.0
    beta = reach * heads_of((x @ mixer.beta.T).sigmoid())
    state = v.new_zeros(2, HEADS, HEAD, HEAD)
    found = []
    for t in range(N):
        held = (k[:, :, t, :, None] * state).sum(2)
        write = beta[:, :, t] * (v[:, :, t] - held)
        state = state + k[:, :, t, :, None] * write[:, :, None]
        found.append(HEAD**-0.5 * (q[:, :, t, :, None] * state).sum(2))
    y = together(rms(torch.stack(found, 2), mixer.norm.weight))
    if options:
        y = y * F.silu(x @ mixer.gate.T)
    assert relative_error(mixer(x), y @ mixer.out.T) < 1e-12


def expanded(mixer: Any, x: Tensor) -> Tensor:
    """Sparse state expansion, one partition after the other, each on the tokens routed to it."""
    q, k, v = (heads_of(part) for part in (x @ mixer.qkv.T).chunk(3, -1))
    down = (x @ mixer.extra_down.T).chunk(2, -1)
    more = [heads_of(part @ up.T) for part, up in zip(down, mixer.extra_up, strict=True)]
    gates = (x @ mixer.gate_down.T).chunk(len(mixer.gate_up), -1)
    alphas = [
        heads_of((part @ up.T + bias).sigmoid() ** (1 / 16))
        for part, up, bias in zip(gates, mixer.gate_up, mixer.gate_bias, strict=True)
    ]
    shares = (x @ mixer.route.T).softmax(-1)
    lowest = shares.sort(-1, descending=True).values[..., mixer.top_k - 1 : mixer.top_k]
    out = torch.zeros_like(q)
    for i in range(mixer.partitions):
        for row in range(x.shape[0]):
            mine = (shares[row, :, i] >= lowest[row, :, 0]).nonzero().flatten()
            p = shares[row, mine, i][:, None]
            part = [z[row : row + 1, :, mine] for z in (q + more[0], k + more[1], v, alphas[0])]
            y = loop(F.silu(part[0]) * p, part[1].softmax(-1) * p, F.silu(part[2]), part[3])
            out[row, :, mine] += y[0]
    if mixer.shared:
        out = out + loop(F.silu(q), k.softmax(-1), F.silu(v), alphas[1])
    y = together(rms(out * HEAD**-0.5, mixer.norm.weight))
    return y * F.silu(x @ mixer.out_down.T @ mixer.out_up.T) @ mixer.out.T


@pytest.mark.parametrize(("top_k", "shared"), [(1, True), (2, True), (2, False), (4, True)])
def test_sparse_state_expansion_is_a_memory_a_partition(top_k: int, shared: bool) -> None:
    """Each partition is a gated linear attention over the tokens routed to it alone; top_k = 4 of
    4 is the dense form, in which every token goes to every partition."""
    mixer = built("sse", partitions=4, top_k=top_k, shared=shared)
    x = tokens()
    assert relative_error(mixer(x), expanded(mixer, x)) < 1e-12
    shares, used = mixer.routing(x)
    assert torch.equal(used.sum(-1), torch.full((2, N), float(top_k)).double())
    assert torch.equal(shares > 0, used > 0)


def test_prefix_attention_asks_one_learned_query() -> None:
    mixer = built("prefix")
    x = tokens()
    k, v = (heads_of(part) for part in (x @ mixer.kv.T).chunk(2, -1))
    scores = HEAD**-0.5 * torch.einsum("hd,bhnd->bhn", mixer.query, k)
    hidden = torch.full((N, N), -math.inf).triu(1)
    weights = (scores[:, :, None] + hidden).softmax(-1)
    assert relative_error(mixer(x), together(weights @ v) @ mixer.out.T) < 1e-12


def test_initial_decays_are_those_published() -> None:
    for name in ("mamba2", "gated_deltanet", "kda", "mamba"):
        mixer: Any = build_mixer(name, 64)
        steps = F.softplus(mixer.dt_bias.detach())
        assert 0.9e-4 < float(steps.min()) <= float(steps.max()) < 0.101, name
        rates = mixer.A_log.detach().exp()
        assert 0.99 < float(rates.min()) <= float(rates.max()) < 16.01, name
    # The last of them is Mamba, whose channels all start as 1..N.
    assert torch.allclose(rates, torch.arange(1.0, 17.0).expand(128, 16))
    assert torch.equal(mixer.D, torch.ones(128))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_mixer_is_finite_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    for name in MIXERS:
        torch.manual_seed(0)
        mixer = build_mixer(name, 64).to(dtype)
        x = torch.randn(1, 70, 64).to(dtype).requires_grad_()
        y = mixer(x)
        held = [x, *mixer.parameters()]
        grads = torch.autograd.grad(y.float().square().mean(), held)
        assert y.shape == x.shape, name
        assert y.dtype == dtype, name
        assert all(bool(grad.isfinite().all()) for grad in (y, *grads)), name
        exact = build_mixer(name, 64).double()
        exact.load_state_dict(mixer.state_dict())
        bound = 1e-4 if dtype == torch.float32 else 0.1
        assert relative_error(y, exact(x.detach().double())) < bound, name


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_runs_under_autocast(name: str) -> None:
    options = {} if name == "mamba" else {"head_dim": HEAD}
    torch.manual_seed(0)
    mixer = build_mixer(name, DIM, **options)
    x = tokens().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Parameters and x are float32, products bfloat16: what is made of them must agree.
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    grads = [p.grad for p in mixer.parameters()]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads)
    with torch.no_grad():
        wanted = mixer(x)
    # bfloat16 holds 8 bits; a product of three of them, normed.
    assert relative_error(y.float(), wanted) < 0.1


def test_aliases_and_errors_of_the_registry() -> None:
    for alias, name in ALIASES.items():
        assert type(build_mixer(alias, 64)) is MIXERS[name]
    with pytest.raises(ConfigError, match="its options are head_dim, heads, expand_k"):
        build_mixer("gla", 64, expand=2)
    for name in set(MIXERS) - {"mamba", "mamba2"}:
        with pytest.raises(ConfigError, match=rf"{name}.*\n.*33 = 1 x head_dim 32 \+ 1"):
            build_mixer(name, 33)
    with pytest.raises(ConfigError, match=r"128 = 5 x head_dim 24 \+ 8"):
        build_mixer("mamba2", 64, head_dim=24)
    with pytest.raises(ConfigError, match="2 value heads over 3 key heads"):
        build_mixer("gated_deltanet", 64, key_heads=3)
    with pytest.raises(ConfigError, match=r"head_dim 32 x 0\.3 = 9\.6"):
        build_mixer("gla", 64, expand_k=0.3)
    with pytest.raises(ConfigError, match="top_k is 5 of 4"):
        build_mixer("sse", 64, top_k=5)
    with pytest.raises(ConfigError, match="lower_bound 1 is outside"):
        build_mixer("hgrn2", 64, lower_bound=1.0)
    with pytest.raises(ConfigError, match="feature maps are elu, relu, hedgehog"):
        build_mixer("linear", 64, feature_map="cos")
    with pytest.raises(ConfigError, match="head_dim 5 is odd"):
        build_mixer("retention", 10, head_dim=5)
    with pytest.raises(ConfigError, match="4 of 4, from 0"):
        build_mixer("lightning", 64, layer=4, layers=4)


def test_mixers_move_tokens_through_public_functions_alone() -> None:
    """A mixer's file imports of xdist only ops, masks, errors and other layers."""
    for name, kind in MIXERS.items():
        source = Path(inspect.getfile(kind)).read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("xdist"):
                module = node.module or ""
                allowed = module in ("xdist", "xdist.errors", "xdist.mask")
                assert allowed or module.startswith("xdist.nn"), f"{name} imports {module}"
                if module == "xdist":
                    assert [alias.name for alias in node.names] == ["ops"], name
