"""Bounded memory: tiles, kept exchanges, checkpointing, tiled losses."""
