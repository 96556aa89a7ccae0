"""Reading a token store: only the chunks that are needed, each one checked.

A store is a zarr v3 group with attributes under `xdist` and one group per split:

    tokens     uint8 | uint16 | uint32 [length]   the documents, one after another
    documents  int64 [documents + 1]              cu_seqlens: where each document starts and ends
    names      uint8                              the documents' names, UTF-8, each ended by NUL
    labels     uint8 | uint16 | uint32 [length]   tasks only: the answer at each token plus 1, or 0
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from xdist.data.guard import GuardedStore
from xdist.data.head import read_head
from xdist.data.identity import FORMAT, TASK_FORMAT
from xdist.errors import DataError

COMMANDS = "`xdist prepare text`, or `xdist prepare task`"
_REMEDY = f"prepare the store again with {COMMANDS}"
FORMATS = (FORMAT, TASK_FORMAT)


class TextStore:
    """A token store made by `xdist prepare text` or `task`, opened for reading.

    Attributes:
        path: the folder.
        vocabulary_size: every token is below it.
        identity: `{"fingerprint": hex, "facts": {...}}`, for a checkpoint's state (JSON).
        figures: what `prepare` measured of the held-out split (JSON), empty for token ids.

    Raises:
        DataError: no store there, another format or version, metadata outside the allowed lists.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, attributes, self.identity = read_head(path, FORMATS, "a store", COMMANDS)
        facts = self.identity["facts"]
        self.vocabulary_size = int(facts["vocabulary_size"])
        self.figures: dict[str, Any] = attributes.get("figures", {})
        self._splits: dict[str, Split] = {}

    @property
    def fingerprint(self) -> str:
        """sha256 over content, document tables and names, hex."""
        return str(self.identity["fingerprint"])

    @property
    def split_names(self) -> list[str]:
        return sorted(self.identity["facts"]["splits"])

    def split(self, name: str) -> Split:
        """The split `name` ("train", "held_out"), opened once.

        Raises:
            DataError: there is no such split.
        """
        if name not in self.split_names:
            raise DataError(
                f"{self.path} has no split {name!r}", f"it has {', '.join(self.split_names)}"
            )
        if name not in self._splits:
            self._splits[name] = Split(self, name)
        return self._splits[name]

    def verify(self) -> None:
        """Read everything and compare it with the recorded hashes.

        Raises:
            DataError: a chunk is missing or damaged, or a hash differs.
        """
        for name in self.split_names:
            self.split(name).verify()


class Split:
    """One split of a store: `length` tokens, of dtype `dtype`.

    sample_length: tokens of one sample of a task, which has answers of its own (`labels`); None of
    text, where every token is the answer to those before it.
    """

    def __init__(self, store: TextStore, name: str) -> None:
        self.name = name
        self.facts: dict[str, Any] = store.identity["facts"]["splits"][name]
        self.vocabulary_size = store.vocabulary_size
        self._store = GuardedStore(store.path)
        self._arrays: dict[str, Any] = {}
        self.sample_length: int | None = self.facts.get("sample_length")
        answers = () if self.sample_length is None else ("labels",)
        for part in ("tokens", "documents", "names", *answers):
            key = f"{name}/{part}"
            self._store.expect(key)
            self._arrays[part] = zarr.open_array(self._store, path=key, mode="r", zarr_format=3)
        self._key = f"{name}/tokens"
        self.length = self._store.facts[self._key].length
        self.dtype = np.dtype(self._arrays["tokens"].dtype)
        lengths = {self._store.facts[f"{name}/{part}"].length for part in ("tokens", *answers)}
        if lengths != {self.facts["tokens"]}:
            raise DataError(
                f"array {self._key} changed after it was prepared",
                f"{self.length} tokens, want {self.facts['tokens']}"
                + (" of them and as many labels" if answers else ""),
                _REMEDY,
            )

    @property
    def bytes_read(self) -> int:
        """Decoded bytes of tokens read from the disk so far: whole chunks, counted at the disk."""
        return self._store.read_bytes[self._key]

    @property
    def chunk_bytes(self) -> int:
        """Decoded bytes of one chunk of tokens: the least that a read costs."""
        return self._store.facts[self._key].chunk_bytes

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens `[start, stop)`, a new array of `dtype`; only the chunks they lie in are read.

        Raises:
            DataError: outside the split, a chunk missing or damaged, or a token that is not below
                the vocabulary size.
        """
        tokens = self._read("tokens", start, stop)
        if tokens.size and self.vocabulary_size <= np.iinfo(self.dtype).max:
            bad = np.flatnonzero(tokens >= self.vocabulary_size)
            if bad.size:
                at = start + int(bad[0])
                chunk = at // self._store.facts[self._key].chunk_length
                raise DataError(
                    f"array {self._key} holds a token outside the vocabulary",
                    f"token {tokens[bad[0]]} at position {at} (chunk {self._key}/c/{chunk}), "
                    f"vocabulary size {self.vocabulary_size}",
                    _REMEDY,
                )
        return tokens

    def labels(self, start: int, stop: int) -> NDArray[np.int64]:
        """The answers at tokens `[start, stop)` of a task, -1 where none is scored.

        Raises:
            DataError: as `read`.
        """
        stored = self._read("labels", start, stop).astype(np.int64)
        bad = np.flatnonzero(stored > self.vocabulary_size)
        if bad.size:
            raise DataError(
                f"array {self.name}/labels holds an answer outside the vocabulary",
                f"{stored[bad[0]] - 1} at position {start + int(bad[0])}, vocabulary size "
                f"{self.vocabulary_size}",
                _REMEDY,
            )
        return stored - 1

    @cached_property
    def cu_seqlens(self) -> NDArray[np.int64]:
        """Where every document starts, and the end of the last: int64 `[documents + 1]`."""
        table = self._read("documents", 0, self._store.facts[f"{self.name}/documents"].length)
        if _sha256(table) != self.facts["documents_sha256"]:
            raise DataError(
                f"array {self.name}/documents is not the one that was prepared",
                f"want sha256 {self.facts['documents_sha256'][:16]}.., got {_sha256(table)[:16]}..",
                _REMEDY,
            )
        return table

    def documents(self, start: int, stop: int) -> tuple[int, ...]:
        """cu_seqlens of the sample `[start, stop)`: from 0 to `stop - start`, no empty document."""
        table = self.cu_seqlens
        first = np.searchsorted(table, start, side="right")
        last = np.searchsorted(table, stop, side="left")
        inner = np.unique(table[first:last]) - start
        return (0, *inner.tolist(), stop - start) if stop > start else (0,)

    @cached_property
    def names(self) -> list[str]:
        """The documents' names, in the order of the tokens."""
        raw = self._read("names", 0, self._store.facts[f"{self.name}/names"].length).tobytes()
        return raw.decode("utf-8", "surrogateescape").split("\0")[:-1]

    def verify(self) -> None:
        """Compare tokens and document table with the recorded hashes (see `TextStore.verify`)."""
        for part in ("tokens",) if self.sample_length is None else ("tokens", "labels"):
            self._verify(part)
        _ = self.cu_seqlens

    def _verify(self, part: str) -> None:
        digest = hashlib.sha256()
        step = self._store.facts[f"{self.name}/{part}"].chunk_length
        for start in range(0, self.length, step):
            stop = min(start + step, self.length)
            # Tokens are also held against the vocabulary.
            read = self.read(start, stop) if part == "tokens" else self._read(part, start, stop)
            digest.update(read.tobytes())
        want = self.facts[f"{part}_sha256"]
        if digest.hexdigest() != want:
            raise DataError(
                f"array {self.name}/{part} is not the one that was prepared",
                f"want sha256 {want[:16]}.., got {digest.hexdigest()[:16]}..",
                _REMEDY,
            )

    def _read(self, part: str, start: int, stop: int) -> NDArray[Any]:
        key = f"{self.name}/{part}"
        facts = self._store.facts[key]
        if not 0 <= start <= stop <= facts.length:
            raise DataError(
                f"positions [{start}, {stop}) are not in array {key}", f"it holds {facts.length}"
            )
        array = self._arrays[part]
        out = np.empty(stop - start, dtype=array.dtype)
        at = start
        # One chunk at a time, so that an error names the chunk it comes from.
        while at < stop:
            chunk = at // facts.chunk_length
            end = min(stop, (chunk + 1) * facts.chunk_length)
            seen_bytes = self._store.read_bytes[key]
            try:
                out[at - start : end - start] = array[at:end]
            except DataError:
                raise
            # Codecs raise whatever they like; each means that the chunk cannot be decoded.
            except Exception as error:
                raise DataError(
                    f"chunk {key}/c/{chunk} of array {key} is damaged",
                    f"{type(error).__name__}: {error}",
                    _REMEDY,
                ) from error
            # Newer zarr has pipelines that read around a store's `get`.
            if self._store.read_bytes[key] == seen_bytes:
                raise DataError(
                    f"zarr {zarr.__version__} read chunk {key}/c/{chunk} past its checks",
                    f"codec pipeline {zarr.config.get('codec_pipeline.path')}",
                    "keep zarr's default codec pipeline (BatchedCodecPipeline)",
                )
            at = end
        return out


def _sha256(values: NDArray[Any]) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()
