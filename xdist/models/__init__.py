"""Whole models, one file each: config, blocks, model, initial values, FLOP count."""

from __future__ import annotations

from xdist.models.hybrid_lm import HybridLM, build

__all__ = ["HybridLM", "build"]
