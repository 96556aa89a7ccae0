"""Which blocks of keys a block of queries visits, found on the device, without the host reading it.

Tokens are cut into blocks, FAN blocks make a node. A hull is the range of positions of a block or
of a node.

    for each block:                                         hulls, and those of nodes
        low, high = least and greatest position
    for each block of rows, in parallel:                    the plan of one side
        for WIDE nodes at a time: note the first and last whose hull meets what the rows see
        for each node between them that meets it:
            for its FAN blocks: hit  = any row sees any position of the hull
                                full = every row sees the whole hull
            join runs of hits to the piece before, or begin another

A plan lists, for each block of rows, at most MOST pieces (start, full, partial, stop) of block
numbers: `[full, partial)` need no mask, the others do. Further pieces are joined to the last one,
masked: more work, the same result. Steps a block of rows: n / (BLOCK FAN WIDE) + nodes it meets,
so that 1 Mi tokens in 8 Ki documents cost some ten steps a block and not 16 Ki.

Nothing is assumed of positions: the rows of a block are taken one by one, so a block that holds the
end of one segment and the start of another meets what these see, not all that lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from xdist_kernels.attention.reference import Spans
from xdist_kernels.attention.triton_scores import Arg
from xdist_kernels.launch import Config, launch

T = TypeVar("T")
# Beyond any position; no span reaches it.
FAR = tl.constexpr(2**62)
FAN = 16
WIDE = 1024
MOST = 32


class Plan(NamedTuple):
    """What the blocks of one side visit of the other side.

    visits int32 `[sets, blocks, MOST, 4]`, counts int32 `[sets, blocks]` pieces of each; sets is 1
    where all heads see alike, else the heads. spans int64 `[4, sets, n]`, at int64 `[m]`.
    """

    spans: Tensor
    at: Tensor
    visits: Tensor
    counts: Tensor


class Plans:
    """The plans of one set of spans and key positions, each made when it is first asked for.

    spans four integer `[n]` or `[H, n]`, k_positions integer `[m]`. Forward and backward, and calls
    whose tensors see alike, may share one.
    """

    def __init__(self, spans: Spans, k_positions: Tensor) -> None:
        whole = torch.stack(torch.broadcast_tensors(*spans)).to(torch.int64)
        self.spans = whole.unsqueeze(1) if whole.dim() == 2 else whole
        self.at = k_positions.to(torch.int64).contiguous()
        self._made: dict[Hashable, Any] = {}

    @property
    def prefixed(self) -> Tensor:
        """Whether any query of each set has a prefix, int32 `[sets]`, on the device."""
        _, _, first, last = self.spans
        return self._once("prefixed", lambda: (first < last).any(-1).to(torch.int32))

    def queries(self, rows: int, keys: int) -> Plan:
        """What blocks of `rows` queries visit of blocks of `keys` keys."""
        return self._once(
            ("queries", rows, keys), lambda: plan_queries(self.spans, self.at, rows, keys)
        )

    def keys(self, rows: int, keys: int) -> Plan:
        """What blocks of `keys` keys visit of blocks of `rows` queries."""
        return self._once(("keys", rows, keys), lambda: plan_keys(self.spans, self.at, rows, keys))

    def _once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives. In a CUDA graph it is not kept: replays alone fill it."""
        if name in self._made:
            found: T = self._made[name]
            return found
        made = make()
        if not (self.at.is_cuda and torch.cuda.is_current_stream_capturing()):
            self._made[name] = made
        return made


def plan_queries(spans: Tensor, at: Tensor, rows: int, keys: int) -> Plan:
    """For each block of `rows` queries: the blocks of `keys` keys that any of them sees.

    spans int64 `[4, sets, n]`, at int64 `[m]`, both contiguous.
    """
    _, sets, n = spans.shape
    m = at.shape[0]
    n_rows, n_keys = -(-n // rows), -(-m // keys)
    n_nodes = -(-n_keys // FAN)
    hulls, nodes = at.new_empty(2, n_keys), at.new_empty(2, n_nodes)
    plan = _empty_plan(spans, at, n_rows)
    launch(
        key_hulls_kernel, n_nodes, Config(4, 1), device=at.device,
        p_at=at, p_hulls=hulls, p_nodes=nodes, m=m, n_keys=n_keys, n_nodes=n_nodes,
        KEYS=keys, FAN=FAN,
    )  # fmt: skip
    launch(
        plan_queries_kernel, sets * n_rows, Config(4, 1), device=at.device,
        p_spans=spans, p_hulls=hulls, p_nodes=nodes, p_visits=plan.visits, p_counts=plan.counts,
        n=n, m=m, sets=sets, n_rows=n_rows, n_keys=n_keys, n_nodes=n_nodes,
        ROWS=rows, KEYS=keys, FAN=FAN, WIDE=WIDE, MOST=MOST,
    )  # fmt: skip
    return plan


def plan_keys(spans: Tensor, at: Tensor, rows: int, keys: int) -> Plan:
    """For each block of `keys` keys: the blocks of `rows` queries of which any sees any of them."""
    _, sets, n = spans.shape
    m = at.shape[0]
    n_rows, n_keys = -(-n // rows), -(-m // keys)
    n_nodes = -(-n_rows // FAN)
    hulls, nodes = at.new_empty(8, sets, n_rows), at.new_empty(4, sets, n_nodes)
    plan = _empty_plan(spans, at, n_keys)
    launch(
        query_hulls_kernel, sets * n_nodes, Config(8, 1), device=at.device,
        p_spans=spans, p_hulls=hulls, p_nodes=nodes, n=n, sets=sets, n_rows=n_rows,
        n_nodes=n_nodes, ROWS=rows, FAN=FAN,
    )  # fmt: skip
    launch(
        plan_keys_kernel, sets * n_keys, Config(4, 1), device=at.device,
        p_at=at, p_hulls=hulls, p_nodes=nodes, p_visits=plan.visits, p_counts=plan.counts,
        m=m, sets=sets, n_rows=n_rows, n_keys=n_keys, n_nodes=n_nodes,
        KEYS=keys, FAN=FAN, WIDE=WIDE, MOST=MOST,
    )  # fmt: skip
    return plan


def _empty_plan(spans: Tensor, at: Tensor, blocks: int) -> Plan:
    sets = spans.shape[1]
    visits = at.new_empty(sets, blocks, MOST, 4, dtype=torch.int32)
    return Plan(spans, at, visits, at.new_empty(sets, blocks, dtype=torch.int32))


@triton.jit(do_not_specialize=["m", "n_keys", "n_nodes"])
def key_hulls_kernel(
    p_at: Arg, p_hulls: Arg, p_nodes: Arg, m: Arg, n_keys: Arg, n_nodes: Arg,
    KEYS: tl.constexpr, FAN: tl.constexpr,
) -> None:  # fmt: skip
    """low, high of FAN blocks of keys, hulls `[2, n_keys]`, and of their node `[2, n_nodes]`."""
    i_node = tl.program_id(0)
    o_block = i_node * FAN + tl.arange(0, FAN)
    o_key = o_block[:, None] * KEYS + tl.arange(0, KEYS)[None, :]
    m_key = o_key < m
    b_at = tl.load(p_at + o_key, mask=m_key, other=0)  # [FAN, KEYS]
    b_low = tl.min(tl.where(m_key, b_at, FAR), axis=1)
    b_high = tl.max(tl.where(m_key, b_at, -FAR), axis=1)
    m_block = o_block < n_keys
    tl.store(p_hulls + o_block, b_low, mask=m_block)
    tl.store(p_hulls + n_keys + o_block, b_high, mask=m_block)
    tl.store(p_nodes + i_node, tl.min(b_low, axis=0))
    tl.store(p_nodes + n_nodes + i_node, tl.max(b_high, axis=0))


@triton.jit(do_not_specialize=["n", "sets", "n_rows", "n_nodes"])
def query_hulls_kernel(
    p_spans: Arg, p_hulls: Arg, p_nodes: Arg, n: Arg, sets: Arg, n_rows: Arg, n_nodes: Arg,
    ROWS: tl.constexpr, FAN: tl.constexpr,
) -> None:  # fmt: skip
    """What any row and what every row of FAN blocks of queries sees, own span and prefix.

    hulls `[8, sets, n_rows]`: twice (low, high of any; low, high of every); nodes `[4, sets,
    n_nodes]`: twice (low, high of any). A block that is not complete has no "every".
    """
    i_set = (tl.program_id(0) // n_nodes).to(tl.int64)
    i_node = tl.program_id(0) % n_nodes
    o_block = i_node * FAN + tl.arange(0, FAN)
    o_row = o_block[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    m_row = o_row < n
    m_block = o_block < n_rows
    m_whole = (o_block + 1) * ROWS <= n
    p_hull = p_hulls + i_set * n_rows + o_block
    p_node = p_nodes + i_set * n_nodes + i_node
    for side in tl.static_range(2):
        b_lo, b_hi = _rows_see(p_spans, side, sets, i_set, o_row, m_row, n)  # [FAN, ROWS]
        b_low, b_high = tl.min(b_lo, axis=1), tl.max(b_hi, axis=1)
        to_hull = tl.cast(sets, tl.int64) * n_rows * (4 * side)
        to_next = tl.cast(sets, tl.int64) * n_rows
        tl.store(p_hull + to_hull, b_low, mask=m_block)
        tl.store(p_hull + to_hull + to_next, b_high, mask=m_block)
        b_in_low = tl.where(m_whole, tl.max(b_lo, axis=1), FAR)
        b_in_high = tl.where(m_whole, tl.min(b_hi, axis=1), -FAR)
        tl.store(p_hull + to_hull + 2 * to_next, b_in_low, mask=m_block)
        tl.store(p_hull + to_hull + 3 * to_next, b_in_high, mask=m_block)
        to_node = tl.cast(sets, tl.int64) * n_nodes
        tl.store(p_node + to_node * (2 * side), tl.min(b_low, axis=0))
        tl.store(p_node + to_node * (2 * side + 1), tl.max(b_high, axis=0))


@triton.jit(do_not_specialize=["n", "m", "sets", "n_rows", "n_keys", "n_nodes"])
def plan_queries_kernel(
    p_spans: Arg, p_hulls: Arg, p_nodes: Arg, p_visits: Arg, p_counts: Arg,
    n: Arg, m: Arg, sets: Arg, n_rows: Arg, n_keys: Arg, n_nodes: Arg,
    ROWS: tl.constexpr, KEYS: tl.constexpr, FAN: tl.constexpr, WIDE: tl.constexpr,
    MOST: tl.constexpr,
) -> None:  # fmt: skip
    """The pieces of key blocks of one block of queries; the module's pseudo-code."""
    i_block = tl.program_id(0).to(tl.int64)
    i_set = i_block // n_rows
    o_row = (i_block % n_rows) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < n
    b_lo, b_hi = _rows_see(p_spans, 0, sets, i_set, o_row, m_row, n)  # [ROWS]
    b_plo, b_phi = _rows_see(p_spans, 1, sets, i_set, o_row, m_row, n)
    lo, hi = tl.min(b_lo, axis=0), tl.max(b_hi, axis=0)
    plo, phi = tl.min(b_plo, axis=0), tl.max(b_phi, axis=0)
    p_visit = p_visits + i_block * (4 * MOST)
    count, start, full, partial, stop = 0, 0, 0, 0, 0
    for i_wide in range(0, n_nodes, WIDE):
        o_node = i_wide + tl.arange(0, WIDE)
        b_low = tl.load(p_nodes + o_node, mask=o_node < n_nodes, other=FAR)  # [WIDE]
        b_high = tl.load(p_nodes + n_nodes + o_node, mask=o_node < n_nodes, other=-FAR)
        m_met = _meets(lo, hi, b_low, b_high) | _meets(plo, phi, b_low, b_high)
        first = tl.min(tl.where(m_met, o_node, n_nodes), axis=0)
        last = tl.max(tl.where(m_met, o_node, -1), axis=0)
        for i_node in range(first, last + 1):
            low, high = tl.load(p_nodes + i_node), tl.load(p_nodes + n_nodes + i_node)
            if _meets(lo, hi, low, high) | _meets(plo, phi, low, high):
                o_key = i_node * FAN + tl.arange(0, FAN)
                m_key = o_key < n_keys
                b_l = tl.load(p_hulls + o_key, mask=m_key, other=FAR)[None, :]
                b_h = tl.load(p_hulls + n_keys + o_key, mask=m_key, other=-FAR)[None, :]
                m_hit = _meets(b_lo[:, None], b_hi[:, None], b_l, b_h)  # [ROWS, FAN]
                m_hit = m_hit | _meets(b_plo[:, None], b_phi[:, None], b_l, b_h)
                m_all = _holds(b_lo[:, None], b_hi[:, None], b_l, b_h)
                m_all = m_all | _holds(b_plo[:, None], b_phi[:, None], b_l, b_h)
                m_all = (m_all | (o_row >= n)[:, None]) & ((o_key + 1) * KEYS <= m)[None, :]
                b_hit = tl.max(m_hit.to(tl.int32), axis=0)  # [FAN]
                b_full = tl.min(m_all.to(tl.int32), axis=0)
                count, start, full, partial, stop = _joined(
                    p_visit, b_hit, b_full, o_key, (i_node + 1) * FAN,
                    count, start, full, partial, stop, MOST,
                )  # fmt: skip
    _note(p_visit, count, start, full, partial, stop, start < stop)
    tl.store(p_counts + i_block, tl.where(start < stop, count + 1, 0))


@triton.jit(do_not_specialize=["m", "sets", "n_rows", "n_keys", "n_nodes"])
def plan_keys_kernel(
    p_at: Arg, p_hulls: Arg, p_nodes: Arg, p_visits: Arg, p_counts: Arg,
    m: Arg, sets: Arg, n_rows: Arg, n_keys: Arg, n_nodes: Arg,
    KEYS: tl.constexpr, FAN: tl.constexpr, WIDE: tl.constexpr, MOST: tl.constexpr,
) -> None:  # fmt: skip
    """The pieces of query blocks of one block of keys; the module's pseudo-code, sides swapped."""
    i_block = tl.program_id(0).to(tl.int64)
    i_set = i_block // n_keys
    o_key = (i_block % n_keys) * KEYS + tl.arange(0, KEYS)
    m_key = o_key < m
    b_at = tl.load(p_at + o_key, mask=m_key, other=-FAR)  # [KEYS]: one that is none sees nothing
    low = tl.min(tl.where(m_key, b_at, FAR), axis=0)
    high = tl.max(b_at, axis=0)
    p_visit = p_visits + i_block * (4 * MOST)
    p_node = p_nodes + i_set * n_nodes
    to_node = tl.cast(sets, tl.int64) * n_nodes
    to_hull = tl.cast(sets, tl.int64) * n_rows
    count, start, full, partial, stop = 0, 0, 0, 0, 0
    for i_wide in range(0, n_nodes, WIDE):
        o_node = i_wide + tl.arange(0, WIDE)
        m_node = o_node < n_nodes
        b_lo = tl.load(p_node + o_node, mask=m_node, other=FAR)  # [WIDE]
        b_hi = tl.load(p_node + to_node + o_node, mask=m_node, other=-FAR)
        b_plo = tl.load(p_node + 2 * to_node + o_node, mask=m_node, other=FAR)
        b_phi = tl.load(p_node + 3 * to_node + o_node, mask=m_node, other=-FAR)
        m_met = _meets(b_lo, b_hi, low, high) | _meets(b_plo, b_phi, low, high)
        first = tl.min(tl.where(m_met, o_node, n_nodes), axis=0)
        last = tl.max(tl.where(m_met, o_node, -1), axis=0)
        for i_node in range(first, last + 1):
            lo, hi = tl.load(p_node + i_node), tl.load(p_node + to_node + i_node)
            plo = tl.load(p_node + 2 * to_node + i_node)
            phi = tl.load(p_node + 3 * to_node + i_node)
            if _meets(lo, hi, low, high) | _meets(plo, phi, low, high):
                o_row = i_node * FAN + tl.arange(0, FAN)
                p_hull = p_hulls + i_set * n_rows + o_row
                m_any = _seen_by(p_hull, to_hull, b_at, o_row < n_rows)  # [KEYS, FAN]
                m_any = m_any | _seen_by(p_hull + 4 * to_hull, to_hull, b_at, o_row < n_rows)
                p_hull += 2 * to_hull
                m_all = _seen_by(p_hull, to_hull, b_at, o_row < n_rows)
                m_all = m_all | _seen_by(p_hull + 4 * to_hull, to_hull, b_at, o_row < n_rows)
                m_all = m_all | (o_key >= m)[:, None]
                b_hit = tl.max(m_any.to(tl.int32), axis=0)  # [FAN]
                b_full = tl.min(m_all.to(tl.int32), axis=0) * b_hit
                count, start, full, partial, stop = _joined(
                    p_visit, b_hit, b_full, o_row, (i_node + 1) * FAN,
                    count, start, full, partial, stop, MOST,
                )  # fmt: skip
    _note(p_visit, count, start, full, partial, stop, start < stop)
    tl.store(p_counts + i_block, tl.where(start < stop, count + 1, 0))


@triton.jit
def _rows_see(
    p_spans: Arg,
    side: tl.constexpr,
    sets: Arg,
    i_set: Arg,
    o_row: Arg,
    m_row: Arg,
    n: Arg,
) -> Arg:
    """lo, hi of the rows; a row that is none or sees nothing has FAR, -FAR."""
    n_long = tl.cast(n, tl.int64)
    p_lo = p_spans + (2 * side * sets + i_set) * n_long
    b_lo = tl.load(p_lo + o_row, mask=m_row, other=FAR)
    b_hi = tl.load(p_lo + sets * n_long + o_row, mask=m_row, other=-FAR)
    m_some = b_lo < b_hi
    return tl.where(m_some, b_lo, FAR), tl.where(m_some, b_hi, -FAR)


@triton.jit
def _meets(lo: Arg, hi: Arg, low: Arg, high: Arg) -> Arg:
    """Whether `[lo, hi)` holds any of `[low, high]`."""
    return (lo <= high) & (low < hi)


@triton.jit
def _holds(lo: Arg, hi: Arg, low: Arg, high: Arg) -> Arg:
    """Whether `[lo, hi)` holds all of `[low, high]`."""
    return (lo <= low) & (high < hi)


@triton.jit
def _seen_by(p_lo: Arg, to_hi: Arg, b_at: Arg, m_row: Arg) -> Arg:
    """Bool `[KEYS, FAN]`: positions b_at in the ranges at p_lo and to_hi after it."""
    b_lo = tl.load(p_lo, mask=m_row, other=FAR)[None, :]
    b_hi = tl.load(p_lo + to_hi, mask=m_row, other=-FAR)[None, :]
    return (b_lo <= b_at[:, None]) & (b_at[:, None] < b_hi)


@triton.jit
def _joined(
    p_visit: Arg, b_hit: Arg, b_full: Arg, o_block: Arg, end: Arg,
    count: Arg, start: Arg, full: Arg, partial: Arg, stop: Arg, MOST: tl.constexpr,
) -> Arg:  # fmt: skip
    """The open piece after the blocks o_block, which end before `end`; noted where it closed."""
    a = tl.min(tl.where(b_hit != 0, o_block, end), axis=0)
    while a < end:
        # A piece: partial blocks, full ones, partial ones, up to a gap or the next full one.
        gap = tl.min(tl.where((o_block >= a) & (b_hit == 0), o_block, end), axis=0)
        b = tl.min(tl.where((o_block >= a) & (b_full != 0), o_block, gap), axis=0)
        b = tl.minimum(b, gap)
        c = tl.min(tl.where((o_block >= b) & (b_full == 0), o_block, gap), axis=0)
        c = tl.minimum(c, gap)
        d = tl.min(tl.where((o_block >= c) & (b_full != 0), o_block, gap), axis=0)
        d = tl.minimum(d, gap)
        none_open = full >= partial
        on = (partial == stop) & (a == b)
        joins = (start < stop) & (stop == a) & (none_open | on | (b >= c))
        # The last slot takes all that follows, masked.
        forced = (start < stop) & (joins == 0) & (count == MOST - 1)
        closes = (start < stop) & (joins == 0) & (forced == 0)
        _note(p_visit, count, start, full, partial, stop, closes)
        count = tl.where(closes, count + 1, count)
        keeps = joins & (none_open == 0)
        partial = tl.where(keeps, tl.where(on & (b < c), c, partial), c)
        full = tl.where(keeps, full, b)
        start = tl.where(joins | forced, start, a)
        stop = d
        full, partial = tl.where(forced, d, full), tl.where(forced, d, partial)
        a = tl.min(tl.where((o_block >= d) & (b_hit != 0), o_block, end), axis=0)
    return count, start, full, partial, stop


@triton.jit
def _note(
    p_visit: Arg,
    count: Arg,
    start: Arg,
    full: Arg,
    partial: Arg,
    stop: Arg,
    when: Arg,
) -> None:
    p_piece = p_visit + 4 * count
    tl.store(p_piece, start, mask=when)
    tl.store(p_piece + 1, full, mask=when)
    tl.store(p_piece + 2, partial, mask=when)
    tl.store(p_piece + 3, stop, mask=when)
