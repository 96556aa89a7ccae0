"""Batches made ahead by one thread, in order."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Self, TypeVar

from xdist.errors import ConfigError

T = TypeVar("T")
_POLL_S = 0.1
_LAST_READ_S = 10.0


class _End:
    """Behind the last batch: the error that ended them, if any."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


class ReadAhead(Generic[T]):
    """Iterates over `batches`; a thread makes `prefetch` of them ahead.

    Use as a context manager, or call `close`: the thread ends with it. An exception in the thread
    is raised by `next` at the batch it belongs to. 0 makes them in the caller's thread.

    `waited_s` adds up how long `next` had to wait.
    """

    def __init__(self, batches: Iterable[T], prefetch: int = 2) -> None:
        if prefetch < 0:
            raise ConfigError("data.prefetch cannot be negative", f"got {prefetch}")
        self.waited_s = 0.0
        self._batches = iter(batches)
        self._stop = threading.Event()
        self._ready: queue.Queue[T | _End] = queue.Queue(max(prefetch, 1))
        self._held: list[T | _End] = []  # at most one: what `next` gives
        self._thread: threading.Thread | None = None
        if prefetch:
            self._thread = threading.Thread(target=self._read_ahead, name="xdist-data", daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._stop.is_set() or not self.wait(lambda: False):
            raise StopIteration
        item = self._held.pop()
        if not isinstance(item, _End):
            return item
        self.close()
        if item.error is None:
            raise StopIteration
        raise item.error

    def wait(self, give_up: Callable[[], bool]) -> bool:
        """Wait until `next` need not wait; False when `give_up()` was true or this was closed."""
        began = time.monotonic()
        while not self._held and not self._stop.is_set():
            if self._thread is None:
                self._held.append(next(self._batches, _End()))
                break
            with contextlib.suppress(queue.Empty):
                self._held.append(self._ready.get(timeout=_POLL_S))
            if not self._held and give_up():
                break
        self.waited_s += time.monotonic() - began
        return bool(self._held)

    def close(self) -> None:
        """Stop reading ahead and wait for the thread, but not for a read that never comes back.

        May be called twice.
        """
        self._stop.set()
        if self._thread is not None:
            self._thread.join(_LAST_READ_S)

    def _read_ahead(self) -> None:
        try:
            for batch in self._batches:
                if not self._put(batch):
                    return
            self._put(_End())
        # Whatever goes wrong here belongs to the consumer.
        except BaseException as error:
            self._put(_End(error))

    def _put(self, item: T | _End) -> bool:
        """Hand one item over; False when this was closed instead."""
        while not self._stop.is_set():
            try:
                self._ready.put(item, timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False
