"""Saves of a run: all ranks write, together they succeed or fail, and a thread may do the writing.

One save is: rank 0 makes a folder and shares its name; every rank writes its own pieces; what they
wrote is gathered; rank 0 writes the manifest and gives the folder its name. With
`checkpoint.asynchronous` the two steps in the middle of which nobody waits for anybody run in a
thread, from copies; that a step has ended on all ranks is learnt from the numbers that the loop
sums up in every optimizer step, so that no thread ever exchanges anything.
"""

from __future__ import annotations

import pathlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from xdist.checkpoint.pieces import Piece, Spec
from xdist.checkpoint.points import OnPoint, ignore
from xdist.checkpoint.write import Part, abandon, publish, start_folder, write_part
from xdist.config import Checkpoint
from xdist.errors import CheckpointError, NumericsError
from xdist.mesh import Mesh
from xdist.train.agree import share_json, share_json_rows, together

T = TypeVar("T")
# A failed run waits as long for its thread; what it leaves half-written is removed by the next.
_LEAVE_S = 2.0


class Source(Protocol):
    """The part of an engine that a save asks."""

    def specs(self) -> dict[str, Spec]: ...
    def pieces(self) -> dict[str, Piece]: ...


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on every rank.

    `text` is the line to log when it failed. `blocked_s` is how long the ranks were kept from
    training by it (this rank's own clock).
    """

    ok: bool
    step: int
    path: pathlib.Path | None = None
    text: str = ""
    blocked_s: float = 0.0


@dataclass
class _Flight:
    """A save that has begun: its folder, and what runs for it now."""

    step: int
    specs: dict[str, Spec]
    state: dict[str, Any]
    folder: pathlib.Path
    job: _Job | None = None
    publishing: bool = False


class Saving:
    """Saves of one run: one failed save is a warning, two in a row end the run.

    Every rank makes the same calls in the same order.
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        settings: Checkpoint,
        mesh: Mesh,
        on_point: OnPoint = ignore,
    ) -> None:
        self.directory = pathlib.Path(directory)
        self.failures = 0
        self._settings, self._mesh, self._on_point = settings, mesh, on_point
        self._buffers = _Buffers()
        self._flight: _Flight | None = None
        self._blocked_s = 0.0

    @property
    def in_flight(self) -> int | None:
        """The step of the save that is being written in the background."""
        return self._flight.step if self._flight else None

    @property
    def waiting(self) -> bool:
        """Whether this rank has nothing left to do for the save in flight. Asks the thread."""
        flight = self._flight
        return flight is not None and (flight.job is None or flight.job.done)

    def save(self, step: int, source: Source, state: Mapping[str, Any]) -> Outcome | None:
        """Save now. Returns when it is on the disk or has failed to be; asynchronous, as soon as
        this rank's pieces are copied (None), and no save may be in flight.

        Raises, the same on all ranks: NumericsError when a tensor is not finite, CheckpointError
        when two saves in a row failed.
        """
        assert self._flight is None, "one save at a time"
        began = time.perf_counter()
        try:
            self._begin(step, source.specs(), dict(state))
            pieces = source.pieces()
            if self._settings.asynchronous:
                pieces = self._buffers.take(pieces)
            self._write(pieces)
        except (CheckpointError, NumericsError) as error:
            return self._failed(step, error)
        finally:
            self._blocked_s = time.perf_counter() - began
        return None if self._settings.asynchronous else self.finish()

    def advance(self) -> Outcome | None:
        """Go on with the save in flight; `waiting` must be true on all ranks. None: not yet done.

        Raises as `save` does.
        """
        flight = self._flight
        assert flight is not None
        began = time.perf_counter()
        try:
            if flight.publishing:
                path = cast("str", share_json(self._result(), self._mesh))
                self._flight, self.failures = None, 0
                blocked = self._blocked_s + time.perf_counter() - began
                return Outcome(True, flight.step, pathlib.Path(path), blocked_s=blocked)
            parts = [Part(*row) for row in share_json_rows(self._result(), self._mesh)]
            flight.publishing = True
            flight.job = None
            if self._mesh.world_rank == 0:
                flight.job = self._start(lambda: self._publish(flight, parts))
        except (CheckpointError, NumericsError) as error:
            return self._failed(flight.step, error)
        finally:
            self._blocked_s += time.perf_counter() - began
        return None

    def finish(self) -> Outcome | None:
        """Wait for the save in flight, if there is one. Raises as `save` does."""
        outcome = None
        while self._flight is not None:
            if self._flight.job is not None:
                self._flight.job.wait()
            outcome = self.advance()
        return outcome

    def close(self) -> None:
        """Wait a little for a save in flight; for when the run failed and nobody else can."""
        if self._flight is not None and self._flight.job is not None:
            self._flight.job.wait(_LEAVE_S)

    def _begin(self, step: int, specs: dict[str, Spec], state: dict[str, Any]) -> None:
        def make() -> str:
            if self._mesh.world_rank != 0:
                return ""
            keep = self._settings.keep
            folder = start_folder(
                self.directory, step, specs, state, keep=keep, on_point=self._on_point
            )
            return str(folder)

        name = cast("str", share_json(together(self._mesh, make), self._mesh))
        self._flight = _Flight(step, specs, state, pathlib.Path(name))

    def _write(self, pieces: dict[str, Piece]) -> None:
        flight = self._flight
        assert flight is not None
        rank, on_point = self._mesh.world_rank, self._on_point
        flight.job = self._start(
            lambda: list(write_part(flight.folder, rank, pieces, on_point=on_point))
        )

    def _publish(self, flight: _Flight, parts: list[Part]) -> str:
        keep, on_point = self._settings.keep, self._on_point
        path = publish(
            flight.folder,
            flight.step,
            flight.specs,
            parts,
            flight.state,
            keep=keep,
            on_point=on_point,
        )
        return str(path)

    def _start(self, work: Callable[[], Any]) -> _Job:
        return _Thread(work) if self._settings.asynchronous else _Inline(work)

    def _result(self) -> Any:
        """What this rank's job gave; an error of any rank's job is raised on all."""
        flight = self._flight
        assert flight is not None
        job = flight.job
        return together(self._mesh, lambda: job.result() if job else None)

    def _failed(self, step: int, error: CheckpointError | NumericsError) -> Outcome:
        """Count a failure that all ranks know of; raise it when the run must end."""
        flight, self._flight = self._flight, None
        if flight is not None and self._mesh.world_rank == 0:
            abandon(flight.folder)
        self.failures += 1
        if isinstance(error, NumericsError) or self.failures > 1:
            raise error
        return Outcome(False, step, text=f"step {step} was not saved: {error}")


class _Job:
    """One piece of work of a save, and how it ended."""

    def __init__(self) -> None:
        self.value: Any = None
        self.error: BaseException | None = None

    @property
    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when it has ended."""

    def result(self) -> Any:
        if self.error is not None:
            raise self.error
        return self.value


class _Inline(_Job):
    """Done at once; an error is kept for `result`, where all ranks hear of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        try:
            self.value = work()
        except (CheckpointError, NumericsError) as error:
            self.error = error


class _Thread(_Job):
    """Done by a thread that does not keep the process alive."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self._work, self._ended = work, threading.Event()
        self._thread = threading.Thread(target=self._run, name="xdist-save", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.value = self._work()
        # Raised again by `result`, in the thread that trains.
        except BaseException as error:
            self.error = error
        finally:
            self._ended.set()

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        self._ended.wait(timeout_s)


class _Buffers:
    """Copies of a rank's pieces in CPU memory that is used again by every save."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, pieces: dict[str, Piece]) -> dict[str, Piece]:
        """The pieces, copied; the engine may change its tensors as soon as this returns."""
        on_card = False
        copies = {}
        for name, piece in pieces.items():
            values = piece.values.detach()
            held = self._held.get(name)
            if held is None or (held.shape, held.dtype) != (values.shape, values.dtype):
                held = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
                self._held[name] = held
            held.copy_(values, non_blocking=values.is_cuda)
            on_card = on_card or values.is_cuda
            copies[name] = Piece(piece.shape, piece.start, held)
        if on_card:
            torch.cuda.synchronize()
        return copies
