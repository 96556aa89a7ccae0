"""The kernels of triton.py: rows of logits become their gradients, a loss a row beside them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "ignore_index"])
def short_rows_kernel(
    p_x: tl.tensor, p_label: tl.tensor, p_loss: tl.tensor, T: tl.tensor, V: tl.tensor,
    stride_x: tl.tensor, stride_label: tl.tensor, ignore_index: tl.tensor, weight: tl.tensor,
    BT: tl.constexpr, BV: tl.constexpr,
) -> None:  # fmt: skip
    """Rows that fit into registers: each logit is read once and written once.

        for each BT tokens:                                           in parallel
            x, y = logits, label
            m = max_v x_v;  e_v = exp(x_v - m);  s = sum_v e_v
            loss = log s + m - x_y
            logits = weight * (e_v / s - [v = y])

    Rows with the label ignore_index are not read; their loss and gradient are 0. A label that is
    no column makes both NaN.
    """
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)  # [BT]
    o_v = tl.arange(0, BV)  # [BV]
    m_t = o_t < T
    b_y = tl.load(p_label + o_t * stride_label, mask=m_t, other=0)  # [BT]
    m_kept = m_t & (b_y != ignore_index)
    m_column = (b_y >= 0) & (b_y < V)
    p_row = p_x + o_t * stride_x
    p_block = p_row[:, None] + o_v[None, :]  # [BT, BV]
    m_v = (o_v < V)[None, :]
    b_x = tl.load(p_block, mask=m_kept[:, None] & m_v, other=-float("inf")).to(tl.float32)
    b_xy = tl.load(p_row + b_y, mask=m_kept & m_column, other=float("nan")).to(tl.float32)

    b_m = tl.where(m_kept, tl.max(b_x, 1), 0.0)
    b_e = tl.exp(b_x - b_m[:, None])
    b_s = tl.where(m_kept, tl.sum(b_e, 1), 1.0)
    b_loss = tl.where(m_kept, tl.log(b_s) + (b_m - b_xy), 0.0)
    tl.store(p_loss + o_t, b_loss, mask=m_t)

    b_weight = tl.where(m_column, weight, float("nan"))
    b_one = tl.where(o_v[None, :] == b_y.to(tl.int32)[:, None], 1.0, 0.0)
    b_dx = (b_e * (1.0 / b_s)[:, None] - b_one) * b_weight[:, None]
    b_dx = tl.where(m_kept[:, None], b_dx, 0.0)
    # Other threads of the program may not have read their x_y yet.
    tl.debug_barrier()
    tl.store(p_block, b_dx.to(p_x.dtype.element_ty), mask=m_t[:, None] & m_v)


@triton.jit(do_not_specialize=["ignore_index"])
def long_rows_kernel(
    p_x: tl.tensor, p_label: tl.tensor, p_loss: tl.tensor, V: tl.tensor, even: tl.tensor,
    stride_x: tl.tensor, stride_label: tl.tensor, ignore_index: tl.tensor, weight: tl.tensor,
    BU: tl.constexpr, BL: tl.constexpr, TAIL: tl.constexpr,
) -> None:  # fmt: skip
    """A row a program, read twice: the second time from its end, where the cache still holds it.

        for each token:                                               in parallel
            m, s = [-1e38] * BL, [0] * BL                  each lane its own maximum and sum
            for x in blocks [BU, BL] of the row:
                m' = max(m, max_u x_u);  s = s exp(m - m') + sum_u exp(x_u - m');  m = m'
            one m and one s of those of all lanes
            loss = log s + m - x_y
            for x in blocks of the row, the last one first:
                logits = weight * (exp(x_v - m) / s - [v = y])

    No thread waits for another inside the loops. even: V rounded down to a multiple of 16, so that
    blocks move 16 bytes at a time; TAIL: V is larger than that. Ignored and wrong labels as in
    short_rows_kernel.
    """
    i_t = tl.program_id(0).to(tl.int64)
    o_u = tl.arange(0, BU)[:, None] * BL + tl.arange(0, BL)[None, :]  # [BU, BL]
    o_tail = even + tl.arange(0, 16)  # [16]
    b_y = tl.load(p_label + i_t * stride_label)
    kept = b_y != ignore_index
    # Columns to read: none of an ignored row.
    read = kept.to(tl.int32)
    column = (b_y >= 0) & (b_y < V)
    p_row = p_x + i_t * stride_x
    o_y = b_y.to(tl.int32)
    blocks = tl.cdiv(even, BU * BL)
    b_xy = tl.load(p_row + b_y, mask=kept & column, other=float("nan")).to(tl.float32)

    b_m = tl.full([BL], -1e38, tl.float32)  # [BL]
    b_s = tl.zeros([BL], tl.float32)  # [BL]
    for i in range(blocks * read):
        o_v = i * (BU * BL) + o_u
        b_x = tl.load(p_row + o_v, mask=o_v < even, other=-float("inf")).to(tl.float32)
        b_new = tl.maximum(b_m, tl.max(b_x, 0))
        b_s = b_s * tl.exp(b_m - b_new) + tl.sum(tl.exp(b_x - b_new[None, :]), 0)
        b_m = b_new
    m = tl.max(b_m, 0)
    if TAIL:
        m_tail = o_tail < V
        b_t = tl.load(p_row + o_tail, mask=o_tail < V * read, other=-float("inf")).to(
            tl.float32
        )  # [16]
        m = tl.maximum(m, tl.max(b_t, 0))
    s = tl.sum(b_s * tl.exp(b_m - m), 0)
    if TAIL:
        b_t = tl.exp(b_t - m)
        s += tl.sum(tl.where(m_tail, b_t, 0.0), 0)
    s = tl.where(kept, s, 1.0)
    tl.store(p_loss + i_t, tl.where(kept, tl.log(s) + (m - b_xy), 0.0))

    inverse = 1.0 / s
    weight = tl.where(column, weight, float("nan"))
    # Other threads of the program may not have read x_y yet.
    tl.debug_barrier()
    if TAIL:
        b_dt = (b_t * inverse - tl.where(o_tail == o_y, 1.0, 0.0)) * weight
        b_dt = tl.where(kept, b_dt, 0.0)
        tl.store(p_row + o_tail, b_dt.to(p_x.dtype.element_ty), mask=m_tail)
    for i in range(blocks):
        o_v = (blocks - 1 - i) * (BU * BL) + o_u
        b_x = tl.load(p_row + o_v, mask=o_v < even * read, other=-float("inf")).to(tl.float32)
        b_one = tl.where(o_v == o_y, 1.0, 0.0)
        b_dx = (tl.exp(b_x - m) * inverse - b_one) * weight
        b_dx = tl.where(kept, b_dx, 0.0)
        tl.store(p_row + o_v, b_dx.to(p_x.dtype.element_ty), mask=o_v < even)
