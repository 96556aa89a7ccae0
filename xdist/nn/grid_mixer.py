"""Any mixer of sequences on a grid: its tokens in one order of dims, there and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from xdist.cost.grid_scan import scan_home, scan_layout
from xdist.grid_shard import GridShard, resolve_grid
from xdist.nn.registry import build_mixer
from xdist.parallel.grid_rows import Rows
from xdist.shard import DerivedShard, SequenceShard


class GridMixer(nn.Module):
    """y = mixer(x, gshard), `[B, S1..Sk, C]` -> the same: a mixer of `build_mixer` over the tokens
    in `order`, and with `both` a second one of its own parameters from the other end, summed.

    name, dim, options: as in `xdist.nn.build_mixer`, whatever the mixer (convolutions, decays and
    norms of the sequence included). order: dims from outermost to innermost; the others are rows.
    dims: k, where the order does not name them all.

    Moves: where the sharded dim lies inside the order, x and y once each by a switch; where it is
    the outermost dim, what the mixer moves over a sequence, the two directions one after another;
    else nothing. `xdist.nn.GridScan` scans both directions in one exchange.

    Raises:
        ConfigError: as `build_mixer`.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        order: tuple[int, ...],
        *,
        dims: int | None = None,
        both: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.order, self.dims = tuple(order), max(order) + 1 if dims is None else dims
        self.ahead = build_mixer(name, dim, **options)
        self.behind = build_mixer(name, dim, **options) if both else None

    def forward(self, x: Tensor, gshard: GridShard | None = None) -> Tensor:
        gshard = resolve_grid(gshard, x, self.dims)
        x, home = gshard.switch(x, scan_home(gshard.sizes, gshard.dim, gshard.size, self.order))
        rows = Rows(x.shape[0], home.local_sizes, self.order)
        tokens = rows.take(x.flatten(1, len(home.sizes)))
        y = rows.back(self._mixed(tokens, home)).unflatten(1, home.local_sizes)
        return home.switch(y, gshard.dim)[0]

    def _mixed(self, tokens: Tensor, home: GridShard) -> Tensor:
        """[rows, tokens, C] of this rank."""
        if not tokens.shape[0]:
            return tokens
        shard: SequenceShard | None = None
        mirrored: SequenceShard | None = None
        if home.dim in self.order and home.size > 1:
            layout = scan_layout(home.sizes, self.order, home.size)
            shard = DerivedShard(home.mesh, layout)
            mirrored = DerivedShard(home.mesh, layout.mirrored())
        y: Tensor = self.ahead(tokens, shard)
        if self.behind is not None:
            # Seen from the end: this rank's tokens the other way, at mirrored positions.
            y = y + self.behind(tokens.flip(1), mirrored).flip(1)
        return y
