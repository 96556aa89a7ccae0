"""The public functions, with or without a shard. Thin: each checks nothing twice and delegates."""

from __future__ import annotations
