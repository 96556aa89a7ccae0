"""Causal sliding-window attention over one contiguous run of tokens: the fast CPU path.

    for each head, for each run of query blocks:
        S = c * Q K^T            over the keys each block can see, a strided view of K (no copy)
        P = 2^S                  c holds the scale and log2(e): 2^x is the cheapest exponential
        P = P * edge             only the two triangles at the ends of the window are masked
        O = P V / rowsum(P);     lse = log rowsum(P)
    backward recomputes P and takes dV = P^T dO', dS = P * (dO' V^T - delta'), dQ = c dS K, ...
    with dO' = dO / rowsum(P) and delta' likewise, so that P itself is never normalised.

No maximum is subtracted while Cauchy-Schwarz bounds every |S| by `_SAFE_LOG2`; beyond it, masked
scores become -inf and the exact row maximum (backward: the log-sum-exp) is subtracted. bfloat16
inputs with scores that may pass `_SAFE_BFLOAT16_LOG2` are widened to float32 first.
Shapes: B batch, n queries, p tokens of prefix, H query heads, G key heads, D and E head dims.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from xdist_kernels.errors import KernelError

_LOG2E = math.log2(math.e)
_LN2 = math.log(2.0)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# |S| <= 40 keeps 2^S, its sums over a window and their inverses far inside float32's range.
_SAFE_LOG2 = 40.0
# Beyond 16 a score in bfloat16 would be rounded by up to 2^-4: those inputs are widened instead.
_SAFE_BFLOAT16_LOG2 = 16.0
# Queries per block and scores per run of blocks: measured on Zen 4, one thread (1 MiB of L2).
_BLOCK_TOKENS = 64
_RUN_SCORES = 512 * 1024


@dataclass(frozen=True)
class _Run:
    """`count` query blocks of `rows` queries from `start`; block i sees `columns` keys from
    `key_start + i * rows`. `offset` is the column of the first query's own key."""

    start: int
    count: int
    rows: int
    key_start: int
    columns: int
    offset: int


def window_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window_left: int,
    scale: float | None = None,
    first_visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of query i to keys `max(p + i - window_left, first_visible[i]) .. p + i`.

    q `[B,n,H,D]`, k `[B,p+n,G,D]`, v `[B,p+n,G,E]` (float32, float64 or bfloat16; the first p keys
    are the tokens before the first query). `first_visible` int64 `[n]`: index into k of the first
    key query i may see (document starts, missing prefix); None means no such limit. `scale=None`
    is `D**-0.5`. Returns out `[B,n,H,E]` in q's dtype and lse `[B,n,H]` (natural log) in float32,
    float64 for float64; a query that sees nothing has out 0 and lse -inf. bfloat16 inputs: products
    accumulate in float32, and while scores are small they pass from product to product in bfloat16.
    Working memory is a few MiB whatever n is. Raises KernelError on shapes that do not fit.
    """
    _check(q, k, v, window_left, first_visible)
    factor, safe, compute = factor_of(q, k, scale)
    wide = _wide(q.dtype)
    batch, tokens, heads, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[-1])
    lse = q.new_empty(batch, tokens, heads, dtype=wide)
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    forward_into(q, k, v, out, lse, window_left, factor, safe, first_visible)
    return out, lse


def forward_into(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    window_left: int, factor: float, safe: bool, first_visible: Tensor | None,
) -> None:  # fmt: skip
    """Fills `out` and `lse` from q, k, v in the dtype of products; `safe` as `factor_of` says."""
    wide = lse.dtype
    first = _host_list(first_visible)
    for run in _runs(q.shape[1], k.shape[1] - q.shape[1], window_left):
        edges = _Edges(run, window_left, q)
        for b, h, g in _heads(q, k):
            q_, k_, v_ = _rows(q[b, :, h], run), _keys(k[b, :, g], run), _keys(v[b, :, g], run)
            p_ = _scores(q_, k_, factor)  # [count, rows, columns]
            shift = edges.exponentials(p_, safe, None, first, first_visible)
            sums = p_.sum(-1, dtype=wide)
            # An empty row sums to 0: dividing by infinity instead leaves its output 0.
            whole = sums if first is None else sums.masked_fill(sums == 0, torch.inf)
            torch.div(torch.bmm(p_, v_), whole.unsqueeze(-1), out=_rows(out[b, :, h], run))
            log2 = sums.log2_() if shift is None else sums.log2_().add_(shift)
            torch.mul(log2, _LN2, out=_rows(lse[b, :, h].unsqueeze(-1), run).squeeze(-1))


def window_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    *,
    window_left: int,
    scale: float | None = None,
    first_visible: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `window_attention_forward`, from its inputs, its `out` and `lse`, and `dout`.

    dout `[B,n,H,E]`. Returns dq `[B,n,H,D]` in q's dtype, and dk `[B,p+n,G,D]`, dv `[B,p+n,G,E]`
    in float32 (float64 for float64 inputs): the prefix's part is to be added to its owner's.
    """
    _check(q, k, v, window_left, first_visible)
    factor, safe, compute = factor_of(q, k, scale)
    wide = lse.dtype
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = k.new_zeros(k.shape, dtype=wide)
    dv = v.new_zeros(v.shape, dtype=wide)
    delta = (dout.to(wide) * out.to(wide)).sum(-1)
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    backward_into(q, k, v, lse, delta, dout, dq, dk, dv, window_left, factor, safe, first_visible)
    return dq, dk, dv


def backward_into(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dout: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
    window_left: int, factor: float, safe: bool, first_visible: Tensor | None,
) -> None:  # fmt: skip
    """Fills `dq`, adds to `dk` and `dv`; q, k, v in the dtype of products, `delta` `[B,n,H]`."""
    log2, delta = (lse * _LOG2E).unsqueeze(-1), delta.unsqueeze(-1)
    if safe:
        inverse = torch.exp2(-log2).masked_fill_(log2 == -torch.inf, 0.0)
        dout, delta = dout * inverse, delta * inverse
    dout, delta = dout.to(q.dtype), delta.to(q.dtype)
    first = _host_list(first_visible)
    for run in _runs(q.shape[1], k.shape[1] - q.shape[1], window_left):
        edges = _Edges(run, window_left, q)
        for b, h, g in _heads(q, k):
            q_, k_, v_ = _rows(q[b, :, h], run), _keys(k[b, :, g], run), _keys(v[b, :, g], run)
            do_ = _rows(dout[b, :, h], run)
            p_ = _scores(q_, k_, factor)
            edges.exponentials(p_, safe, _rows(log2[b, :, h], run), first, first_visible)
            _overlap_add(dv[b, :, g], torch.bmm(p_.transpose(1, 2), do_), run, 1.0)
            ds_ = torch.bmm(do_, v_.transpose(1, 2))
            ds_.sub_(_rows(delta[b, :, h], run)).mul_(p_)
            torch.mul(torch.bmm(ds_, k_), factor * _LN2, out=_rows(dq[b, :, h], run))
            _overlap_add(dk[b, :, g], torch.bmm(ds_.transpose(1, 2), q_), run, factor * _LN2)


class _Edges:
    """The two masked corners of a run's blocks, and the exponentials taken under them."""

    def __init__(self, run: _Run, window_left: int, like: Tensor) -> None:
        self.run = run
        column = torch.arange(run.columns, device=like.device)
        row = torch.arange(run.rows, device=like.device).unsqueeze(1)
        last = max(0, run.rows - 1 + run.offset - window_left)  # columns some row is too late for
        self.left = (column[:last] >= row + run.offset - window_left, slice(0, last))
        self.right = (column[run.offset :] <= row + run.offset, slice(run.offset, run.columns))
        self.dtype = like.dtype

    def exponentials(
        self,
        scores: Tensor,
        safe: bool,
        lse: Tensor | None,
        first: list[int] | None,
        first_visible: Tensor | None,
    ) -> Tensor | None:
        """`scores` `[count, rows, columns]` in place to 2^(scores - shift), 0 where not visible.

        The shift is None when safe, else `lse` `[count, rows, 1]`, else the row maximum, which is
        returned as `[count, rows]` in the accumulation dtype.
        """
        masks = [(keep, scores[:, :, part]) for keep, part in (self.left, self.right)]
        masks += [(keep, scores[i]) for i, keep in self._cuts(first, first_visible)]
        if safe:
            scores.exp2_()
            for keep, part in masks:
                part.mul_(keep.to(self.dtype))
            return None
        for keep, part in masks:
            part.masked_fill_(~keep, -torch.inf)
        shift = scores.amax(-1, keepdim=True) if lse is None else lse
        shift = shift.masked_fill(shift == -torch.inf, 0.0)
        scores.sub_(shift).exp2_()
        return None if lse is not None else shift.squeeze(-1)

    def _cuts(
        self, first: list[int] | None, first_visible: Tensor | None
    ) -> Iterator[tuple[int, Tensor]]:
        """Blocks that `first_visible` cuts, with their `[rows, columns]` masks."""
        if first is None or first_visible is None:
            return
        run = self.run
        for i in range(run.count):
            start = run.start + i * run.rows
            key_start = run.key_start + i * run.rows
            if max(first[start : start + run.rows]) > key_start:
                limit = first_visible[start : start + run.rows].unsqueeze(1)
                column = torch.arange(key_start, key_start + run.columns, device=limit.device)
                yield i, column >= limit


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _host_list(first_visible: Tensor | None) -> list[int] | None:
    return None if first_visible is None else first_visible.tolist()


def factor_of(q: Tensor, k: Tensor, scale: float | None) -> tuple[float, bool, torch.dtype]:
    """`scale * log2(e)`; whether no score times it passes `_SAFE_LOG2`; the dtype of products."""
    factor = (q.shape[-1] ** -0.5 if scale is None else scale) * _LOG2E
    if q.numel() == 0 or k.numel() == 0:
        return factor, True, q.dtype
    wide = _wide(q.dtype)
    norms = [torch.linalg.vector_norm(x, dim=-1, dtype=wide).amax() for x in (q, k)]
    bound = float(norms[0] * norms[1]) * abs(factor)
    # A NaN or infinity compares False and takes the careful path, which keeps it visible.
    narrow = q.dtype == torch.bfloat16 and bound <= _SAFE_BFLOAT16_LOG2
    return factor, bound <= _SAFE_LOG2, q.dtype if narrow else wide


def _heads(q: Tensor, k: Tensor) -> Iterator[tuple[int, int, int]]:
    """(batch row, query head, its key head)."""
    per_group = q.shape[2] // k.shape[2] if k.shape[2] else 1
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            yield b, h, h // per_group


def _runs(tokens: int, prefix: int, window_left: int) -> Iterator[_Run]:
    """Query blocks in runs: one alone while its window reaches before the first key, then as many
    together as `_RUN_SCORES` allows, then the shorter last block."""
    rows = _BLOCK_TOKENS
    columns = rows + window_left
    most = max(1, _RUN_SCORES // (rows * columns))
    start = 0
    while start < tokens:
        key_start = prefix + start - window_left
        if key_start < 0 or start + rows > tokens:
            rows_ = min(rows, tokens - start)
            first = max(0, key_start)
            own = prefix + start
            yield _Run(start, 1, rows_, first, own + rows_ - first, own - first)
            start += rows_
        else:
            count = min(most, (tokens - start) // rows)
            yield _Run(start, count, rows, key_start, columns, window_left)
            start += count * rows


def _strided(x: Tensor, start: int, count: int, step: int, length: int) -> Tensor:
    """x `[tokens, width]` as `[count, length, width]`: run i starts at row `start + i * step`."""
    offset = x.storage_offset() + start * x.stride(0)
    return x.as_strided((count, length, x.shape[1]), (step * x.stride(0), *x.stride()), offset)


def _rows(x: Tensor, run: _Run) -> Tensor:
    return _strided(x, run.start, run.count, run.rows, run.rows)


def _keys(x: Tensor, run: _Run) -> Tensor:
    return _strided(x, run.key_start, run.count, run.rows, run.columns)


def _scores(q: Tensor, k: Tensor, factor: float) -> Tensor:
    """`factor * q k^T` `[count, rows, columns]`, the factor applied before any rounding."""
    scores = q.new_empty(q.shape[0], q.shape[1], k.shape[1])
    return torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=factor, out=scores)


def _overlap_add(target: Tensor, blocks: Tensor, run: _Run, factor: float) -> None:
    """Adds `factor * blocks` `[count, columns, width]` to the rows of `target` they stand for.

    Neighbouring blocks overlap in `target`; pieces of `rows` columns never do.
    """
    for start in range(0, run.columns, run.rows):
        length = min(run.rows, run.columns - start)
        piece = _strided(target, run.key_start + start, run.count, run.rows, length)
        piece.add_(blocks[:, start : start + length], alpha=factor)


def _check(q: Tensor, k: Tensor, v: Tensor, window_left: int, first_visible: Tensor | None) -> int:
    """The prefix length, after the checks every kernel makes."""
    prefix = k.shape[1] - q.shape[1]
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise KernelError(f"window attention needs q [B,n,H,D], k [B,m,G,D], v [B,m,G,E]: {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or prefix < 0:
        raise KernelError(f"window attention: q and k do not fit: {shapes}")
    if q.shape[2] and (k.shape[2] == 0 or q.shape[2] % k.shape[2]):
        raise KernelError(f"{q.shape[2]} query heads do not divide into {k.shape[2]} key heads")
    if window_left < 0:
        raise KernelError(f"window_left is {window_left}; it counts keys before the query, from 0")
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in _DTYPES:
        raise KernelError(
            "window attention takes float32, float64 or bfloat16, one for all: "
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        )
    if first_visible is not None and first_visible.shape != (q.shape[1],):
        raise KernelError(
            f"first_visible is {tuple(first_visible.shape)}, one index a query is ({q.shape[1]},)"
        )
    return prefix
