"""Which attention probabilities are dropped: a hash of positions, head and row, not a stream.

Everything is 32-bit words, products and sums modulo 2^32, shifts that fill with zeros:

    mix(x):      x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16
    word(s, w):  s = mix(s ^ low 32 bits of w);  s = mix(s ^ high 32 bits of w)
    a, c = words of (key, row, head, query position), begun at 0x9e3779b9 and 0x3c6ef372
    b    = word of the key position, begun at 0xdaa66d2b
    x = (a ^ b) * 0x7feb352d;  x ^= x >> 15;  x = (x + c) * 0x846ca68b
    kept where x, read as a signed number, is at least round(rate * 2^32) - 2^31

Row, head and positions are global numbers of 64 bits, so that every rank, block and backend drops
the same. A query has one (a, c), a key one b; the last two lines are all a pair costs.
`Dropped.keeps` says it with Python's integers, one pair a call; `Dropped.kept` for whole blocks.
The mix is `lowbias32` (Wellons, "Prospecting for hash functions", 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
_BEGIN_A, _BEGIN_C, _BEGIN_KEY = 0x9E3779B9, 0x3C6EF372, 0xDAA66D2B


@dataclass(frozen=True)
class Dropped:
    """One call's dropout. `key` holds 64 bits of (seed, step, layer); `first_row` and `first_head`
    are the global numbers of the tensors' batch row 0 and query head 0; `q_positions` int64 `[n]`
    are the queries' global positions."""

    rate: float
    key: int
    first_row: int
    first_head: int
    q_positions: Tensor

    @property
    def scale(self) -> float:
        """What a kept probability is multiplied by."""
        return 1.0 / (1.0 - self.rate)

    @property
    def threshold(self) -> int:
        """The least signed word that is kept."""
        return min(round(self.rate * 2**32) - 2**31, 2**31 - 1)

    def keeps(self, row: int, head: int, query: int, key_position: int) -> bool:
        """Whether one probability is kept: local batch row and head, global positions."""
        names = (self.key, self.first_row + row, self.first_head + head, query)
        a, c = _BEGIN_A, _BEGIN_C
        for name in names:
            a, c = _absorb(a, name), _absorb(c, name)
        x = (a ^ _absorb(_BEGIN_KEY, key_position)) * _FIRST & _WORD
        x = ((x ^ x >> 15) + c) * _SECOND & _WORD
        return (x ^ 2**31) - 2**31 >= self.threshold

    def queries(self, batch: int, heads: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """The words (a, c) of a block of queries, int32 `[batch, heads, rows]`; slices local.

        Made where the positions are, of numbers alone: nothing is copied there.
        """
        positions = self.q_positions[rows]
        device = positions.device
        # Sums of int64 wrap, as numbers of 64 bits do: row and head are those of `keeps`.
        row = torch.arange(batch, device=device).view(-1, 1, 1) + _wrapped(self.first_row)
        head = torch.arange(heads.start, heads.stop, device=device).view(-1, 1)
        head = head + _wrapped(self.first_head)
        a, c = (_absorb(begin, self.key) for begin in (_BEGIN_A, _BEGIN_C))
        both = (torch.arange(2, device=device) * (c - a) + a).view(2, 1, 1, 1)
        of_a, of_c = _absorb_all(_absorb_all(both, row), head)  # [batch, heads, 1] each
        return _signed(_absorb_all(of_a, positions)), _signed(_absorb_all(of_c, positions))

    def keys(self, k_positions: Tensor) -> Tensor:
        """The word of each key, int32 `[keys]`."""
        start = torch.full_like(k_positions, _BEGIN_KEY)
        return _signed(_absorb_all(start, k_positions))

    def kept(self, queries: tuple[Tensor, Tensor], k_positions: Tensor) -> Tensor:
        """Bool `[..., keys]`: which pairs of queries with words `[...]` and keys are kept."""
        a, c = (words.unsqueeze(-1) for words in queries)
        x = (a ^ self.keys(k_positions)).mul_(_FIRST)
        # An arithmetic shift fills with the sign: the mask makes the zeros.
        x ^= (x >> 15).bitwise_and_(0x1FFFF)
        return x.add_(c).mul_(_SECOND - 2**32) >= self.threshold


def _absorb(state: int, name: int) -> int:
    state = _mix(state ^ name & _WORD)
    return _mix(state ^ name >> 32 & _WORD)


def _mix(x: int) -> int:
    x = (x ^ x >> 16) * _FIRST & _WORD
    x = (x ^ x >> 15) * _SECOND & _WORD
    return x ^ x >> 16


def _wrapped(number: int) -> int:
    """The signed number of the same 64 bits."""
    return (number + 2**63) % 2**64 - 2**63


def _absorb_all(states: Tensor, names: Tensor) -> Tensor:
    """`_absorb` of int64 tensors that hold words; products wrap, their low 32 bits are right."""
    states = _mix_all(states ^ (names & _WORD))
    return _mix_all(states ^ (names >> 32 & _WORD))


def _mix_all(x: Tensor) -> Tensor:
    x = (x ^ x >> 16) * _FIRST & _WORD
    x = (x ^ x >> 15) * _SECOND & _WORD
    return x ^ x >> 16


def _signed(words: Tensor) -> Tensor:
    """Words held in int64 as the int32 of the same bits."""
    return ((words ^ 2**31) - 2**31).to(torch.int32)
