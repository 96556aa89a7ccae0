"""Bytes and FLOPs of one op under one strategy, as formulas; no process group."""
