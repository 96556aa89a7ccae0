"""The peak of memory of ulysses in chunks of heads, step by step as the strategy allocates.

Counted are the tensors of the strategy on one rank, beyond its inputs (q, k, v; in backward also
the output's gradient and what forward kept): not the kernel's working memory, which is some blocks
of scores, nor positions (40 bytes a token where a mask is served by blocks, else a moment's). With
even shares, P ranks, C chunks, as many key heads as query heads, mu = (P-1)/P and, in bytes on one
rank, X of q, k, v of its heads over the whole sequence, O of their output, L of their log-sum-exp,
r = w / e the width of sums and c = 1 where r > 1, else 0:

    forward, nothing kept    O + (max(X + (r + c) O + L, (1 + mu) X) + 2 mu O) / C    for C >= 3
    forward, kept            the same + (C-1)/C (X + O + L)                           for C >= 3
    backward, beyond kept    X + ((r - 2) X + 2 mu (X + O) - O - L) / C               for C >= 4

One chunk whose heads are computed in U equal units, float32, as many key heads of one head dim:

    backward, beyond kept    max(O + (X + L) / U, (1 + mu) O)
"""

from __future__ import annotations

from dataclasses import dataclass

from xdist.cost.attention_heads import HeadChunk, head_chunks
from xdist.cost.attention_keys import Problem


@dataclass(frozen=True)
class PeakMemory:
    """Most bytes at once, of forward and of backward, and those that forward keeps for backward."""

    forward_bytes: int
    backward_bytes: int
    kept_bytes: int


@dataclass(frozen=True)
class _Unit:
    """Bytes of the heads that are computed at once, of tensors over the sequence; q, k, v and the
    output's gradient are 0 where nothing is switched, k and v come with the first of those that
    share them and go with the last."""

    q: int
    keys: int
    out: int
    out_wide: int
    out_cast: int  # the output in the dtype of the inputs, 0 where that is the sum itself
    lse: int
    delta: int  # what the row sums of the output times its gradient are made of
    dout: int
    dq: int  # as sums
    dkeys: int
    first: bool
    last: bool


@dataclass(frozen=True)
class _Sizes:
    """Bytes of one chunk on one rank: messages, this rank's own parts of them, and units."""

    units: list[_Unit]
    in_flight: int  # q, k, v in, both messages; `in_received` one of them
    in_received: int
    out_sent: int
    out_received: int
    out_own: int
    back_sent: int
    back_received: int
    back_own: int
    dq_own: int
    last_own: int  # of what waits, what is there when all places are
    carried: int  # keys and values that the next chunk reads too, and their gradients
    carried_wide: int

    @property
    def inside(self) -> int:
        """q, k, v switched."""
        return sum(u.q + u.keys * u.first for u in self.units)

    @property
    def out(self) -> int:
        return sum(u.out for u in self.units)

    @property
    def kept(self) -> int:
        """q, k, v, the output and its log-sum-exp."""
        return self.inside + self.out + sum(u.lse for u in self.units)

    @property
    def wide(self) -> int:
        """dq, dk, dv as sums."""
        return sum(u.dq + u.dkeys * u.first for u in self.units)


def ulysses_memory(
    problem: Problem, rank: int, chunks: int = 1, *, keep: bool, heads_at_once: int | None = None
) -> PeakMemory:
    """Peaks of one call on `rank`; `keep`: a backward will come.

    One chunk is computed `heads_at_once` heads at a time; None: all of them.
    """
    parts = head_chunks(problem, problem.parts, chunks)
    alone = problem.parts == chunks == 1
    most = None if alone or chunks > 1 else heads_at_once
    sizes = [_sizes(problem, rank, chunk, most) for chunk in parts]
    kept = sum(s.kept for s in sizes) if keep else 0
    return PeakMemory(
        _forward(0 if alone else _output(problem, rank), sizes, keep),
        _alone(sizes[0], problem) if alone else _backward(*_gradients(problem, rank), sizes),
        kept,
    )


def _forward(output: int, sizes: list[_Sizes], keep: bool) -> int:
    """`output` bytes of this rank's tokens, made when the first part is put there."""
    peak = held = leaving = landing = carried = 0
    for s, after in zip(sizes, [*sizes[1:], None], strict=True):
        base = held + leaving + carried
        peak = max(peak, base + s.in_flight, base + s.in_received + s.inside)
        arriving = after.in_flight if keep and after else 0
        now = s.inside
        for u in s.units:
            peak = max(peak, base + arriving + now + u.out_wide + u.lse + u.out_cast)
            now += u.out + (u.lse if keep else -u.q - u.keys * u.last)
        held += s.kept if keep else 0
        out = 0 if keep else s.out
        if landing or not s.out_sent + s.out_received:  # from here on the output is there
            peak = max(peak, held + carried + arriving + out + landing + output)
            held, output = held + output, 0
        own = s.out_own if output else 0
        peak = max(peak, held + carried + arriving + out + s.out_sent + own)
        leaving, carried = s.out_sent + s.out_received + own, 0 if keep else s.carried
        peak = max(peak, held + carried + arriving + leaving)
        landing = s.out_received + own
    return max(peak, held + landing + output)


def _backward(targets: int, still: int, sizes: list[_Sizes]) -> int:
    """`targets` bytes of dq, dk and dv of this rank's tokens, made when their first parts are put
    there; of them `still` those of keys that do not travel. What was kept of a unit is freed when
    its gradients are computed: below 0 from there."""
    peak = held = leaving = landing = carried = 0
    for s, after in zip(sizes, [*sizes[1:], None], strict=True):
        arriving = after.out_sent + after.out_received if after else 0
        base = held + leaving + carried
        now = sum(u.dout for u in s.units)
        peak = max(peak, base + s.out_sent * bool(now) + now)
        now, more = _units_backward(s, now)
        peak = max(peak, base + arriving + more)
        held += now - s.wide
        if landing or not s.back_sent + s.back_received:
            peak = max(peak, held + carried + arriving + s.wide + landing + targets)
            held, targets = held + targets, 0
        own, first, last = (s.back_own, s.dq_own, s.last_own) if targets else (0, 0, 0)
        held, targets, still = held + still, targets - still, 0
        peak = max(peak, held + arriving + s.wide + s.back_sent + first)
        leaving, carried = s.back_sent + s.back_received + own, s.carried_wide
        peak = max(peak, held + arriving + leaving)
        landing = s.back_received + last
    return max(peak, held + landing + targets)


def _units_backward(s: _Sizes, now: int) -> tuple[int, int]:
    """Bytes after the units of a chunk, and the most while they are worked on, where the output's
    gradient takes `now` before."""
    most = now
    for u in s.units:
        most = max(most, now + u.delta, now + u.lse + u.dq + u.dkeys)
        now += u.dq + u.dkeys * u.first - u.dout - u.q - u.out - u.lse - u.keys * u.last
    return now, most


def _alone(s: _Sizes, p: Problem) -> int:
    """Backward where nothing is switched: the gradients as sums, and as the inputs' dtype."""
    _, most = _units_backward(s, 0)
    cast = s.wide * p.element_bytes // p.sum_bytes if p.element_bytes < p.sum_bytes else 0
    return max(most, s.wide + cast)


def _output(p: Problem, rank: int) -> int:
    return p.element_bytes * p.batch * p.layout.local_length(rank) * p.heads * p.value_dim


def _gradients(p: Problem, rank: int) -> tuple[int, int]:
    """Of all tensors, and of those of keys that do not travel."""
    here, keys = p.layout.local_length(rank), p.key_lengths()[rank]
    width = p.sum_bytes if _shared(p) else p.element_bytes
    keyed = p.batch * width * keys * p.groups * (p.dim + p.value_dim)
    whole = p.batch * p.element_bytes * here * p.heads * p.dim + keyed
    return whole, keyed if p.key_layout is None else 0


def _shared(p: Problem) -> frozenset[int]:
    """Key heads that several ranks read, whose gradients are added across ranks."""
    if p.key_layout is None:
        return frozenset()
    runs = [range(*p.key_heads(r)) for r in range(p.parts)]
    return frozenset(g for g in range(p.groups) if sum(g in run for run in runs) > 1)


def _sizes(p: Problem, rank: int, chunk: HeadChunk, most: int | None) -> _Sizes:
    e, b, both = p.element_bytes, p.batch, p.dim + p.value_dim
    here, all_ = p.layout.local_length(rank), p.layout.length
    heads = len(chunk.queries[rank])
    others = sum(map(len, chunk.queries)) - heads
    keys, all_keys = p.key_lengths()[rank], p.key_length
    moves = p.key_layout is not None
    come = len(chunk.arriving[rank]) if moves else 0
    sent_keys = sum(map(len, chunk.arriving)) - come if moves else 0
    received = (all_ - here) * heads * p.dim + (all_keys - keys) * come * both
    sent = here * others * p.dim + keys * sent_keys * both
    back_sent, back_received, back_own, last_own = _back(p, rank, chunk)
    left = len(chunk.keys[rank]) > len(chunk.leaving[rank])
    carried = all_keys * both if left and moves else 0
    return _Sizes(
        units=[_unit(p, *found) for found in _units(p, rank, chunk, most)],
        in_flight=b * e * (received + sent),
        in_received=b * e * received,
        out_sent=b * e * p.value_dim * (all_ - here) * heads,
        out_received=b * e * p.value_dim * here * others,
        out_own=b * e * p.value_dim * here * heads,
        back_sent=b * back_sent,
        back_received=b * back_received,
        back_own=b * back_own,
        dq_own=b * e * here * heads * p.dim,
        last_own=b * last_own,
        carried=b * e * carried,
        carried_wide=b * p.sum_bytes * carried,
    )


def _units(
    p: Problem, rank: int, chunk: HeadChunk, most: int | None
) -> list[tuple[int, int, bool, bool, bool]]:
    """Query heads and key heads of each unit, whether those came, and whether it is the first and
    the last that reads them."""
    heads, read = chunk.queries[rank], len(chunk.keys[rank])
    came = p.key_layout is not None and len(chunk.arriving[rank]) > 0
    if most is None or most >= len(heads):
        return [(len(heads), read, came, True, True)]
    per_group = p.heads // p.groups
    found: list[tuple[int, range]] = []
    h = heads.start
    while h < heads.stop:
        whole = min(heads.stop - h, most) // per_group if h % per_group == 0 else 0
        end = min(heads.stop, (h // per_group + 1) * per_group, h + most)
        end = h + whole * per_group if whole else end
        found.append((end - h, range(h // per_group, (end - 1) // per_group + 1)))
        h = end
    groups = [run for _, run in found]
    firsts = [run != before for run, before in zip(groups, [None, *groups], strict=False)]
    lasts = [run != after for run, after in zip(groups, [*groups[1:], None], strict=True)]
    return [
        (size, len(run), came, first, last)
        for (size, run), first, last in zip(found, firsts, lasts, strict=True)
    ]


def _unit(p: Problem, heads: int, read: int, came: bool, first: bool, last: bool) -> _Unit:
    e, w, both = p.element_bytes, p.sum_bytes, p.dim + p.value_dim
    all_, switched = p.layout.length * p.batch, p.parts > 1
    out = all_ * heads * p.value_dim
    keys = p.key_length * p.batch * read * both
    return _Unit(
        q=e * all_ * heads * p.dim if switched else 0,
        keys=e * keys if switched and came else 0,
        out=e * out,
        out_wide=w * out,
        out_cast=e * out if e < w else 0,
        lse=w * all_ * heads,
        delta=w * out * (3 if e < w else 1),
        dout=e * out if switched else 0,
        dq=w * all_ * heads * p.dim,
        dkeys=w * keys,
        first=first,
        last=last,
    )


def _back(p: Problem, rank: int, chunk: HeadChunk) -> tuple[int, int, int, int]:
    """Of gradients going back, bytes a batch row: sent, received, this rank's own, and of those
    what is left when the last tensor they go to is made."""
    e, w, both = p.element_bytes, p.sum_bytes, p.dim + p.value_dim
    here, all_ = p.layout.local_length(rank), p.layout.length
    heads = len(chunk.queries[rank])
    others = sum(map(len, chunk.queries)) - heads
    sent, received = e * (all_ - here) * heads * p.dim, e * here * others * p.dim
    own = last = e * here * heads * p.dim
    if p.key_layout is not None:
        shared, keys = _shared(p), p.key_lengths()[rank]
        width = [sum(w if g in shared else e for g in run) for run in chunk.leaving]
        sent += (p.key_length - keys) * both * width[rank]
        received += keys * both * (sum(width) - width[rank])
        own += keys * both * width[rank]
        summed = sum(g in shared for g in chunk.leaving[rank])
        alone = len(chunk.leaving[rank]) - summed
        # Heads that are added up are put first: then the others' keys and values still wait.
        last = keys * (w * summed * p.value_dim + e * alone * (both if summed else p.value_dim))
    return sent, received, own, last
