"""Prefix attention over one tile of tokens: softmax with one fixed query per head.

    s_i = scale q . k_i,   o_t = sum_{i<=t} e^{s_i} v_i / sum_{i<=t} e^{s_i}

    for every chunk at once:
        m_t = max of s_i,  (u, w)_t = sum of e^{s_i - m_t} (1, v_i)      i <= t inside the chunk
    states before the chunks = the chunks' last sums, added up by a triangular product
    o_t = w / u of (token's sums + state before its chunk), both brought to the larger m

Every exponent is at most 0. Source: Feng et al., "Attention as an RNN" (2024), section 3.
"""

from __future__ import annotations

from torch import Tensor

from xdist_kernels.prefix.chunks import Prepared, before_chunks, to_tokens, totals


def advance(p: Prepared, state: Tensor) -> Tensor:
    """The state [B,H,1,2+V] after the tile."""
    return before_chunks(p, state)[:, :, -1:]


def run(p: Prepared, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [B,T,H,V] in the dtype of v, and the state after the tile."""
    before = before_chunks(p, state)
    out = totals(p, before).out.to(p.v.dtype)
    return to_tokens(out, p.v.shape[1]), before[:, :, -1:]
