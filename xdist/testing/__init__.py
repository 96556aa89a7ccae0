"""Real ranks for tests: processes started once, functions run on all of them, bytes counted twice.

Works from a test, a notebook's module or a script's `__main__`; the ranks are processes of this
machine and meet without a fixed port.
"""

from xdist.testing.c10d_bytes import CountedBytes, count_c10d_bytes
from xdist.testing.grid import layouts, poisoned_empty, relative_error
from xdist.testing.pool import RankFailed, RankPool, run_ranks

__all__ = [
    "CountedBytes",
    "RankFailed",
    "RankPool",
    "count_c10d_bytes",
    "layouts",
    "poisoned_empty",
    "relative_error",
    "run_ranks",
]
