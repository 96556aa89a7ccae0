"""What every store says of itself: its format, its facts and their fingerprint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xdist.data.guard import read_metadata
from xdist.data.identity import VERSION, fingerprint
from xdist.errors import DataError


def read_head(
    path: str | Path, formats: Sequence[str], what: str, commands: str
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The resolved folder, its attributes, and its identity `{"fingerprint": hex, "facts": {}}`.

    formats: that the caller reads; what: "a store", for messages; commands: that make such one.

    Raises:
        DataError: no local store there, another format or version, a fingerprint that is not that
            of the facts.
    """
    if "://" in str(path):
        raise DataError(f"{path} is not a local path", "only local stores are read")
    folder = Path(path).resolve()
    if not folder.is_dir():
        raise DataError(
            f"no data store at {path}",
            "the folder does not exist",
            f"make one with {commands}, or set data.store",
        )
    found = read_metadata(folder, "", "group").get("attributes", {}).get("xdist", {})
    if found.get("format") not in formats or found.get("version") != VERSION:
        raise DataError(
            f"{path} is not {what} this version reads",
            f"format {found.get('format')!r} version {found.get('version')!r}, "
            f"want {' or '.join(map(repr, formats))} version {VERSION}",
            f"prepare the store again with {commands}",
        )
    facts = found.get("facts", {})
    said, own = found.get("fingerprint", ""), fingerprint(facts)
    if own != said:
        raise DataError(
            f"the fingerprint of {path} does not fit its facts",
            f"want {said[:16]}.., got {own[:16]}..",
            f"prepare the store again with {commands}",
        )
    return folder, found, {"fingerprint": said, "facts": facts}
