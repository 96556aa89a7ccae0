"""A config tried out before it gets its ranks: real code, no values, one CPU process."""

from __future__ import annotations

from xdist.dry_run.result import DryRun, Rehearsal
from xdist.dry_run.run import dry_run

__all__ = ["DryRun", "Rehearsal", "dry_run"]
