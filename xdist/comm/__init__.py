"""Moves between ranks: one file per move, one primitive under them all.

Every move has a plain form `start_*(...) -> Pending` (`.wait()`), an adjoint, and a differentiable
form made from the pair. A group of None is one rank: every move is then the identity and nothing
reaches torch. What a rank sends depends only on what all ranks know.
"""

from xdist.comm.broadcast import broadcast, start_broadcast, start_sum_to
from xdist.comm.checks import checks
from xdist.comm.gather import gather, reduce_scatter, start_gather, start_reduce_scatter
from xdist.comm.halo import Halo, halo, start_halo, start_halo_adjoint
from xdist.comm.ledger import Ledger, Traffic, ledger
from xdist.comm.pending import Pending
from xdist.comm.reduce import reduce, start_reduce
from xdist.comm.relayout import relayout, start_relayout
from xdist.comm.ring import (
    blocks,
    ring_steps,
    start_blocks,
    start_blocks_adjoint,
    start_exchange,
)
from xdist.comm.scan import Scan, scan
from xdist.comm.switch import start_switch, start_switch_many, switch, switch_many

__all__ = [
    "Halo",
    "Ledger",
    "Pending",
    "Scan",
    "Traffic",
    "blocks",
    "broadcast",
    "checks",
    "gather",
    "halo",
    "ledger",
    "reduce",
    "reduce_scatter",
    "relayout",
    "ring_steps",
    "scan",
    "start_blocks",
    "start_blocks_adjoint",
    "start_broadcast",
    "start_exchange",
    "start_gather",
    "start_halo",
    "start_halo_adjoint",
    "start_reduce",
    "start_reduce_scatter",
    "start_relayout",
    "start_sum_to",
    "start_switch",
    "start_switch_many",
    "switch",
    "switch_many",
]
