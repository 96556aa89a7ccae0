"""Attention over sets of a grid: neighbourhoods, blocks, strided sets and single dims.

q `[B, S1..Sk, H, D]`, k `[B, S1..Sk, G, D]`, v `[B, S1..Sk, G, E]`: this rank's part of a grid of
any number of dims; one dim is sharded (`xdist.GridShard`), and which one does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xdist.grid_shard import GridShard
from xdist.mask import Mask
from xdist.ops.graph_break import graph_break
from xdist.parallel import grid_windows
from xdist.parallel import neighborhood as neighborhood_parallel


@graph_break
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gshard: GridShard | None = None,
    *,
    window: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    scale: float | None = None,
    position_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every position to the window of positions around it.

    Along each dim a query sees exactly `window` keys: those of its residue class modulo `dilation`
    that lie nearest to it. At the borders the window is pushed inside.

    Args:
        q: `[B, S1..Sk, H, D]`, this rank's queries, any float dtype.
        k: `[B, S1..Sk, G, D]`, the dtype of q; H is a multiple of G.
        v: `[B, S1..Sk, G, E]`, the dtype of q.
        gshard: where this rank's part lies; None is one device.
        window: odd, one for all dims or one a dim. 1 is no attention along that dim.
        dilation: distance between neighbours in the window, one for all dims or one a dim.
        scale: None is `D ** -0.5`.
        position_bias: `[H, 2 w1 - 1, ..., 2 wk - 1]`, added to a score at (key - query) / dilation,
            counted from the middle; held whole, its gradient is this rank's part.
        backend: "auto", "torch" or "reference" (float64, slow); there is no Triton kernel.

    Returns:
        `[B, S1..Sk, H, E]` in the dtype of q. Scores and sums are float32, float64 for float64.

    Moves, forward: along the sharded dim at most (window - 1) x dilation positions of k and v on
    either side of a share, whatever its length; backward their gradients in float32 (float64 for
    float64). Formula: `xdist.cost.neighborhood.neighborhood_bytes`. Saved for backward: q, k,
    v and what was fetched; probabilities are computed again, a tile at a time.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together or with the shard; an even
            window; a window x dilation that exceeds a dim.
        StrategyError: an unknown backend, or a forced one that cannot serve (all functions here).
        NumericsError: inside `xdist.checks()`, inputs that are not finite (all functions here).

    Source: Hassani & Shi, "Dilated Neighborhood Attention Transformer" (2022), section 3; Hassani
    et al., "Neighborhood Attention Transformer" (2023), equations 1 to 3.
    """
    return neighborhood_parallel.neighborhood_attention(
        q,
        k,
        v,
        gshard,
        window=window,
        dilation=dilation,
        scale=scale,
        position_bias=position_bias,
        backend=backend,
    )


@graph_break
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gshard: GridShard | None = None,
    *,
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    scale: float | None = None,
    position_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention inside blocks of `window` positions (Swin; MaxViT's block attention).

    Along each dim blocks start at shift, shift + window, ...; the first and the last one hold what
    is left. That is the cyclic shift with its mask, without the detour: tokens that only the roll
    brings together do not see each other. Grids that blocks do not divide have smaller blocks at
    their ends; nothing is padded.

    Args:
        q, k, v, gshard, scale, backend: as in `neighborhood_attention`.
        window: from 1, one for all dims or one a dim; larger than a dim, it is that dim.
        shift: from 0 and below window, one for all dims or one a dim; Swin alternates 0 and
            window // 2.
        position_bias: `[H, 2 w1 - 1, ..., 2 wk - 1]`, added to a score at key - query, counted from
            the middle (Swin's relative position bias); its gradient is this rank's part.

    Returns:
        `[B, S1..Sk, H, E]` in the dtype of q. Scores and sums are float32, float64 for float64.

    Moves, forward: k and v of the rest of the blocks that a share cuts, at most window - 1
    positions on either side; backward their gradients in float32 (float64 for float64). Formula:
    `xdist.cost.neighborhood.window_attention_bytes`.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together or with the shard; a window
            below 1 or a shift outside [0, window).

    Source: Liu et al., "Swin Transformer" (2021), section 3.2; Tu et al., "MaxViT" (2022), 3.2.
    """
    return grid_windows.window_attention(
        q,
        k,
        v,
        gshard,
        window=window,
        shift=shift,
        scale=scale,
        position_bias=position_bias,
        backend=backend,
    )


@graph_break
def grid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gshard: GridShard | None = None,
    *,
    grid: int | Sequence[int],
    scale: float | None = None,
    position_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention inside sets of `grid` positions that are spread over each whole dim (MaxViT).

    Along a dim of n positions, those of one set lie ceil(n / grid) apart; where that does not
    divide n, some sets hold one position fewer. Nothing is padded.

    Args:
        q, k, v, gshard, scale, backend: as in `neighborhood_attention`.
        grid: positions of a set, one for all dims or one a dim.
        position_bias: `[H, 2 g1 - 1, ..., 2 gk - 1]`, added to a score at the number of positions
            of the set from query to key, counted from the middle; its gradient is this rank's part.

    Returns:
        `[B, S1..Sk, H, E]` in the dtype of q. Scores and sums are float32, float64 for float64.

    Moves, forward: q, k and v so that each rank holds whole sets, and the output back (relayout;
    (P-1)/P of a local tensor where sets and shares are even); backward the same. A layer that deals
    its input in place of q, k and v moves half of it (`xdist.nn.GridAttention`). Formula:
    `xdist.cost.neighborhood.grid_attention_bytes`.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together or with the shard; a grid
            below 1.

    Source: Tu et al., "MaxViT" (2022), section 3.2.
    """
    return grid_windows.grid_attention(
        q, k, v, gshard, grid=grid, scale=scale, position_bias=position_bias, backend=backend
    )


@graph_break
def axial_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gshard: GridShard | None = None,
    *,
    dim: int,
    mask: Mask | None = None,
    strategy: str = "auto",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention along one dim of the grid; every other position is a row of its own.

    Args:
        q, k, v, gshard, scale, backend: as in `neighborhood_attention`.
        dim: the grid dim along which positions see each other.
        mask: which of them; None is all (`xdist.Mask(causal=True)` for time).
        strategy: where `dim` is the sharded one, "switch" shards another dim and comes back,
            "ulysses" and "ring" are those of `xdist.attention` with each row's positions as the
            sequence; "auto" takes the one whose busiest rank moves the fewest bytes (the first
            named of equals). Where `dim` is whole nothing moves.
        backend: as in `xdist.attention`.

    Returns:
        `[B, S1..Sk, H, E]` in the dtype of q.

    Moves by "switch": q, k and v there and the output back, (P-1)/P of each, backward alike. A
    layer that switches its input moves half of it (`xdist.nn.AxialAttention`). Formulas:
    `xdist.cost.axial`.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit together or with the shard.
        LayoutError: the grid has no such dim.
        StrategyError: an unknown strategy or backend, a forced backend that cannot serve, or switch
            in a grid of one dim.

    Source: Ho et al., "Axial Attention in Multidimensional Transformers" (2019), section 3.
    """
    return grid_windows.axial_attention(
        q,
        k,
        v,
        gshard,
        dim=dim,
        mask=Mask(causal=False) if mask is None else mask,
        strategy=strategy,
        scale=scale,
        backend=backend,
    )
