"""Moves between ranks: one file per move, one primitive under them all.

Every move has a plain form `start_*(...) -> Pending` (`.wait()`), an adjoint, and a differentiable
form made from the pair. A group of None is one rank: every move is then the identity and nothing
reaches torch. What a rank sends depends only on what all ranks know.
"""

from xdist.comm.checks import checks
from xdist.comm.ledger import Ledger, Traffic, ledger
from xdist.comm.pending import Pending

__all__ = ["Ledger", "Pending", "Traffic", "checks", "ledger"]
