"""One call of attention on this rank: what the strategies share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xdist.comm.collectives import ProcessGroup
from xdist.cost.attention_keys import Problem, Ranges, head_spans
from xdist.dropout import Dropout
from xdist.shard import may_keep
from xdist_kernels import attention, merge
from xdist_kernels.attention import flash, libraries
from xdist_kernels.attention.blocks import Spans
from xdist_kernels.attention.dropout import Dropped
from xdist_kernels.attention.forms import Cut, Parts
from xdist_kernels.backend import Choice

T = TypeVar("T")
Pair = tuple[Tensor, Tensor]  # out and log-sum-exp
_TORCH = Choice("attention", "torch", "nothing else was asked for")
# Of calls without a shard on a card: so many keep what they made for those that come after, where
# it is of at most so many spans (about 100 bytes each). What is longer computes for as long as the
# host takes to make it.
MOST_REMEMBERED, MOST_SPANS = 4, 1 << 18


@dataclass(frozen=True)
class Later(Generic[T]):
    """Integers about positions that follow from a problem and `name`: of a long row megabytes, so
    that they are made where a kernel reads them."""

    name: Hashable
    make: Callable[[], T]


Positions: TypeAlias = Tensor | Later[Tensor]  # of keys, global, int64


@dataclass(frozen=True)
class Seen:
    """What a run of queries of a run of heads sees and drops, as the kernels take it."""

    spans: Later[Spans]
    dropped: Dropped | None


@dataclass(frozen=True)
class Call:
    """A checked call: the problem all ranks know, and where this rank stands.

    `shared`: other calls have this problem too, because they have its shard. `choice`: whose
    kernels compute, triton, torch or reference; `auto`: none was asked for, so that on a GPU
    cuDNN and flash attention may take what is not added up.
    """

    problem: Problem
    rank: int
    group: ProcessGroup | None
    scale: float
    softcap: float | None
    device: torch.device
    dropout: Dropout | None = None
    shared: bool = True
    choice: Choice = _TORCH
    auto: bool = False

    @property
    def backend(self) -> str:
        return self.choice.name

    def others(self) -> list[int]:
        """The other sequence ranks."""
        return [rank for rank in range(self.problem.parts) if rank != self.rank]

    def once(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made by the first of the calls that share this problem: the same for
        all of them that have this `name`, device and CUDA stream. A call that shares nothing keeps
        nothing for its backward, which makes it anew."""
        kept = self._kept
        if kept is None:
            return make()
        # By stream: what is made is filled on it, and no other waits for that.
        made: dict[int | None, T] = kept.setdefault((name, self.device), {})
        if self._capturing():
            # What was there is filled, since a graph begins when the device has ended its work.
            # What is made here is filled by replays alone.
            return next(iter(made.values())) if made else make()
        stream = self._stream()
        if stream not in made:
            # It may outlive the inference mode of this call.
            with torch.inference_mode(False):
                made[stream] = make()
        return made[stream]

    def _stream(self) -> int | None:
        """The CUDA stream that work for this call goes to."""
        if self.device.type != "cuda":
            return None
        return int(torch.cuda.current_stream(self.device).cuda_stream)

    def _capturing(self) -> bool:
        """Whether that work is written into a CUDA graph instead."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @cached_property
    def _kept(self) -> dict[Any, Any] | None:
        """Where what several calls need is kept: with the shard's problem. Without a shard only
        what goes to a card is worth it, for which the host would wait at every call."""
        if self.shared:
            return self.problem.kept
        sets = 1 if self.problem.mask.heads is None else self.problem.heads
        spans = sets * self.problem.layout.length
        if self.backend != "triton" or max(spans, self.problem.key_length) > MOST_SPANS:
            return None
        # Nothing is found in a graph: what it reads must live as long, and no shard holds it.
        if self._capturing() or not may_keep():
            return None
        return _remembered(self.problem, self._stream()).kept

    def seen(self, ranks: range, start: int, stop: int) -> Seen:
        """What the queries of `ranks`, one rank after another, of heads `[start, stop)` see."""
        mask = self.problem.mask
        alike = len(mask.for_heads(start, stop).head_groups(stop - start)) <= 1
        # Heads that see the same share one set of spans, in whatever runs they are computed.
        some = start if start < stop else 0
        heads = ("alike", *mask.sides(some)) if alike else ("heads", start, stop)
        spans = Later(("spans", ranks, heads), lambda: self._spans(ranks, start, stop))
        drop = self.dropout
        if drop is None or drop.rate == 0.0:
            return Seen(spans, None)
        at = self.once(("queries", ranks), lambda: self.tensor(self._query_positions(ranks)))
        return Seen(spans, Dropped(drop.rate, drop.key, drop.first_row, start, at))

    def _query_positions(self, ranks: range) -> NDArray[np.int64]:
        return np.concatenate([self.problem.layout.positions(rank) for rank in ranks])

    def _spans(self, ranks: range, start: int, stop: int) -> Spans:
        found = head_spans(self.problem, self._query_positions(ranks), start, stop)
        if len(found) == 1:
            lo, hi, prefix_lo, prefix_hi = (self.tensor(side) for side in found[0])
        else:
            sides = [np.stack(side) for side in zip(*found, strict=True)]
            lo, hi, prefix_lo, prefix_hi = (self.tensor(side) for side in sides)
        return lo, hi, prefix_lo, prefix_hi

    def own_seen(self) -> Seen:
        """What this rank's queries see, all heads."""
        return self.seen(range(self.rank, self.rank + 1), 0, self.problem.heads)

    def keys_at(self, ranks: range) -> Later[Tensor]:
        """Global positions of the keys `ranks` hold, one rank after another, int64 `[m]`."""
        return Later(
            ("keys", ranks),
            lambda: self.tensor(np.concatenate([self.key_positions(rank) for rank in ranks])),
        )

    def key_positions(self, rank: int) -> NDArray[np.int64]:
        """Global positions of the keys `rank` holds."""
        if self.problem.key_layout is None:
            return np.arange(self.problem.key_length, dtype=np.int64)
        return self.problem.key_layout.positions(rank)

    def tensor(self, values: NDArray[np.int64]) -> Tensor:
        """Integers on this call's device."""
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Seen, k_positions: Positions,
        sinks: Tensor | None = None, into: Pair | None = None, rounded: bool = False,
    ) -> Pair:  # fmt: skip
        """The kernel's forward with this call's scale and soft-cap; `into` is added to. Where the
        caller adds nothing to the output it may come `rounded` to q's dtype."""
        if rounded and self._may_ask_libraries(q, sinks):
            spans, at = self._tables(seen, k_positions)
            served = libraries.attention_forward(
                q, k, v, scale=self.scale, spans=spans, k_positions=at,
                softcap=self.softcap, sinks=sinks, dropout=seen.dropped,
            )  # fmt: skip
            if served is not None:
                return served
        self.choice.say()  # not before: a library may serve every part of the call
        found: Pair = attention.kernels(self.backend).attention_forward(
            q, k, v, scale=self.scale, softcap=self.softcap, sinks=sinks, dropout=seen.dropped,
            into=into, **self._what_is_seen(q, seen, k_positions, rounded),
        )  # fmt: skip
        return found

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor | None, dout: Tensor,
        seen: Seen, k_positions: Positions, out: Tensor | None = None, rounded: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The kernel's backward with this call's scale and soft-cap; as forward's, gradients may
        come `rounded`."""
        if rounded and out is not None and self._may_ask_libraries(q, None):
            spans, at = self._tables(seen, k_positions)
            served = libraries.attention_backward(
                q, k, v, lse, out, dout, scale=self.scale, spans=spans, k_positions=at,
                softcap=self.softcap, dropout=seen.dropped,
            )  # fmt: skip
            if served is not None:
                return served
        self.choice.say()
        found: tuple[Tensor, Tensor, Tensor] = attention.kernels(self.backend).attention_backward(
            q, k, v, lse, delta, dout, scale=self.scale, softcap=self.softcap,
            dropout=seen.dropped, out=out, **self._what_is_seen(q, seen, k_positions, rounded),
        )  # fmt: skip
        return found

    def _may_ask_libraries(self, q: Tensor, sinks: Tensor | None) -> bool:
        if not self.auto:
            return False
        drops = self.dropout is not None and self.dropout.rate > 0.0
        return libraries.no_mask_helps(q, sinks=sinks is not None, drops=drops) is None

    def _tables(self, seen: Seen, k_positions: Positions) -> tuple[Spans, Tensor]:
        """Spans and positions, made for the first that reads them and kept."""
        at = k_positions
        return (
            self.once(seen.spans.name, seen.spans.make),
            self.once(at.name, at.make) if isinstance(at, Later) else at,
        )

    def _what_is_seen(
        self, q: Tensor, seen: Seen, k_positions: Positions, rounded: bool
    ) -> dict[str, Any]:
        """As the backend's functions take it. Calls that see alike share what follows from it:
        torch's are cut into parts, after which most need no tables, Triton's have a plan of blocks.
        Triton's also take the dtype of results to which nothing is added."""
        if self.backend == "torch" and isinstance(k_positions, Later):
            made, at = seen.spans.make, k_positions.make
            known: dict[Hashable, Parts] = self.once(
                ("cut", seen.spans.name, k_positions.name), dict
            )
            return {"cut": Cut(lambda: (made(), at()), known)}
        spans, positions = self._tables(seen, k_positions)
        found: dict[str, Any] = {"spans": spans, "k_positions": positions}
        if self.backend == "triton":
            # Spans and positions are kept beside their plans, so that their ids stay theirs.
            found["plans"], *_ = self.once(
                ("plans", id(spans), id(positions)),
                lambda: (
                    attention.kernels("triton").Plans(spans, positions), spans, positions
                ),
            )  # fmt: skip
            found["dtype"] = q.dtype if rounded else None
        return found

    def heads_at_once(self, tokens: int) -> int:
        """How many query heads over `tokens` queries and keys fill a call of a kernel. All of them
        but where torch's own kernel serves, which takes heads one by one."""
        p, drop = self.problem, self.dropout
        drops = drop is not None and drop.rate > 0.0
        narrow = p.mask.window is not None or p.dim != p.value_dim
        if self.backend != "torch" or self.device.type != "cpu":
            return p.heads
        if narrow or drops or self.softcap is not None:
            return p.heads
        return flash.heads_at_once(p.batch, tokens, p.dim)

    def merge_sinks_(self, out: Tensor, lse: Tensor, sinks: Tensor) -> None:
        """Adds the sinks to (`out`, `lse`) over all keys, in place."""
        merge.kernels(self.backend).merge_sinks_(out, lse, sinks)

    def delta(self, out: Tensor, dout: Tensor) -> Tensor:
        """`rowsum(dO * O)` `[B,n,H]`, float32 or float64."""
        found: Tensor = attention.kernels(self.backend).attention_delta(out, dout)
        return found


@lru_cache(maxsize=MOST_REMEMBERED)
def _remembered(problem: Problem, stream: int | None) -> Problem:
    """The first of equal problems on a CUDA stream, with what was made for it."""
    return problem


def take(x: Tensor, ranges: Ranges) -> Tensor:
    """The tokens of x `[B, n, ...]` in `ranges`, one run after another."""
    return joined([x[:, start:stop] for start, stop in ranges], 1) if ranges else x[:, :0]


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat`, without the copy where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=dim)


def add_at(target: Tensor, ranges: Ranges, values: Tensor) -> None:
    """Adds `values` `[B, tokens, ...]`, as `take` would have laid them out, to `target`."""
    start = 0
    for first, stop in ranges:
        target[:, first:stop] += values[:, start : start + stop - first]
        start += stop - first


def positions_at(positions: NDArray[np.int64], ranges: Ranges) -> NDArray[np.int64]:
    """The positions of the tokens `take` takes."""
    runs = [positions[start:stop] for start, stop in ranges]
    return np.concatenate(runs) if runs else positions[:0]
