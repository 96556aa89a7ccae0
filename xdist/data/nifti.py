"""NIfTI files in and out, by nibabel (extra: volumes): the only file that imports it."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdist.errors import ConfigError, DataError

_AXES = ("LR", "PA", "IS")
_HASH_BYTES = 1 << 22
# What nibabel and the decompressors raise on bytes that end early or make no sense.
_BROKEN = (OSError, EOFError, ValueError, zlib.error)


@dataclass(frozen=True)
class Nifti:
    """One file.

    Attributes:
        path: where it lies.
        values: `[S1, S2, S3]` or `[S1, S2, S3, C]`, integers as stored or float32; all finite.
        affine: float64 `[4, 4]`, voxel indices to millimetres.
        orientation: where each index grows to, "RAS" for right, anterior, superior.
        sha256: of the file.
    """

    path: Path
    values: NDArray[Any]
    affine: NDArray[np.float64]
    orientation: str
    sha256: str


def read_nifti(path: str | Path, *, orientation: str = "RAS", reorient: bool = False) -> Nifti:
    """Read a NIfTI file whole and hold it to what a volume needs.

    Args:
        path: `.nii` or `.nii.gz`, 3-D, or 4-D with channels last.
        orientation: of three letters, one of each pair LR, PA, IS.
        reorient: flip and permute axes to it; otherwise a file with another one is refused.

    Raises:
        ConfigError: nibabel is not installed; an orientation that is none.
        DataError: no such file, not NIfTI, truncated, of other dims, an affine that has no place
            for each voxel, another orientation, values that are not finite.
    """
    nib = _nibabel()
    orientation = _checked(orientation)
    path = Path(path)
    try:
        image = nib.load(path)
    except FileNotFoundError as error:
        raise DataError(f"no file {path}", str(error), "name a .nii or .nii.gz file") from error
    except (*_BROKEN, nib.filebasedimages.ImageFileError) as error:
        raise _damaged(path, error) from error
    # A header's numbers that fit no format.
    except nib.spatialimages.HeaderDataError as error:
        raise _damaged(path, error) from error
    if len(image.shape) not in (3, 4) or 0 in image.shape:
        raise DataError(
            f"{path} is not a volume",
            f"its shape is {image.shape}",
            "give three dims, or four with channels last",
        )
    try:
        # Integers stay integers where the header scales nothing.
        values = np.asanyarray(image.dataobj)
    except _BROKEN as error:
        raise _damaged(path, error, image) from error
    affine = _invertible(path, image.affine)
    found = "".join(nib.aff2axcodes(affine, labels=tuple(tuple(pair) for pair in _AXES)))
    if found != orientation:
        if not reorient:
            raise DataError(
                f"{path} has a wrong orientation",
                f"its axes grow to {found}, {orientation} is needed",
                f"say --reorient to flip and permute them, or --orientation {found}",
            )
        values, affine = _reoriented(nib, values, affine, orientation)
    values = _plain(path, values)
    return Nifti(path, values, affine, orientation, _sha256(path))


def write_nifti(path: str | Path, values: NDArray[Any], affine: Any) -> None:
    """Write `[S1, S2, S3]` or `[S1, S2, S3, C]` of a dtype that NIfTI has, with its affine.

    A label map is uint8. `.nii.gz` is compressed.

    Raises:
        ConfigError: nibabel is not installed.
    """
    nib = _nibabel()
    image = nib.Nifti1Image(np.ascontiguousarray(values), np.asarray(affine, dtype=np.float64))
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _nibabel() -> Any:
    try:
        import nibabel
    except ImportError as error:
        raise ConfigError(
            "NIfTI files need nibabel, which is not installed",
            str(error),
            "pip install 'xdist-train[volumes]'",
        ) from error
    return nibabel


def _checked(orientation: str) -> str:
    code = orientation.upper()
    pairs = {pair for letter in code for pair in _AXES if letter in pair}
    if len(code) != 3 or len(pairs) != 3:
        raise ConfigError(
            f"{orientation!r} is no orientation",
            "three letters, one of each pair L or R, P or A, I or S",
            "use RAS, the canonical one",
        )
    return code


def _damaged(path: Path, error: Exception, image: Any = None) -> DataError:
    """What cannot be decoded: the size of the file beside that of the values it promises."""
    size = path.stat().st_size if path.exists() else 0
    want = ""
    if image is not None:
        count = int(np.prod(image.shape))
        want = f", its header promises {count * image.get_data_dtype().itemsize:,} bytes of values"
    return DataError(
        f"{path} is truncated or not a NIfTI file",
        f"{size:,} bytes on the disk{want}; {type(error).__name__}: {error}",
        "fetch the file again",
    )


def _invertible(path: Path, affine: Any) -> NDArray[np.float64]:
    """The affine, held to three axes that each lead elsewhere: without them there is no
    orientation, and no way back from millimetres to voxels."""
    found = np.asarray(affine, dtype=np.float64)
    steps = found[:3, :3]
    length = np.linalg.norm(steps, axis=0)
    whole = np.isfinite(found).all() and bool(length.all())
    if not whole or np.linalg.matrix_rank(steps / length) < 3:
        raise DataError(
            f"{path} has an affine without three axes",
            f"its rows are {found[:3].tolist()}, its voxels "
            f"{' x '.join(f'{one:.4g}' for one in length)} mm",
            "write its sform or qform again: three finite columns, none zero, none along another",
        )
    return found


def _reoriented(nib: Any, values: Any, affine: Any, orientation: str) -> tuple[Any, Any]:
    """Axes flipped and permuted: no value is interpolated."""
    labels = tuple(tuple(pair) for pair in _AXES)
    turn = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine),
        nib.orientations.axcodes2ornt(orientation, labels),
    )
    back = nib.orientations.inv_ornt_aff(turn, values.shape[:3])
    return nib.orientations.apply_orientation(values, turn), affine @ back


def _plain(path: Path, values: NDArray[Any]) -> NDArray[Any]:
    """Integers, or float32; complex numbers and records are refused, and what is not finite."""
    if values.dtype.kind not in "iufb":
        raise DataError(f"{path} holds no plain numbers", f"dtype {values.dtype}")
    if values.dtype.kind != "f":
        return values.astype(np.uint8) if values.dtype.kind == "b" else values
    bad = ~np.isfinite(values)
    if bad.any():
        where = np.argwhere(bad)
        raise DataError(
            f"{path} holds {len(where):,} voxels that are not finite",
            f"of {values.size:,}; the first is {values[tuple(where[0])]} at "
            f"{tuple(where[0].tolist())}",
            "repair them, for instance by nibabel and numpy.nan_to_num",
        )
    found = values.astype(np.float32)
    if not np.isfinite(found).all():
        raise DataError(f"{path} holds values beyond float32", f"up to {np.abs(values).max():.3g}")
    return found


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()
