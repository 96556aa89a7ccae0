"""Which masks other projects' kernels know: packed sequences with one window, found exactly.

cuDNN, torch's flash kernels and flash-attn take sequences that lie one after another, query t of n
seeing the keys of its own sequence of m with

    t + m - n - left <= key <= t + m - n + right            (left, right: a number, or no limit)

Causal is right = 0, bidirectional no limits, a document a sequence, a chunk one too. A mask given
by spans is of this kind, or it is refused with the reason; nothing is served that is nearly so:

    sort keys by position, queries by the keys they see;    each query sees one run [a, b) of keys
    a sequence ends where the next query shares no key with those before
    where b is short of its sequence's end,   b - 1 - (t + m - n) is `right`, the same everywhere;
    where b is the end,                       that key is no farther than `right` allows
    and the same for a and `left` at the other end
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from xdist_kernels.attention.blocks import Spans

# Queries that a program of those kernels takes at once, about.
_BLOCK = 128
# Sequences shorter than this on average leave most of a program idle.
_SHORT = 32
# A grid has programs for the longest sequence, in every sequence: so many times those needed. Idle
# programs end at once.
_MOST_IDLE = 4


class Placed(NamedTuple):
    """Starts int32 `[batch * sequences + 1]` and orders on a device, rows one after another."""

    q_starts: Tensor
    k_starts: Tensor
    q_order: Tensor | None
    k_order: Tensor | None


@dataclass(frozen=True, eq=False)
class Sequences:
    """Queries and keys as sequences, one after another.

    q_starts, k_starts: int64 `[sequences + 1]`, on the CPU, from 0: where each begins among the
    queries in the order `q_order`, and among the keys in the order `k_order` (on the device of the
    spans), the first of which is number `first_key`; None is the order they lie in. left, right:
    the window, -1 no limit.
    """

    q_starts: Tensor
    k_starts: Tensor
    left: int
    right: int
    first_key: int = 0
    q_order: Tensor | None = None
    k_order: Tensor | None = None
    _placed: dict[tuple[torch.device, int], Placed] = field(default_factory=dict, repr=False)

    @property
    def count(self) -> int:
        return len(self.q_starts) - 1

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Of the queries, of the keys."""
        return int(self.q_starts.diff().max()), int(self.k_starts.diff().max())

    @cached_property
    def alike(self) -> bool:
        """Whether all sequences have one length: then they are rows of a batch."""
        return all(bool((s.diff() == s[1]).all()) for s in (self.q_starts, self.k_starts))

    @cached_property
    def square(self) -> bool:
        """Whether each sequence has as many keys as queries."""
        return torch.equal(self.q_starts, self.k_starts)

    @cached_property
    def seen(self) -> slice:
        """The keys, in their order, that any query sees."""
        return slice(self.first_key, self.first_key + int(self.k_starts[-1]))

    def placed(self, device: torch.device, batch: int) -> Placed:
        """For `batch` rows of this mask on `device`; copied there once."""
        found = self._placed.get((device, batch))
        if found is None:
            starts = [_repeated(s, batch).to(device) for s in (self.q_starts, self.k_starts)]
            orders = [None if x is None else x.to(device) for x in (self.q_order, self.k_order)]
            found = Placed(starts[0], starts[1], orders[0], orders[1])
            self._placed[device, batch] = found
        return found

    @cached_property
    def idle(self) -> str | None:
        """Why a library's kernel would spend its time on nothing; None where it would not."""
        lengths = self.q_starts.diff()
        tokens = int(lengths.sum())
        if tokens < _SHORT * self.count and self.count > 1:
            return f"sequences are {tokens / self.count:.0f} queries long on average: too short"
        blocks = (lengths + _BLOCK - 1) // _BLOCK
        if self.count * int(blocks.max()) > _MOST_IDLE * int(blocks.sum()):
            return (
                "sequences differ so much in length that most programs of a library would be idle"
            )
        return None

    @cached_property
    def told(self) -> str:
        """As it is said to a user."""
        name = {(-1, -1): "bidirectional", (-1, 0): "causal"}.get(
            (self.left, self.right), f"window ({self.left}, {self.right})"
        )
        tokens = int(self.q_starts[-1])
        return f"{name}, {self.count} sequence{'s' * (self.count > 1)} of {tokens} queries in all"


def _repeated(starts: Tensor, batch: int) -> Tensor:
    """Where sequences begin in `batch` rows laid one after another, int32."""
    rows = torch.arange(batch).unsqueeze(1) * starts[-1] + starts[:-1]
    return torch.cat([rows.flatten(), (batch * starts[-1]).view(1)]).to(torch.int32)


def find_sequences(spans: Spans, k_positions: Tensor) -> Sequences | str:
    """The sequences that are exactly this mask, or why there are none.

    spans: four int64 `[n]`; k_positions int64 `[m]`; any device, on which the work is done but for
    some twenty answers; keys and queries in any order.
    """
    keys = k_positions
    if len(spans[0]) == 0 or len(keys) == 0:
        return "there are no queries or no keys"
    k_order = None
    if not bool((keys.diff() > 0).all()):
        keys, k_order = torch.sort(keys)
        if not bool((keys.diff() > 0).all()):
            return "two keys have one position"
    runs = _one_run(keys, spans)
    if isinstance(runs, str):
        return runs
    first, last = runs
    if bool((first == 0).all()) and bool((last == len(keys)).all()):
        # Order does not matter where all is seen: nothing is moved for it.
        ends = [torch.tensor([0, len(x)]) for x in (first, keys)]
        return Sequences(ends[0], ends[1], -1, -1)
    rank = first * (len(keys) + 1) + last
    q_order = None
    if bool((rank.diff() < 0).any()):
        q_order = torch.sort(rank, stable=True).indices
        first, last = first[q_order], last[q_order]
    return _cut(first, last, q_order, k_order)


def _one_run(keys: Tensor, spans: Spans) -> tuple[Tensor, Tensor] | str:
    """The keys `[first, last)` each query sees, as numbers of the sorted `keys`."""
    begin, end = int(keys[0]), int(keys[-1])
    if end - begin == len(keys) - 1:
        # All positions in between are there: no search is needed.
        first, last, p_first, p_last = ((s - begin).clamp_(0, len(keys)) for s in spans)
    else:
        first, last, p_first, p_last = (torch.searchsorted(keys, s.contiguous()) for s in spans)
    own, prefix = first < last, p_first < p_last
    if not bool((own | prefix).all()):
        return "some queries see no key"
    both = own & prefix
    if bool((both & (p_last != first) & (last != p_first)).any()):
        return "some queries see two runs of keys"
    far = len(keys)
    first = torch.minimum(first.where(own, far), p_first.where(prefix, far))
    last = torch.maximum(last.where(own, 0), p_last.where(prefix, 0))
    return first, last


def _cut(
    first: Tensor, last: Tensor, q_order: Tensor | None, k_order: Tensor | None
) -> Sequences | str:
    """Sequences of queries in order, which see the keys `[first, last)`."""
    reach = last.cummax(0).values
    begins = torch.cat([first.new_zeros(1), torch.nonzero(reach[:-1] <= first[1:]).flatten() + 1])
    ends = torch.cat([begins[1:], begins.new_tensor([len(first)])])
    k_begins, k_ends = first[begins], reach[ends - 1]
    if not torch.equal(k_begins[1:], k_ends[:-1]):
        return "some keys between those that are seen are seen by none"
    lengths = ends - begins
    start, stop, offset = (
        torch.repeat_interleave(x, lengths, output_size=len(first))
        for x in (k_begins, k_ends, k_ends - ends)
    )
    # The key that query t is at: its own, where it has one.
    at = torch.arange(len(first), device=first.device) + offset
    right = _limit(last - 1 - at, last < stop, stop - 1 - at)
    left = _limit(at - first, first > start, at - start)
    if right is None or left is None:
        return "what queries see moves by no one window"
    q_starts = torch.cat([begins, ends[-1:]]).cpu()
    k_starts = torch.cat([k_begins, k_ends[-1:]]).cpu()
    first_key = int(k_starts[0])
    return Sequences(q_starts, k_starts - first_key, left, right, first_key, q_order, k_order)


def _limit(seen: Tensor, cut: Tensor, whole: Tensor) -> int | None:
    """The window's reach to one side: `seen` where it is `cut` short of the sequence's end, at
    least `whole` elsewhere; -1 without a limit, None where there is no one number."""
    if not bool(cut.any()):
        return -1
    limit = int(seen.where(cut, -1).max())
    fits = limit >= 0 and bool(((seen == limit) & cut | (whole <= limit) & ~cut).all())
    return limit if fits else None
