"""Attention over sets of a grid: every query sees the product of what each dim's rule lets it see.

Sharded before and after: one dim of the grid, for queries, keys, values and outputs.
Moves: forward, keys and values from the first to the last one that a rank's queries see, from
    whoever holds them, in their dtype; backward their gradients return in float32 or wider. With a
    window that is a halo whose width does not depend on the length of the sharded dim.
Saved for backward: q, k and v, and what was fetched. Probabilities are computed again.
Must divide: nothing; shares may be empty, and shorter than the window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor
from torch.autograd import Function

from xdist.comm.checks import checks_are_on, raise_together
from xdist.comm.first_order import first_order
from xdist.cost.neighborhood import key_windows
from xdist.cost.per_dim import PerDim, per_dim
from xdist.errors import NumericsError, ShapeError
from xdist.grid_shard import GridShard, resolve_grid
from xdist.parallel.backend import chosen
from xdist.parallel.neighborhood_parts import Call, Fetch, Stretch, stretches_of
from xdist_kernels import neighborhood as kernels
from xdist_kernels.autocast import without_autocast
from xdist_kernels.errors import KernelError
from xdist_kernels.neighborhood.rules import Near, Rule


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gshard: GridShard | None,
    *,
    window: PerDim,
    dilation: PerDim,
    scale: float | None,
    position_bias: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    """`xdist.neighborhood_attention`; see there."""
    name = "neighborhood_attention"
    dims = check_tensors(name, q, k, v)
    form = form_of(name, backend, q)
    gshard = resolve_grid(gshard, q, dims)
    windows = per_dim(f"{name}: window", window, dims, least=None)
    dilations = per_dim(f"{name}: dilation", dilation, dims, least=None)
    rules = make_rules(name, Near, gshard.sizes, windows, dilations)
    check_bias(name, q, position_bias, [2 * w - 1 for w in windows])
    check_values(name, gshard, q, k, v)
    return attend(q, k, v, gshard, rules, scale, position_bias, form)


def form_of(name: str, backend: str, q: Tensor) -> ModuleType:
    """The kernels that serve a call of the function `name`, which was asked to run on `backend`.

    Raises:
        StrategyError: no such backend, or Triton is forced.
    """
    return kernels.kernels(chosen(name, backend, q, kernels.refusal))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gshard: GridShard,
    rules: Sequence[Rule],
    scale: float | None,
    position_bias: Tensor | None,
    form: ModuleType,
) -> Tensor:
    """Attention by one rule a dim of `gshard`, whose part q, k and v are."""
    for x in (q, k, v):
        gshard.check(x)
    if gshard.size == 1:
        return attend_here(q, k, v, rules, scale, position_bias, form)
    rule, share = rules[gshard.dim], (gshard.start, gshard.stop)
    windows = key_windows(rule, gshard.layout)
    fetch = Fetch(gshard.layout, gshard.group, gshard.dim, windows)
    stretches = stretches_of(rule, share, windows[gshard.rank])
    return _run(q, k, v, rules, fetch, stretches, scale, position_bias, form)


def attend_here(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Sequence[Rule],
    scale: float | None,
    position_bias: Tensor | None,
    form: ModuleType,
) -> Tensor:
    """Attention by one rule a dim of the tensors' own grid, which may be empty; nothing moves."""
    whole = Stretch((0, rules[0].size), (0, rules[0].size), 0, 0, here=True)
    return _run(q, k, v, rules, None, [whole], scale, position_bias, form)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rules: Sequence[Rule],
    fetch: Fetch | None,
    stretches: Sequence[Stretch],
    scale: float | None,
    position_bias: Tensor | None,
    form: ModuleType,
) -> Tensor:
    call = Call(
        fetch,
        tuple(stretches),
        tuple(one.runs(rules, 0 if fetch is None else fetch.dim) for one in stretches),
        q.shape[-1] ** -0.5 if scale is None else float(scale),
        form,
    )
    with without_autocast(q):
        return _Attend.apply(call, q, k, v, position_bias)


class _Attend(Function):
    """(call, q, k, v, bias) -> out.

    While the keys of others travel, the queries that need none of them are served; on the way back
    the gradients of others' keys leave before the rest is worked on.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.call = call
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        pending = None if call.fetch is None else call.fetch.start([k, v])

        def serve(at: int, keys: Tensor, values: Tensor) -> None:
            queries, target = (call.queries(at, x) for x in (q, out))
            call.form.forward(queries, keys, values, bias=bias, out=target, **call.options(at))

        for at in call.numbers(here=True):
            serve(at, call.keys(at, k), call.keys(at, v))
        fetched = []
        if pending is not None:
            whole = pending.wait()
            for at in call.numbers(here=False):
                # Copies of what is read alone: the rest of the window is k and v, kept anyway.
                fetched.append([call.keys(at, x).clone() for x in whole])
                serve(at, *fetched[-1])
        ctx.save_for_backward(q, k, v, bias, *(x for pair in fetched for x in pair))
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, *fetched = ctx.saved_tensors
        call: Call = ctx.call
        found = call.form.zeros(q, call.window_shape(k), call.window_shape(v), bias)

        def serve(at: int, keys: Tensor, values: Tensor) -> None:
            into = found._replace(
                dq=call.queries(at, found.dq),
                dk=call.window_keys(at, found.dk),
                dv=call.window_keys(at, found.dv),
            )
            queries, grads = (call.queries(at, x) for x in (q, dout))
            options = call.options(at)
            call.form.backward(queries, keys, values, grads, bias=bias, into=into, **options)

        for number, at in enumerate(call.numbers(here=False)):
            serve(at, *fetched[2 * number : 2 * number + 2])
        # This rank's own part of the windows does not leave; it is read when the others' arrived.
        pending = None if call.fetch is None else call.fetch.start_back(found, k, v)
        for at in call.numbers(here=True):
            serve(at, call.keys(at, k), call.keys(at, v))
        dk, dv = (found.dk, found.dv) if pending is None else pending.wait()
        dbias = None if found.dbias is None else found.dbias.to(bias.dtype)
        return None, found.dq, dk.to(k.dtype), dv.to(v.dtype), dbias


def check_tensors(name: str, q: Tensor, k: Tensor, v: Tensor) -> int:
    """The number of grid dims, after the checks of shapes, dtypes and devices."""
    dims = q.dim() - 3
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if dims < 1 or k.dim() != q.dim() or v.dim() != q.dim():
        raise ShapeError(
            f"{name} needs q [B,S1..Sk,H,D], k [B,S1..Sk,G,D] and v [B,S1..Sk,G,E]", shapes
        )
    if q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise ShapeError(
            f"{name}: q, k and v do not fit together",
            shapes,
            "they share batch and grid, k and v their heads, q and k their head dim",
        )
    heads, groups = q.shape[-2], k.shape[-2]
    if heads == 0 or groups == 0 or heads % groups:
        raise ShapeError(
            f"{name}: query heads must be a multiple of key heads",
            f"{heads} query heads, {groups} key heads",
        )
    if not q.dtype.is_floating_point or not q.dtype == k.dtype == v.dtype:
        raise ShapeError(
            f"{name}: q, k and v must have one float dtype", f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    if not q.device == k.device == v.device:
        raise ShapeError(
            f"{name}: q, k and v must be on one device", f"{q.device}, {k.device}, {v.device}"
        )
    return dims


def check_values(name: str, gshard: GridShard, *tensors: Tensor) -> None:
    """Inside `xdist.checks()`: refuses NaN and infinity on all ranks when any rank has one."""
    if not checks_are_on():
        return
    raise_together(
        gshard.group,
        not all(bool(x.isfinite().all()) for x in tensors),
        lambda ranks: NumericsError(
            f"{name} got values that are not finite in q, k or v",
            f"on sequence ranks {ranks}",
            "look for the step before this one that made them",
        ),
    )


def check_bias(name: str, q: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> None:
    """Refuses a position bias of another shape or device."""
    if bias is None:
        return
    wanted = (q.shape[-2], *sizes)
    if tuple(bias.shape) != wanted or not bias.dtype.is_floating_point:
        raise ShapeError(
            f"{name}: position_bias is float [H, 2 w - 1 of each dim] = {wanted}",
            f"got {tuple(bias.shape)} of {bias.dtype}",
        )
    if bias.device != q.device:
        raise ShapeError(
            f"{name}: position_bias must be where q is", f"{bias.device} and {q.device}"
        )


def make_rules(
    name: str,
    rule: Callable[..., Rule],
    sizes: Sequence[int],
    *settings: Sequence[int],
) -> list[Rule]:
    """One rule a dim; what it refuses is said with the dim."""
    rules = []
    for dim, arguments in enumerate(zip(sizes, *settings, strict=True)):
        try:
            rules.append(rule(*arguments))
        except KernelError as error:
            raise ShapeError(
                f"{name} cannot serve dim {dim} of the grid {tuple(sizes)}",
                str(error),
                "choose sizes that fit this dim; one a dim may be given",
            ) from error
    return rules
