"""When a run saves: one at a time, a late one at the next step boundary, the last one surely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from xdist.errors import CheckpointError
from xdist.train.saving import Outcome, Saving, Source

Held = Callable[[], tuple[Source, dict[str, Any]]]


class Keeper:
    """Asks `Saving` for the saves of a run, and remembers how they ended. Alike on all ranks.

    `held` prepares a save and gives the engine and the state; `on_end` is told how each save
    ended; `say` tells the user. `saved` is the step of the checkpoint that the run came from.
    """

    def __init__(
        self,
        saving: Saving,
        held: Held,
        on_end: Callable[[Outcome], None],
        say: Callable[[str], None],
        saved: int | None,
    ) -> None:
        self.due = False
        self.last = ""
        self._saving, self._held, self._on_end, self._say = saving, held, on_end, say
        self._saved, self._why = saved, ""

    @property
    def waiting(self) -> bool:
        """Whether this rank has nothing left to do for the save in flight."""
        return self._saving.waiting

    def go_on(self) -> None:
        """At a step boundary at which all ranks were `waiting`."""
        self._note(self._saving.advance())

    def save(self, step: int) -> None:
        """Save, or begin to; while one is still being written, `due` says that this one waits."""
        before = self._saving.in_flight
        if before is not None:
            if not self.due:
                self._say(
                    f"the save due after step {step} waits: that of step {before} is still being "
                    "written"
                )
            self.due = True
            return
        self.due = False
        self._note(self._saving.save(step, *self._held()))

    def save_last(self, step: int) -> CheckpointError | None:
        """Have `step` on the disk before the run ends; the error to raise when it is not."""
        self._note(self._saving.finish())
        if self._saved != step:
            self.save(step)
            self._note(self._saving.finish())
        if self._saved == step:
            return None
        error = CheckpointError(
            f"the run ends at step {step}, and its last checkpoint could not be saved",
            self._why,
            f"the newest checkpoint is {self.last or 'none at all'}; mend the cause and start "
            "again: training resumes from there",
        )
        error.agreed = True  # type: ignore[attr-defined]
        return error

    def close(self) -> None:
        """When the run is over, however it ended."""
        self._saving.close()

    def _note(self, outcome: Outcome | None) -> None:
        if outcome is None:
            return
        if outcome.ok:
            self._saved, self.last = outcome.step, str(outcome.path)
        else:
            self._why = outcome.text.replace("\n", "; ")
            self._say(outcome.text)
        self._on_end(outcome)
