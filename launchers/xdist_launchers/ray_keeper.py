"""The parent of a Ray node's processes, which outlives a killed driver just to clean up.

Ray's agents outlive a node that is killed. The keeper adopts all that the node leaves behind and
ends it: when it is told to, when the node ends, and when whoever started it is gone. In the last
case it removes the private folder too, which nobody else would.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from types import FrameType

from xdist_launchers.processes import Child, adopt_orphans, die_with_parent, kill_orphans, stop

STOP_S = 3.0


def main(parent: int, folder: str, command: list[str]) -> int:
    """Run `command` until it ends or a signal comes; its exit code, 1 for any other end."""
    asked: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, note)
    die_with_parent(signal.SIGTERM)
    adopt_orphans()
    node = Child(command, os.environ, None)
    try:
        while not asked and not node.ended and os.getppid() == parent:
            time.sleep(0.1)
    finally:
        stop([node], term_s=STOP_S)
        kill_orphans(set())
        if os.getppid() != parent:
            shutil.rmtree(folder, ignore_errors=True)
    return node.exit_code if node.exit_code is not None else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
