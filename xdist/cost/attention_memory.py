"""The peak of memory of ulysses in chunks of heads, step by step as the strategy allocates.

Counted are the tensors of the strategy on one rank, beyond its inputs (q, k, v; in backward also
the output's gradient and what forward kept): not the kernel's working memory, which is some blocks
of scores, nor positions (40 bytes a token). With even shares, P ranks, C >= 2 chunks, as many key
heads as query heads, mu = (P-1)/P and, in bytes on one rank, X of q, k, v of its heads over the
whole sequence, O of their output, L of their log-sum-exp, r = w / e the width of sums and c = 1
where r > 1, else 0:

    forward, nothing kept    O + (max(X + (r + c) O + L, (1 + mu) X) + 2 mu O) / C
    forward, kept            the same + (C-1)/C (X + O + L)
    backward, beyond kept    X + ((r - 1) X + 2 mu (X + O)) / C    for C >= 3
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
class _Sizes:
    """Bytes of one chunk on one rank: messages, and tensors of its heads over the sequence."""

    in_flight: int  # q, k, v in, both messages; `in_received` one of them
    in_received: int
    inside: int  # q, k, v switched
    out_wide: int
    out_cast: int  # the output in the dtype of the inputs, 0 where that is the sum itself
    lse: int
    out_flight: int
    dout_received: int
    delta: int  # what the row sums of the output times its gradient are made of
    wide: int  # dq, dk, dv as sums
    dq_wide: int  # of those dq, where it is cast and gone by the time it travels
    dq_cast: int
    cast: int  # all that is cast to the dtype of the inputs to travel, dq included
    travelling: int  # dq, dk, dv as they travel, of all tokens
    back_flight: int
    carried: int  # keys and values that the next chunk reads too, and their gradients
    carried_wide: int

    @property
    def out(self) -> int:
        """The output in the dtype of the inputs."""
        return self.out_cast or self.out_wide

    @property
    def kept(self) -> int:
        """q, k, v, the output and its log-sum-exp."""
        return self.inside + self.out + self.lse


def ulysses_memory(problem: Problem, rank: int, chunks: int = 1, *, keep: bool) -> PeakMemory:
    """Peaks of one call on `rank`; `keep`: a backward will come."""
    parts = head_chunks(problem, problem.parts, chunks)
    sizes = [_sizes(problem, rank, chunk) for chunk in parts]
    alone = problem.parts == chunks == 1
    kept = sum(s.kept for s in sizes) if keep else 0
    return PeakMemory(
        _forward(0 if alone else _output(problem, rank), sizes, keep),
        _backward((0, 0) if alone else _gradients(problem, rank), sizes),
        kept,
    )


def _forward(output: int, sizes: list[_Sizes], keep: bool) -> int:
    """`output` bytes of this rank's tokens, made for the first part that comes back."""
    peak = held = leaving = carried = 0
    for s, after in zip(sizes, [*sizes[1:], None], strict=True):
        base = held + leaving + carried
        peak = max(peak, base + s.in_flight, base + s.in_received + s.inside)
        arriving = after.in_flight if keep and after else 0
        peak = max(peak, base + arriving + s.inside + s.out_wide + s.lse + s.out_cast)
        held += s.kept if keep else 0
        held, output = held + output, 0
        peak = max(peak, held + carried + arriving + s.out_flight + (0 if keep else s.out))
        leaving, carried = s.out_flight, 0 if keep else s.carried
    return peak


def _backward(targets: tuple[int, int], sizes: list[_Sizes]) -> int:
    """`targets` bytes of dq, and of dk and dv, of this rank's tokens, made for their first parts.

    What was kept of a chunk is freed when its gradients are computed: below 0 from there.
    """
    peak = held = leaving = carried = 0
    for s, after in zip(sizes, [*sizes[1:], None], strict=True):
        dout = s.out if s.dout_received else 0
        arriving = after.out_flight if after else 0
        base = held + leaving + carried
        peak = max(peak, base + s.dout_received + dout, base + dout + arriving + s.delta)
        peak = max(peak, base + dout + arriving + s.lse + s.wide)
        held -= s.kept
        peak = max(peak, held + leaving + carried + arriving + s.wide + s.dq_cast)
        peak = max(peak, held + arriving + s.wide - s.dq_wide + s.cast)
        peak = max(peak, held + arriving + s.travelling + s.back_flight + targets[0])
        held, targets = held + sum(targets), (0, 0)
        leaving, carried = s.back_flight, s.carried_wide
        peak = max(peak, held + arriving + leaving)
    return peak


def _output(p: Problem, rank: int) -> int:
    return p.element_bytes * p.batch * p.layout.local_length(rank) * p.heads * p.value_dim


def _gradients(p: Problem, rank: int) -> tuple[int, int]:
    here, keys = p.layout.local_length(rank), p.key_lengths()[rank]
    width = p.sum_bytes if _shared(p) else p.element_bytes
    return (
        p.batch * p.element_bytes * here * p.heads * p.dim,
        p.batch * width * keys * p.groups * (p.dim + p.value_dim),
    )


def _shared(p: Problem) -> frozenset[int]:
    """Key heads that several ranks read, whose gradients are added across ranks."""
    if p.key_layout is None:
        return frozenset()
    runs = [range(*p.key_heads(r)) for r in range(p.parts)]
    return frozenset(g for g in range(p.groups) if sum(g in run for run in runs) > 1)


def _sizes(p: Problem, rank: int, chunk: HeadChunk) -> _Sizes:
    e, w, both = p.element_bytes, p.sum_bytes, p.dim + p.value_dim
    here, all_ = p.layout.local_length(rank), p.layout.length
    heads = len(chunk.queries[rank])
    others = sum(map(len, chunk.queries)) - heads
    keys, all_keys = p.key_lengths()[rank], p.key_length
    moves = p.key_layout is not None
    come = len(chunk.arriving[rank]) if moves else 0
    sent_keys = sum(map(len, chunk.arriving)) - come if moves else 0
    received = (all_ - here) * heads * p.dim + (all_keys - keys) * come * both
    sent = here * others * p.dim + keys * sent_keys * both
    read = len(chunk.keys[rank]) if come else 0
    inside = all_ * heads * p.dim + all_keys * read * both
    out = all_ * heads * p.value_dim
    back_sent, back_received, cast, leaving = _back(p, rank, chunk)
    gradients = all_ * heads * p.dim + all_keys * len(chunk.keys[rank]) * both
    left = len(chunk.keys[rank]) > len(chunk.leaving[rank])
    carried = all_keys * both if left and moves else 0
    b, dq = p.batch, all_ * heads * p.dim if e < w else 0
    return _Sizes(
        in_flight=b * e * (received + sent),
        in_received=b * e * received,
        inside=b * e * inside if p.parts > 1 else 0,
        out_wide=b * w * out,
        out_cast=b * e * out if e < w else 0,
        lse=b * w * all_ * heads,
        out_flight=b * e * p.value_dim * ((all_ - here) * heads + here * others),
        dout_received=b * e * p.value_dim * (all_ - here) * heads,
        delta=b * w * out * (3 if e < w else 1),
        wide=b * w * gradients,
        dq_wide=b * w * dq,
        dq_cast=b * e * dq,
        cast=b * cast,
        travelling=b * (e * all_ * heads * p.dim + leaving),
        back_flight=b * (back_sent + back_received),
        carried=b * e * carried,
        carried_wide=b * w * carried,
    )


def _back(p: Problem, rank: int, chunk: HeadChunk) -> tuple[int, int, int, int]:
    """Of gradients going back, bytes a batch row: sent, received, cast, and dk and dv leaving."""
    e, w, both = p.element_bytes, p.sum_bytes, p.dim + p.value_dim
    here, all_ = p.layout.local_length(rank), p.layout.length
    heads = len(chunk.queries[rank])
    others = sum(map(len, chunk.queries)) - heads
    sent, received = e * (all_ - here) * heads * p.dim, e * here * others * p.dim
    cast = e * all_ * heads * p.dim if e < w else 0
    leaving = 0
    if p.key_layout is not None:
        shared, keys = _shared(p), p.key_lengths()[rank]
        width = [sum(w if g in shared else e for g in run) for run in chunk.leaving]
        sent += (p.key_length - keys) * both * width[rank]
        received += keys * both * (sum(width) - width[rank])
        leaving = p.key_length * both * width[rank]
        alone = sum(g not in shared for g in chunk.leaving[rank])
        cast += e * p.key_length * both * alone if e < w else 0
    return sent, received, cast, leaving
