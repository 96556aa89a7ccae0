"""The training loop: one function per phase of a run, one method per phase of a step.

What all ranks must know together travels in one small reduce before the backward pass: valid
tokens of the whole global batch, samples that could not be read, and whether somebody asked to
stop. Losses and gradients that are not finite need no exchange of their own: both are global sums.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from xdist.checkpoint.points import OnPoint, ignore
from xdist.comm.ledger import ledger
from xdist.comm.reduce import start_reduce
from xdist.config import Config
from xdist.data.loader import BadSamples
from xdist.errors import CheckpointError, DataError
from xdist.memory.allocator import keep_small_blocks
from xdist.mesh import Mesh, init_mesh
from xdist.train import setup
from xdist.train.agree import share_json, share_json_rows, together
from xdist.train.bad_steps import BadSteps
from xdist.train.desync import check_equal
from xdist.train.engines.build import build_engine
from xdist.train.engines.protocol import Engine
from xdist.train.evaluate import Evaluation
from xdist.train.failures import record_failure
from xdist.train.feed import StepBatch, tokens_of
from xdist.train.guard import PREEMPTED, Guard, OnAbort, print_error
from xdist.train.keeper import Keeper
from xdist.train.metrics import PeakMemory, StepMetrics, gather_numbers
from xdist.train.progress import Progress, open_progress
from xdist.train.record import Record
from xdist.train.resume import resume, stage_of, state_of
from xdist.train.saving import Outcome, Saving
from xdist.train.schedule import learning_rate
from xdist.train.summary import finish_run
from xdist.train.tensorboard import Board, open_board
from xdist.train.workload import Workload, open_workload
from xdist_kernels import backend

# Larger than any number of ranks.
WITHOUT_DATA = 2.0**32

BuildModel = Callable[[Config], nn.Module]


def run(
    config: Config,
    *,
    build: BuildModel | None = None,
    on_point: OnPoint = ignore,
    on_abort: OnAbort = print_error,
) -> int:
    """Train as this rank of the run that `config` describes; the exit code is returned.

    Each rank of a run calls it, with torchrun's variables in its environment (none: one rank).
    `build` makes the model, the same on every rank; by default the one that config.model names.
    It must have `loss(tokens, labels, shard, *, valid_tokens) -> scalar` with the meaning of
    `xdist.cross_entropy`: the global mean, whose backward is that of this rank's own terms; of
    grids `loss(x, labels, gshard, *, valid_tokens)`.
    `on_point` is told of the named points of each step and save, for tests that cut a run there.

    A rank that hangs ends the process of every rank, from the watchdog's thread, with exit code 7
    (8: the ranks make different moves): `on_abort` gets the error before that.

    Returns 0 when the curriculum is done, 75 when a signal stopped it after saving. Raises an
    XdistError, whose `exit_code` the process should end with, after status.json was written.
    """
    torch.set_num_threads(config.run.threads)
    kernels = backend.default()
    # Tiles reuse their memory instead of asking the system for fresh pages; no effect elsewhere.
    keep_small_blocks()
    record = Record(config.run_directory, setup.rank_of_process())
    guard = Guard(config, record, on_abort)
    loop: Loop | None = None
    try:
        if config.run.kernels != "auto":
            backend.set_default(config.run.kernels)
        mesh = init_mesh(
            data=config.parallel.data,
            ring=config.parallel.ring,
            ulysses=config.parallel.ulysses,
            timeout_s=guard.move_timeout_s,
            join_timeout_s=config.launch.init_timeout_s,
            settings=setup.settings_lines(config),
        )
        guard.open(mesh)
        # The plan knows the models of xdist; there is none for a model of the caller's. What the
        # message of a rank without memory asks of it are the formulas of models of tokens.
        guard.planned = build is None and config.data.kind == "text"
        parts = Parts(build or setup.build_model, build is None, on_point, guard)
        loop = Loop(config, mesh, record, parts)
        return loop.run()
    except BaseException as caught:
        error = guard.understood(caught, loop.engine if loop else None)
        record_failure(error, record, guard.step)
        if error is caught:
            raise
        raise error from caught
    finally:
        backend.set_default(kernels)
        guard.close()
        if loop is not None:
            loop.close()
        record.close()


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a run is made with besides its config."""

    build: BuildModel
    planned: bool  # whether the plan knows the model
    on_point: OnPoint
    guard: Guard


class Loop:
    """One run on one rank."""

    def __init__(self, config: Config, mesh: Mesh, record: Record, parts: Parts) -> None:
        self.config, self.mesh, self.record = config, mesh, record
        self.guard, self._on_point = parts.guard, parts.on_point
        self.work: Workload = together(
            mesh, lambda: open_workload(config, mesh, known=parts.planned)
        )
        torch.manual_seed(config.run.seed)
        module = parts.build(config).to(mesh.device)
        self.engine: Engine = build_engine(config, module, mesh)
        self.position, notes = resume(record, config, mesh, self.engine, self.work.identity)
        self.guard.resumed(self.position.step)
        notes += self.guard.notes
        self.bad = BadSamples(config.data.max_bad)
        self.bad.count = self.position.bad_samples
        self.memory = PeakMemory(mesh.device)
        self.plan = self.work.plan() if parts.planned else setup.no_plan(config)
        facts = {**self.work.facts(), "measure": self.work.measure}
        record.describe(*setup.describe(config, mesh, self.engine, self.plan, facts))
        at_end = self.position.step == config.train.total_steps
        dropped = record.open_metrics(self.position.step, at_end=at_end)
        if dropped:
            notes.append(
                f"dropped {dropped} lines of metrics.jsonl after step {self.position.step}"
            )
        if not self.memory.exact:
            notes.append("peak memory is that since the start: /proc/self/clear_refs is refused")
        self.board: Board | None = None
        if config.log.tensorboard:
            self.board = open_board(record.directory / "tensorboard", record.rank)
        self.feed = together(mesh, lambda: self.work.feed(self.position))
        self.progress: Progress = open_progress(
            config, record.rank, self.position.step, self.work.measure
        )
        for note in notes:
            self.progress.say(note)
        saving = Saving(record.checkpoints, config.checkpoint, mesh, self._on_point)
        saved = self.position.step if record.last_checkpoint else None
        self.keeper = Keeper(saving, self._held, self._save_ended, self.progress.say, saved)
        self.keeper.last = record.last_checkpoint
        self.bad_steps = BadSteps(self.engine, mesh, record, max_skipped=config.train.max_skipped)

    def run(self) -> int:
        """All steps that are left, then the final save, evaluation and report."""
        self.record.status("running", self.position.step)
        total, every = self.config.train.total_steps, self.config.checkpoint.every_steps
        before = self.position.step
        if self._evaluation_is_missing() and self.evaluate() is None:
            return self._preempted()
        while self.position.step < total:
            stopping = self.step()
            done = self.position.step
            self.guard.step = done
            self.record_step_done()
            # Before the save: a checkpoint means that everything up to it is on record.
            if done > before and self._evaluates_after(done):
                stopping = self.evaluate() is None or stopping
            if stopping:
                return self._preempted()
            if done < total and (
                self.keeper.due or (every and done > before and done % every == 0)
            ):
                self.keeper.save(done)
            before = done
        not_saved = self._save_last()
        final = self.evaluate()
        if final is None:
            return self._preempted()
        try:
            finish_run(self.record, self.progress, lambda: self.work.summary(final))
        except OSError as error:
            if not_saved is None:
                raise
            raise not_saved from error
        if not_saved is not None:
            raise not_saved
        self.record.status("finished", total, exit_code=0)
        self._on_point("train.finished")
        return 0

    def _evaluates_after(self, step: int) -> bool:
        every = self.config.evaluate.every_steps
        return bool(every) and 0 < step < self.config.train.total_steps and step % every == 0

    def _evaluation_is_missing(self) -> bool:
        """Whether a signal cut the evaluation short that belongs before the next step."""
        step = self.position.step
        if not self._evaluates_after(step):
            return False
        return bool(share_json(not self.record.has_evaluation(step), self.mesh))

    def _preempted(self) -> int:
        not_saved = self._save_last()
        if not_saved is not None:
            raise not_saved
        step, reason = self.position.step, self.guard.stop.reason
        self.record.status("preempted", step, exit_code=PREEMPTED, reason=reason)
        self.progress.say(f"stopped after step {step}: {reason}")
        return PREEMPTED

    def step(self) -> bool:
        """One optimizer step; whether the run was asked to stop after it.

        A rank that is asked to stop while it waits for data ends the step before it began.
        """
        began = time.perf_counter()
        self.memory.start()
        number = self.position.step
        self.guard.span("step", number + 1)
        self.guard.enter("data")
        self._on_point("train.step")
        index = stage_of(self.config, number)
        stage = self.config.train.curriculum[index]
        rate = learning_rate(self.config.optimizer, number, self.config.train.total_steps)
        batch = self.feed.next_step(lambda: self.guard.asked)
        self.guard.enter("agreement")
        with ledger() as counted:
            sums = self._count(batch)
        if sums[3] >= WITHOUT_DATA:
            self.guard.asked_elsewhere()
            return True
        batch, valid, stopping = self._agree_on(batch, sums)
        with ledger() as moved:
            loss = self._backward(batch, valid)
            self._on_point("train.backward")
            self.guard.enter("reduce")
            norm = self.engine.finish()
        self.guard.enter("update")
        self._on_point("train.reduced")
        skipped = self.bad_steps.update(self.position, batch, loss=loss, norm=norm, rate=rate)
        self._on_point("train.updated")
        self.position.made_step(self.config, batch.samples)
        self.guard.enter("record")
        self._check_equal(self.config.train.check_every_steps)
        elapsed = time.perf_counter() - began
        peaks, sent = gather_numbers(
            [self.memory.peak_bytes(), counted.sent_bytes + moved.sent_bytes], self.mesh
        )
        metrics = StepMetrics(
            step=number + 1,
            stage=index,
            sequence_length=self.config.tokens_of(stage),
            loss=loss,
            tokens_per_s=tokens_of(self.config, stage) / elapsed,
            step_s=elapsed,
            learning_rate=rate,
            grad_norm=norm,
            sample_cursor=self.position.sample_cursor,
            peak_memory_bytes=peaks,
            sent_bytes=sent,
            planned_bytes=self.plan.sent_bytes[index],
            skipped=skipped,
        )
        self.record.metrics(metrics.line())
        self._on_point("train.recorded")
        if self.board is not None:
            self.board.step(metrics)
        self.progress.step(metrics)
        return stopping

    def record_step_done(self) -> None:
        """Say in status.json how far the run is."""
        if self.record.rank == 0:
            self.record.status("running", self.position.step)
        self._on_point("train.status")

    def _count(self, batch: StepBatch) -> Tensor:
        """Over all ranks: valid tokens, rows that could not be read, ranks that cannot go on,
        ranks that were asked to stop (WITHOUT_DATA: before they had any), ranks that have done
        their part of the save in flight; float64 [5], one reduce."""
        stop = WITHOUT_DATA if batch.given_up else int(self.guard.asked)
        mine = [batch.valid_tokens, batch.bad_rows, batch.error is not None, stop]
        return self._sum(torch.tensor([*mine, self.keeper.waiting], dtype=torch.float64))

    def _agree_on(self, batch: StepBatch, sums: Tensor) -> tuple[StepBatch, int, bool]:
        """The batch without samples that any rank could not read, its valid tokens over all
        ranks, and whether any rank was asked to stop."""
        valid, bad, failed, stop, written = sums.tolist()
        if written == self.mesh.world_size:
            self.keeper.go_on()
        if failed:
            together(self.mesh, lambda: _raise(batch.error))
        if bad:
            flags = self._sum(batch.flags())
            self._count_bad(batch, flags)
            batch = batch.without(flags)
            count = torch.tensor([batch.valid_tokens], dtype=torch.float64)
            valid = float(self._sum(count))
        if stop:
            self.guard.asked_elsewhere()
        return batch, int(valid), bool(stop)

    def _count_bad(self, batch: StepBatch, flags: Tensor) -> None:
        """Count dropped samples the same on all ranks; past the cap every rank raises."""
        whys = [why for micro in batch.micro for _, why in micro.bad]
        told = [why for rank in share_json_rows(whys, self.mesh) for why in rank]
        count = int((flags > 0).sum())
        self.progress.say(f"dropped {count} samples: {'; '.join(told)}")
        together(self.mesh, lambda: self.bad.add(count, told[-1]))
        self.position.bad_samples = self.bad.count

    def _backward(self, batch: StepBatch, valid: int) -> float:
        """Forward and backward of every micro-step; the loss over the whole global batch.

        Each micro-step's loss is its sum over the valid tokens of all of them: they add up.
        """
        total = 0.0
        for micro in batch.micro:
            self.guard.enter("forward")
            loss = self.work.loss(self.engine, micro, self.position.step, valid)
            self.guard.enter("backward")
            self.engine.backward(loss)
            total += float(loss.detach())
        return total

    def _held(self) -> tuple[Engine, dict[str, Any]]:
        """What a save writes, after a look at whether the ranks still hold the same."""
        self.guard.span("save after step", self.position.step)
        self.guard.enter("save")
        self._check_equal(1)
        state = state_of(self.config, self.mesh, self.position, self.work.identity)
        return self.engine, state

    def _save_last(self) -> CheckpointError | None:
        self.guard.span("save after step", self.position.step)
        self.guard.enter("save")
        return self.keeper.save_last(self.position.step)

    def _save_ended(self, outcome: Outcome) -> None:
        """Put on record how a save ended."""
        if outcome.ok:
            self.record.last_checkpoint = str(outcome.path)
            self.guard.saved(outcome.step)
        self.record_step_done()

    def _check_equal(self, every: int) -> None:
        """Every so many steps, compare what must be equal on all ranks (desync.py)."""
        step = self.position.step
        if every and step % every == 0:
            check_equal(self.engine.replicated(), self.mesh, when=f"after step {step}")

    def evaluate(self) -> Evaluation | None:
        """Evaluate now and write a line with `eval`; None when a signal cut it short."""
        began = time.perf_counter()
        result = self.work.evaluate(self.engine, self._next_window)
        if result is None:
            self.guard.asked_elsewhere()
            return None
        elapsed = time.perf_counter() - began
        step = self.position.step
        self.record.metrics({"step": step, "eval": {**result.line(), "seconds": elapsed}})
        if self.board is not None:
            self.board.evaluation(step, result)
        self.progress.say(f"held out after step {step}: {result.told} in {elapsed:.1f} s")
        return result

    def _next_window(self) -> bool:
        """An evaluation goes on with its next sequence; whether it should not."""
        self.guard.span("evaluation after step", self.position.step)
        self.guard.enter("evaluation")
        return self.guard.asked

    def close(self) -> None:
        """End the reading thread, the thread that saves, the display and the board."""
        self.keeper.close()
        self.feed.close()
        self.progress.close()
        if self.board is not None:
            self.board.close()

    def _sum(self, values: Tensor) -> Tensor:
        return start_reduce(values.to(self.mesh.device), self.mesh.parameter_group).wait().cpu()


def _raise(error: DataError | None) -> None:
    if error is not None:
        raise error
