"""`xdist prepare text`: files -> a zarr store of tokens, written beside, renamed when complete."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import lzma
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import ZstdCodec

from xdist.data.identity import FORMAT, VERSION, fingerprint
from xdist.data.parts import Each, write_parts
from xdist.data.sources import Source, Sources, collect, split_held_out
from xdist.data.store import Split, TextStore
from xdist.data.token_files import (
    READ_BYTES,
    Reader,
    bytes_of,
    ids_of,
    length_of,
    parts_of,
    slice_of,
)
from xdist.errors import ConfigError, DataError

BYTE_VOCABULARY = 256
FIGURES_BYTES = 1 << 20
_ZSTD_LEVEL = 3

Progress = Callable[[int, int], None]


class Prepared(NamedTuple):
    """What `prepare_text` made, or found: sizes in tokens, bytes on disk, what was passed over."""

    path: Path
    tokens: dict[str, int]
    documents: dict[str, int]
    stored_bytes: int
    fingerprint: str
    figures: dict[str, Any]
    skipped: tuple[str, ...]
    kept: bool

    def lines(self) -> list[str]:
        """The summary for a person."""
        word = "kept as it is" if self.kept else "written"
        found = [f"{self.path} {word}: {self.stored_bytes / 1e6:.1f} MB on disk"]
        found += [
            f"  {name}: {self.tokens[name]:,} tokens in {self.documents[name]:,} documents"
            for name in self.tokens
        ]
        if self.figures:
            found.append(
                f"  first {self.figures['bytes']:,} held-out bytes: order-0 entropy "
                f"{self.figures['order0_bits_per_byte']:.3f} bits per byte, "
                f"xz -9e {self.figures['xz_bits_per_byte']:.3f}"
            )
        if self.skipped:
            found.append(f"  {len(self.skipped)} files passed over, the first: {self.skipped[0]}")
        found.append(f"  fingerprint {self.fingerprint}")
        return found


def prepare_text(
    paths: Iterable[str | Path] | Sources,
    store: str | Path,
    *,
    held_out_fraction: float = 0.05,
    vocabulary_size: int | None = None,
    pattern: str = "*",
    chunk_bytes: int = 1 << 18,
    existing: Literal["error", "keep", "replace"] = "error",
    on_progress: Progress | None = None,
    each: Each | None = None,
) -> Prepared:
    """Write the files as one token store: splits `train` and, unless the fraction is 0, `held_out`.

    Args:
        paths: files and folders (`pattern` picks files inside folders), or collected `Sources`
            (`sources.standard_library()`). Each file is one document.
        store: the folder to make.
        held_out_fraction: share of files held out whole, chosen by a hash of their names.
        vocabulary_size: None for bytes; else every file is a 1-D `.npy` of token ids below it.
        chunk_bytes: decoded bytes of one chunk, the unit that is read and checksummed.
        existing: what to do with a store that is there: refuse, keep it when it holds the same
            names, contents and settings (else refuse; the files are read once to know), or
            replace it.
        on_progress: called with (bytes done, bytes in all).
        each: writes the tokens in parts through this: `each(function, tuples of arguments)` calls
            the function for every tuple, anywhere, and gives the results in order. The store is
            the same. None writes all here.

    Raises:
        ConfigError: a fraction, chunk size or vocabulary outside its range.
        DataError: nothing to read, a file that changed meanwhile, a store in the way.
    """
    _check_arguments(held_out_fraction, vocabulary_size, chunk_bytes)
    target = Path(store)
    sources = paths
    if not isinstance(sources, Sources):
        sources = collect(sources, pattern=pattern, text_only=vocabulary_size is None)
    if not sources.files:
        raise DataError(f"no text to write to {target}", "no file was found", "name other paths")
    reader = bytes_of if vocabulary_size is None else ids_of
    train, held_out = split_held_out(sources.files, held_out_fraction)
    splits = {"train": train} | ({"held_out": held_out} if held_out else {})
    meter = _Meter(on_progress, sources.total_bytes)
    if target.exists() or target.is_symlink():
        if existing == "error":
            raise DataError(
                f"{target} exists", "nothing was written", "replace it, or name another folder"
            )
        if existing == "keep":
            return _kept(target, sources, splits, vocabulary_size, reader, meter)
    target.parent.mkdir(parents=True, exist_ok=True)
    size = vocabulary_size or BYTE_VOCABULARY
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        beside.chmod(0o750)
        _write(beside, splits, size, reader, chunk_bytes, meter, each)
        put_in_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return describe(target, sources.skipped, kept=False)


def compression_figures(sample: NDArray[np.uint8]) -> dict[str, Any]:
    """What simple models make of `sample`: order-0 entropy and `xz -9e`, in bits per byte."""
    counts = np.bincount(sample, minlength=BYTE_VOCABULARY).astype(np.float64)
    shares = counts[counts > 0] / max(sample.size, 1)
    packed = lzma.compress(sample.tobytes(), preset=9 | lzma.PRESET_EXTREME)
    return {
        "bytes": int(sample.size),
        "order0_bits_per_byte": float(-(shares * np.log2(shares)).sum()),
        "xz_bits_per_byte": 8 * len(packed) / max(sample.size, 1),
    }


class _Meter:
    """Adds up the bytes done and tells the caller."""

    def __init__(self, tell: Progress | None, total_bytes: int) -> None:
        self.tell = tell
        self.total_bytes = total_bytes
        self.done_bytes = 0

    def add(self, count: int) -> None:
        self.done_bytes += count
        if self.tell is not None:
            self.tell(self.done_bytes, self.total_bytes)


def _write(
    folder: Path,
    splits: dict[str, list[Source]],
    vocabulary_size: int,
    reader: Reader,
    chunk_bytes: int,
    meter: _Meter,
    each: Each | None,
) -> None:
    dtype = np.dtype(np.min_scalar_type(vocabulary_size - 1))
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "vocabulary_size": vocabulary_size,
        "dtype": dtype.name,
        "splits": {},
    }
    for name, files in splits.items():
        facts["splits"][name] = _write_split(
            folder, group, name, files, dtype, vocabulary_size, reader, chunk_bytes, meter, each
        )
    figures = {}
    if vocabulary_size == BYTE_VOCABULARY and reader is bytes_of and "held_out" in splits:
        sample = np.asarray(group["held_out/tokens"][:FIGURES_BYTES])  # type: ignore[index]
        figures = compression_figures(sample)
    group.attrs["xdist"] = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint(facts),
        "facts": facts,
        "figures": figures,
    }


def _write_split(
    folder: Path,
    group: zarr.Group,
    name: str,
    files: Sequence[Source],
    dtype: np.dtype[Any],
    vocabulary_size: int,
    reader: Reader,
    chunk_bytes: int,
    meter: _Meter,
    each: Each | None,
) -> dict[str, Any]:
    """Write one split; returns its facts (counts and hashes)."""
    lengths = [length_of(source, reader) for source in files]
    table = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    chunk_length = max(1, chunk_bytes // dtype.itemsize)
    tokens = make_array(group, f"{name}/tokens", int(table[-1]), dtype, chunk_length)
    if each is None:
        hashed = _write_tokens(
            tokens, files, lengths, dtype, vocabulary_size, reader, chunk_length, meter
        )
    else:
        read = functools.partial(slice_of, reader, vocabulary_size)
        hashed = write_parts(folder, f"{name}/tokens", files, table, read, each, meter.add)
    make_array(group, f"{name}/documents", table.size, table.dtype, 1 << 15)[:] = table
    raw = b"".join(source.name.encode("utf-8", "surrogateescape") + b"\0" for source in files)
    names = np.frombuffer(raw, dtype=np.uint8)
    make_array(group, f"{name}/names", names.size, names.dtype, 1 << 18)[:] = names
    return {
        "tokens": int(table[-1]),
        "documents": len(files),
        "tokens_sha256": hashed,
        "documents_sha256": hashlib.sha256(table.tobytes()).hexdigest(),
        "names_sha256": hashlib.sha256(raw).hexdigest(),
    }


def _write_tokens(
    tokens: zarr.Array,
    files: Sequence[Source],
    lengths: Sequence[int],
    dtype: np.dtype[Any],
    vocabulary_size: int,
    reader: Reader,
    chunk_length: int,
    meter: _Meter,
) -> str:
    """Fill `tokens` from the files, one after another; their sha256, hex."""
    digest = hashlib.sha256()
    at, pending, held = 0, [], 0
    for source, length in zip(files, lengths, strict=True):
        for narrow in parts_of(source, length, dtype, vocabulary_size, reader, meter.add):
            digest.update(narrow.tobytes())
            pending.append(narrow)
            held += narrow.size
        # Whole chunks only: each chunk is compressed once.
        if held >= max(chunk_length, READ_BYTES):
            whole = held - held % chunk_length
            joined = np.concatenate(pending)
            tokens[at : at + whole] = joined[:whole]
            at, pending, held = at + whole, [joined[whole:]], held - whole
    if held:
        tokens[at : at + held] = np.concatenate(pending)
    return digest.hexdigest()


def make_array(
    group: zarr.Group, key: str, length: int, dtype: np.dtype[Any], chunk_length: int
) -> zarr.Array:
    """An empty array of the one form that is read back: zstd with a checksum."""
    # Chunks of zeros are written like any other: a chunk that is absent is an error when reading.
    return group.create_array(
        key,
        shape=(length,),
        chunks=(chunk_length,),
        dtype=dtype,
        compressors=[ZstdCodec(level=_ZSTD_LEVEL, checksum=True)],
        fill_value=0,
        config={"write_empty_chunks": True},
    )


def _check_arguments(fraction: float, vocabulary_size: int | None, chunk_bytes: int) -> None:
    if not 0 <= fraction < 1:
        raise ConfigError("the held-out fraction must be in [0, 1)", f"got {fraction}")
    if vocabulary_size is not None and not 2 <= vocabulary_size <= 1 << 32:
        raise ConfigError("the vocabulary size must be from 2 to 2^32", f"got {vocabulary_size}")
    if not 1 << 10 <= chunk_bytes <= 1 << 28:
        raise ConfigError("a chunk holds from 1 KiB to 256 MiB", f"got {chunk_bytes} bytes")


def put_in_place(beside: Path, target: Path) -> None:
    """Put the finished folder in the target's place; the old one goes only after that."""
    old = beside.with_name(f"{beside.name}.old")
    if target.exists() or target.is_symlink():
        os.replace(target, old)
    os.replace(beside, target)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(old) if not old.is_symlink() else old.unlink()


def _kept(
    target: Path,
    sources: Sources,
    splits: dict[str, list[Source]],
    vocabulary_size: int | None,
    reader: Reader,
    meter: _Meter,
) -> Prepared:
    store = TextStore(target)
    size = vocabulary_size or BYTE_VOCABULARY
    differs = "held-out share or vocabulary differ"
    if store.vocabulary_size == size and store.split_names == sorted(splits):
        found = (_difference(store.split(n), splits[n], reader, meter) for n in splits)
        differs = next(filter(None, found), "")
    if differs:
        raise DataError(
            f"{target} holds other data than these sources and settings",
            differs,
            "replace it, or name another folder",
        )
    return describe(target, sources.skipped, kept=True)


def _difference(split: Split, files: Sequence[Source], reader: Reader, meter: _Meter) -> str:
    """What of `files` is not what the split was made of; "" where it was made of them.

    Names and sizes first; only where these are the same every file is read.
    """
    lengths = [length_of(source, reader) for source in files]
    if split.names != [source.name for source in files]:
        return (
            f"split {split.name} is made of {len(split.names)} files, here {len(files)} or others"
        )
    sizes = np.diff(split.cu_seqlens).tolist()
    for source, size, length in zip(files, sizes, lengths, strict=True):
        if size != length:
            return f"{source.path} has {length} tokens, split {split.name} holds {size} of it"
    digest = hashlib.sha256()
    for source, length in zip(files, lengths, strict=True):
        for part in parts_of(source, length, split.dtype, split.vocabulary_size, reader, meter.add):
            digest.update(part.tobytes())
    was, now = split.facts["tokens_sha256"], digest.hexdigest()
    if was != now:
        return (
            f"files of split {split.name} changed at the same sizes: "
            f"sha256 {was[:16]}.. -> {now[:16]}.."
        )
    return ""


def describe(target: Path, skipped: tuple[str, ...] = (), *, kept: bool) -> Prepared:
    """What a store that was made, or found, holds."""
    store = TextStore(target)
    facts = store.identity["facts"]["splits"]
    return Prepared(
        path=target,
        tokens={name: facts[name]["tokens"] for name in reversed(store.split_names)},
        documents={name: facts[name]["documents"] for name in reversed(store.split_names)},
        stored_bytes=sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
        fingerprint=store.fingerprint,
        figures=store.figures,
        skipped=skipped,
        kept=kept,
    )
