"""Named points at which a kill campaign may cut a run.

Code that must survive a cut calls `on_point(name)` between two of its effects. In production
`on_point` is `ignore`; a test passes a `Cut`, or a list's `append` to see the names.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import NoReturn

OnPoint = Callable[[str], None]

# In the order a save passes them; those from "save.old_moved" on only when there is such work.
SAVE_POINTS = (
    "save.begin",
    "save.folder_made",
    "save.tensors_written",
    "save.tensors_flushed",
    "save.state_written",
    "save.before_manifest",
    "save.manifest_half_written",
    "save.manifest_written",
    "save.folder_flushed",
    "save.old_moved",
    "save.renamed",
    "save.directory_flushed",
    "save.prune_moved",
    "save.pruned",
    "save.end",
)


def ignore(name: str) -> None:
    """Go on."""


def kill(name: str) -> NoReturn:
    """End this process at once, as the kernel would: no handlers, no flushing, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError(f"survived SIGKILL at {name}")


class Cut:
    """Calls `action` the `occurrence`-th time (from 1) that the point `name` is passed, once."""

    def __init__(self, name: str, occurrence: int = 1, action: OnPoint = kill) -> None:
        self.name = name
        self.occurrence = occurrence
        self.action = action
        self.passed = 0

    def __call__(self, name: str) -> None:
        if name == self.name:
            self.passed += 1
            if self.passed == self.occurrence:
                self.action(name)
