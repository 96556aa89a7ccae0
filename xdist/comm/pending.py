"""A move under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
S = TypeVar("S")


class Pending(Generic[T]):
    """The result of a started move; `wait()` gives it, as often as asked.

    Every rank of the group must have started the same moves in the same order, and each must be
    waited for once.
    """

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish
        self._value: T | None = None

    @classmethod
    def done(cls, value: T) -> Pending[T]:
        """A move that had nothing to wait for."""
        return cls(lambda: value)

    def wait(self) -> T:
        """Block until the data are here.

        Raises:
            PeerLost: a rank of the group died or hung.
        """
        if self._finish is not None:
            # Dropped before the value is kept, so that the buffers sent are freed.
            finish, self._finish = self._finish, None
            self._value = finish()
        return self._value  # type: ignore[return-value]

    def then(self, change: Callable[[T], S]) -> Pending[S]:
        """The same move with its result changed after the wait."""
        return Pending(lambda: change(self.wait()))
