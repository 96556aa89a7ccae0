"""`python -m xdist.volume OUT RUN [RUN ...]`: Dice of finished runs on their held-out slab."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from xdist.errors import XdistError
from xdist.memory.allocator import keep_small_blocks
from xdist.volume.judge import judge


def main(arguments: list[str]) -> int:
    """Print the table; the exit code is returned."""
    if len(arguments) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    torch.set_num_threads(os.cpu_count() or 1)
    # Tiles reuse their memory instead of asking the system for fresh pages.
    keep_small_blocks()
    out, *runs = map(Path, arguments)
    try:
        judge(runs, out)
    except XdistError as error:
        print(f"xdist: {error}", file=sys.stderr)
        return error.exit_code
    print((out / "dice.txt").read_text(encoding="utf-8"), end="")
    print(f"label maps, montage.png and metrics.jsonl: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
