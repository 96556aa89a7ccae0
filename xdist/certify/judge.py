"""Compares measurements of several ranks with one rank in float64, and says what is wrong.

err = max|a - b| / max|b| per tensor (law 1). float64 must be within 1e-10. float32 and bfloat16 are
held to what one rank loses against float64 in the same precision: at most `FACTOR` times that (for
gradients: of the parameter that loses most), and 2e-6 is always granted. Law 1 says 1.5 per tensor
for the median of five seeds; one draw of a small tensor scatters more. Wrong logic shows in
float64; what these rows add is that sums across ranks are not made in something narrower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from xdist.certify.measure import Measurement, Request
from xdist.documents import Documents
from xdist.errors import NumericsError

FLOAT64_TOLERANCE = 1e-10
FLOOR = 2e-6
FACTOR = 3.0
# Masked scores may still move a row's maximum and with it the last bits of other outputs; what
# a token passes on is far above this.
LEAK_TOLERANCE = {"float64": 1e-11, "float32": 1e-5, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: where, what with its numbers, and what to do."""

    ranks: int
    dtype: str
    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.ranks} rank(s), {self.dtype}: {self.what}\n    {self.do}"


@dataclass(frozen=True)
class Row:
    """One line of the table: errors of one rank count in one dtype; bytes summed over ranks."""

    ranks: int
    dtype: str
    outputs: float
    loss: float
    gradient: float
    worst: str
    leak: float
    sent_bytes: int
    planned_bytes: int | None
    dim: int | None = None  # of grids: which is sharded first


@dataclass
class Report:
    """All rows and all findings of one certification."""

    request: Request
    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.findings

    def table(self) -> str:
        """The rows as aligned plain text."""
        from xdist.certify.table import render

        return render(self)

    def raise_if_failed(self) -> None:
        """Raises NumericsError with every finding."""
        if self.findings:
            raise NumericsError(
                f"certification failed with {len(self.findings)} finding(s)",
                "\n".join(str(finding) for finding in self.findings),
                "mend the module, or leave out the setting that breaks it",
            )


def relative_error(value: Tensor, reference: Tensor) -> float:
    """max|a - b| / max|b|; the plain difference where the reference is all zeros."""
    if reference.numel() == 0:
        return 0.0
    difference = (value.double() - reference.double()).abs().max()
    if not bool(torch.isfinite(difference)):
        return float("inf")
    scale = float(reference.double().abs().max())
    return float(difference) / (scale if scale > 0 else 1.0)


def whole(measurements: Sequence[Measurement], name: str, length: int) -> Tensor:
    """[B, N] in global order from every rank's [B, n] of `outputs` or `probed`."""
    parts = [getattr(m, name) for m in measurements]
    out = parts[0].new_full((parts[0].shape[0], length), float("nan"))
    for measurement, part in zip(measurements, parts, strict=True):
        out[:, measurement.positions] = part
    return out


@dataclass(frozen=True)
class Comparison:
    """Several ranks beside one: `ranks` by rank; `one` the same dtype on one rank; `reference`
    one rank in float64 (`one` itself when that is the dtype)."""

    request: Request
    dtype: str
    ranks: Sequence[Measurement]
    one: Measurement
    reference: Measurement

    def allowed(self, error_of_one_rank: float) -> float:
        """The largest error that passes, given what one rank's rounding costs in this dtype."""
        if self.dtype == "float64":
            return FLOAT64_TOLERANCE
        return max(FLOOR, FACTOR * error_of_one_rank)

    def finding(self, what: str, do: str) -> Finding:
        return Finding(len(self.ranks), self.dtype, what, do)


def judge(comparison: Comparison, planned_bytes: Sequence[int] | None) -> tuple[Row, list[Finding]]:
    """The table's row and what is wrong, for one rank count in one dtype."""
    findings = _weights(comparison)
    output_error, found = _outputs(comparison)
    findings += found
    loss_error, found = _loss(comparison)
    findings += found
    gradient_error, worst, found = _gradients(comparison)
    findings += found
    leak, found = _probe(comparison)
    findings += found
    sent = [m.sent_bytes for m in comparison.ranks]
    if planned_bytes is not None and list(planned_bytes) != sent:
        findings.append(
            comparison.finding(
                f"sent bytes by rank are {sent}, the plan says {list(planned_bytes)}; by move, "
                f"on rank 0: {comparison.ranks[0].sent_by_move}",
                "plan and module disagree about a move: compare with the plan's moves",
            )
        )
    row = Row(
        ranks=len(comparison.ranks),
        dtype=comparison.dtype,
        outputs=output_error,
        loss=loss_error,
        gradient=gradient_error,
        worst=worst,
        leak=leak,
        sent_bytes=sum(sent),
        planned_bytes=None if planned_bytes is None else sum(planned_bytes),
    )
    return row, findings


def _weights(c: Comparison) -> list[Finding]:
    apart = [rank for rank, m in enumerate(c.ranks) if m.weights != c.one.weights]
    if not apart:
        return []
    return [
        c.finding(
            f"ranks {apart} start from other weights than one rank does",
            "draw parameters from torch's generator alone, in an order that no rank changes",
        )
    ]


def _outputs(c: Comparison) -> tuple[float, list[Finding]]:
    length = c.request.length
    expected = whole([c.reference], "outputs", length)
    outputs = whole(c.ranks, "outputs", length)
    error = relative_error(outputs, expected)
    limit = c.allowed(relative_error(whole([c.one], "outputs", length), expected))
    if error <= limit:
        return error, []
    scale = float(expected.abs().max()) or 1.0
    wrong = ~((outputs - expected).abs() <= limit * scale)
    position = int(torch.nonzero(wrong.any(dim=0))[0])
    layout = c.request.make_layout(len(c.ranks))
    piece = next(piece for piece in layout.pieces if piece.start <= position < piece.stop)
    return error, [
        c.finding(
            f"outputs differ by {error:.1e} (at most {limit:.1e}); {int(wrong.sum())} of "
            f"{wrong.numel()} are wrong, first at position {position}: token "
            f"{position - piece.start} of the segment [{piece.start}, {piece.stop}) of rank "
            f"{piece.rank}",
            "wrong from a segment's first tokens on: a layer lacks its shard, or looks back "
            "without a halo or a scan; wrong everywhere: positions, or a mean, are local",
        )
    ]


def _loss(c: Comparison) -> tuple[float, list[Finding]]:
    scale = abs(c.reference.loss) or 1.0
    error = max(abs(m.loss - c.reference.loss) / scale for m in c.ranks)
    if error <= c.allowed(abs(c.one.loss - c.reference.loss) / scale):
        return error, []
    return error, [
        c.finding(
            f"the loss by rank is {[m.loss for m in c.ranks]}, on one rank {c.reference.loss!r}",
            "return the same global mean on every rank: xdist.cross_entropy or xdist.mean",
        )
    ]


def _gradients(c: Comparison) -> tuple[float, str, list[Finding]]:
    largest, worst, findings = 0.0, "", []
    expected_gradients = c.reference.gradients
    limit = c.allowed(
        max(
            (relative_error(c.one.gradients[n], g) for n, g in expected_gradients.items()),
            default=0.0,
        )
    )
    for name, expected in expected_gradients.items():
        gradient = c.ranks[0].gradients[name]
        error = relative_error(gradient, expected)
        if not error <= largest:
            largest, worst = error, name
        if not error <= limit:
            findings.append(
                c.finding(
                    f"the gradient of {name} differs by {error:.1e} (at most {limit:.1e})",
                    _gradient_advice(gradient, expected, len(c.ranks)),
                )
            )
        if len({m.digests[name] for m in c.ranks}) > 1:
            findings.append(
                c.finding(
                    f"after the sum over ranks, ranks hold different gradients of {name}",
                    "let xdist.reduce_gradients be the last to touch gradients",
                )
            )
    return largest, worst, findings


def _gradient_advice(gradient: Tensor, expected: Tensor, ranks: int) -> str:
    """A factor that explains the difference points at averaging or at counting P times."""
    norm = float(expected.double().square().sum())
    factor = float((gradient.double() * expected.double()).sum()) / norm if norm > 0 else 0.0
    explained = relative_error(gradient, factor * expected) < 1e-4
    if ranks > 1 and explained and abs(factor * ranks - 1) < 1e-3:
        return f"it is 1/{ranks} of it: gradients were averaged; each rank's is a part, sum them"
    if ranks > 1 and explained and abs(factor / ranks - 1) < 1e-3:
        return (
            f"it is {ranks} times it: each rank counted every token; use xdist.mean or "
            "xdist.cross_entropy for the loss, and sum gradients once"
        )
    if explained and factor != 0.0 and abs(factor - 1) > 1e-3:
        return f"it is {factor:.6g} times it: a sum or a mean counts ranks or tokens wrongly"
    if ranks > 1 and relative_error(gradient, expected) < 1e-2:
        return "small and in no simple ratio: a sum across ranks in a narrow dtype, or a lost edge"
    return "a move's backward is missing: use the differentiable forms of xdist.ops and xdist.comm"


def _probe(c: Comparison) -> tuple[float, list[Finding]]:
    """Which outputs moved when one token of each row was changed; the largest forbidden move."""
    request = c.request
    before = whole(c.ranks, "outputs", request.length)
    change = (whole(c.ranks, "probed", request.length) - before).abs() / float(before.abs().max())
    documents = Documents.of(request.documents, request.length)
    largest, findings = 0.0, []
    for row, position in enumerate(request.probes):
        document = int(documents.index(np.array([position]))[0])
        start, stop = documents.cu_seqlens[document], documents.cu_seqlens[document + 1]
        forbidden = change[row].clone()
        forbidden[position if request.causal else start : stop] = 0.0
        leak = float(forbidden.max())
        largest = max(largest, leak)
        if not leak <= LEAK_TOLERANCE[c.dtype]:
            reached = int(forbidden.argmax())
            whom = "an earlier token" if start <= reached < position else "another document"
            findings.append(
                c.finding(
                    f"token {position} reaches {whom}: the output at {reached} moved by {leak:.1e}",
                    "a mask is missing or local: pass the shard, whose documents and positions "
                    "are global, to every layer that looks along the sequence",
                )
            )
        if float(change[row].max()) == 0.0:
            findings.append(
                c.finding(
                    f"changing token {position} changes no output at all",
                    "the probe sees nothing: does the module use its tokens?",
                )
            )
    return largest, findings
