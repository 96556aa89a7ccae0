"""One rank of a pool: waits for functions, runs them, sends back results or a traceback."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, ClassVar

import torch


class _Encoder(ForkingPickler):
    """Copies tensors into the message.

    Torch would pass them as shared memory, which is lost when a rank ends before it is read.
    """

    _extra_reducers: ClassVar[dict[type, Any]] = {}


def encode(value: Any) -> bytes:
    """`value` as bytes for another process of this machine."""
    buffer = io.BytesIO()
    _Encoder(buffer).dump(value)
    return buffer.getvalue()


@dataclass
class Reply:
    """What a rank answered. `details` is empty unless it failed; `at_s` is the monotonic clock."""

    value: Any = None
    details: str = ""
    kind: str = ""
    at_s: float = 0.0
    died: bool = False

    @classmethod
    def decode(cls, message: bytes) -> Reply:
        """The reply from its bytes."""
        return cls(*ForkingPickler.loads(message))

    def encode(self) -> bytes:
        """The reply as bytes; one whose value cannot travel becomes a failure."""
        try:
            return encode((self.value, self.details, self.kind, self.at_s))
        except Exception:
            kind, details = "TypeError", f"the result cannot be sent\n{traceback.format_exc()}"
            return encode((None, details, kind, self.at_s))


def work(pipe: Connection, rank: int, world_size: int, port: int, threads: int) -> None:
    """Serve calls until the other end of `pipe` closes, then end, whatever is running."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        # The pool holds the store, so that its port needs no choosing and rank 0 may die.
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    torch.set_num_threads(threads)
    calls: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, calls), daemon=True).start()
    while True:
        reply = _answer(calls.get(), rank)
        sys.stdout.flush()
        sys.stderr.flush()
        pipe.send_bytes(reply.encode())


def _listen(pipe: Connection, calls: SimpleQueue[bytes]) -> None:
    while True:
        try:
            calls.put(pipe.recv_bytes())
        except (EOFError, OSError):
            # The pool is gone, by close() or by death: nobody may be left behind.
            os._exit(0)


def _answer(message: bytes, rank: int) -> Reply:
    try:
        number, fn, args = ForkingPickler.loads(message)
        # Groups made in this call meet under keys of their own.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)
        return Reply(value=fn(*args), at_s=time.monotonic())
    except BaseException as error:
        at_s = time.monotonic()
        details = f"[rank {rank}] " + "".join(traceback.format_exception(error)).rstrip()
        return Reply(details=details, kind=type(error).__name__, at_s=at_s)
