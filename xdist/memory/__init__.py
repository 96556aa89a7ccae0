"""Bounded memory: tiles, kept exchanges, checkpointing, tiled losses."""

from xdist.memory.grid import checkpoint_grid

__all__ = ["checkpoint_grid"]
