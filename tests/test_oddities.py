"""Files that mean something else than they seem to: the same volume as the control, or an error."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
import tifffile
import zarr as typed_zarr
from PIL import Image

from emadapt.data.ingest import check_sizes
from emadapt.data.layouts import find_parts
from emadapt.data.pairing import Part
from emadapt.errors import InputError
from emadapt.volumes.opening import open_image
from emadapt.volumes.source import voxel_of

zarr: Any = typed_zarr  # its types are narrower than what it takes

RAMP = np.add.outer(np.arange(24) * 6, np.arange(32) * 2).astype(np.uint8)  # smooth, 0 to 200
VOLUME = np.stack([RAMP + 9 * z for z in range(5)]).astype(np.uint8)
VOXEL = (10.0, 4.0, 5.0)
Case = Callable[[Path], Any]


def tiff(path: Path, *images: Any, **how: Any) -> str:
    """Images one after the other, each with its own `how` if it is a pair."""
    with tifffile.TiffWriter(path / "a.tif", **how.pop("file", {})) as tif:
        for image in images or (VOLUME,):
            data, own = image if isinstance(image, tuple) else (image, {})
            tif.write(data, **{"photometric": "minisblack", **how, **own})
    return str(path / "a.tif")


def imagej(path: Path, volume: Any = VOLUME, resolution: Any = (200, 250), **stated: Any) -> str:
    how = {"imagej": True, "resolution": resolution, "metadata": {"axes": "ZYX", **stated}}
    tifffile.imwrite(path / "a.tif", volume, **how)
    return str(path / "a.tif")


def ome(path: Path, *images: Any) -> str:
    sizes = {"PhysicalSizeZ": 0.01, "PhysicalSizeY": 0.004, "PhysicalSizeX": 0.005}
    how = {"file": {"ome": True}, "metadata": {"axes": "ZYX", **sizes}}
    return tiff(path, *images, **how)


def edited(path: Path, old: bytes, new: bytes) -> str:
    """An OME-TIFF whose description says something else, of the same length."""
    file = Path(ome(path))
    content = file.read_bytes()
    assert content.count(old) == 1
    file.write_bytes(content.replace(old, new))
    return str(file)


def palette(path: Path, colours: Any, suffix: str) -> str:
    """Each slice with a palette of its own, under which it shows `VOLUME`."""
    (path / "slices").mkdir()
    pages = []
    for z, image in enumerate(VOLUME):
        order = np.random.default_rng(z).permutation(256).astype(np.uint8)
        stored, shown = np.argsort(order).astype(np.uint8)[image], colours(order)
        pages.append((stored, {"colormap": shown.astype(np.uint16).T * 257}))
        own = Image.fromarray(stored)
        own.putpalette(shown.ravel().tolist())
        own.save(path / "slices" / f"{z}.png")
    if suffix == ".png":
        return str(path / "slices")
    return tiff(path, *pages, photometric="palette", metadata=None)


def grey(order: Any) -> Any:
    return np.stack([order] * 3, 1)


def red(order: Any) -> Any:
    return np.stack([order, order * 0, order * 0], 1)


def hdf5(path: Path, data: Any = VOLUME, name: str = "raw", **attributes: Any) -> str:
    with h5py.File(path / "a.h5", "w") as file:
        file.create_dataset(name, data=data, chunks=(1, *data.shape[1:])).attrs.update(attributes)
    return str(path / "a.h5")


def array(path: Path, data: Any = VOLUME, version: int = 2, **attributes: Any) -> str:
    names = attributes.pop("dimension_names", None)
    how = {"dimension_names": names} if names else {}
    chunks = (1, 12, *data.shape[2:])
    made = zarr.create_array(path / "a.zarr", data=data, chunks=chunks, zarr_format=version, **how)
    made.attrs.update(attributes)
    return str(path / "a.zarr")


def lost(path: Path, keep: Callable[[int], bool]) -> str:
    """A Zarr of which a part of the chunks is gone."""
    folder = Path(array(path, VOLUME + np.uint8(1)))
    files = sorted(file for file in folder.iterdir() if file.name[0] != ".")
    for i, file in enumerate(files):
        if not keep(i):
            file.unlink()
    return str(folder)


def moved(path: Path, change: Callable[[str], str], version: int = 2) -> str:
    """A Zarr whose chunks have other names than its metadata say."""
    folder = Path(array(path, VOLUME + np.uint8(1), version))
    for file in [f for f in folder.rglob("*") if f.is_file() and f.name[-1].isdigit()]:
        target = folder / change(file.relative_to(folder).as_posix())
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
    return str(folder)


def image(path: Path, scales: Any = ((0.01, 0.004, 0.005),), unit: str = "micrometer") -> str:
    """OME-Zarr 0.4 with a level for each scale; without one where it is None."""
    group = zarr.create_group(path / "i.zarr", zarr_format=2)
    datasets: list[dict[str, Any]] = []
    for level, scale in enumerate(scales):
        step = 2**level
        group.create_array(str(level), data=VOLUME[:, ::step, ::step])
        changes = [{"type": "scale", "scale": list(scale)}] if scale else []
        datasets.append({"path": str(level), "coordinateTransformations": changes})
    axes = [{"name": a, "type": "space", "unit": unit} for a in "zyx"]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    return str(path / "i.zarr")


def changed(text: str, change: Callable[[list[dict[str, Any]]], None]) -> str:
    """An OME-Zarr with other metadata."""
    group = zarr.open_group(text, mode="r+")
    images = group.attrs["multiscales"]
    change(images)
    group.attrs["multiscales"] = images
    return text


def converted(path: Path, *names: str) -> str:
    """What bioformats2raw makes of a file with several images."""
    zarr.create_group(path / "b.zarr", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    for name in names:
        shutil.copytree(image(path), path / "b.zarr" / name)
        shutil.rmtree(path / "i.zarr")
    return str(path / "b.zarr")


def slices(path: Path, names: list[str]) -> str:
    """A folder of slices, those of `VOLUME` in the order of these names."""
    for name, own in zip(names, VOLUME, strict=True):
        Image.fromarray(own).save(path / name, "TIFF" if name.endswith("tif") else "PNG")
    return str(path)


def animation(path: Path) -> str:
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    frames[0].save(path / "a.png", save_all=True, append_images=frames[1:])
    return str(path / "a.png")


def nifti(path: Path, unit: str = "micron", **fields: Any) -> str:
    made = nibabel.Nifti1Image(VOLUME.T, np.diag([0.005, 0.004, 0.01, 1]))
    made.header.set_xyzt_units(unit)
    nibabel.save(made, path / "a.nii")
    content = bytearray((path / "a.nii").read_bytes())
    header = nibabel.Nifti1Header(bytes(content[:348]))
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    (path / "a.nii").write_bytes(content)
    return str(path / "a.nii")


WIDE = VOLUME.astype(np.uint16) * 257  # its upper half is negative as int16
SIGNED = WIDE.view(np.int16)
TWO = np.stack([VOLUME, VOLUME // 255])  # image and mask
BDV = "t00000/s00/0/cells"
XYZ: dict[str, Any] = {"resolution": [5.0, 4.0, 10.0], "axes": ["x", "y", "z"]}
READ: dict[str, tuple[Case, Any, Any]] = {  # -> the volume, voxel size, values
    "slices appended": (lambda p: tiff(p, *VOLUME), None, VOLUME),
    "slices appended, packed": (lambda p: tiff(p, *VOLUME, compression="zlib"), None, VOLUME),
    "blocks appended": (lambda p: tiff(p, VOLUME[:2], VOLUME[2:4], VOLUME[4]), None, VOLUME),
    "second OME image": (lambda p: ome(p, VOLUME[:2, :9], VOLUME) + ":/1", VOXEL, VOLUME),
    "named OME image": (lambda p: ome(p, VOLUME[:2, :9], VOLUME) + ":/Image1", VOXEL, VOLUME),
    "a channel": (
        lambda p: tiff(p, np.moveaxis(TWO, 0, 1), metadata={"axes": "ZCYX"}) + ":/c=0",
        None,
        VOLUME,
    ),
    "slices as channels": (lambda p: imagej(p, axes="CYX") + ":/c=z", None, VOLUME),
    "slices as time points": (
        lambda p: imagej(p, axes="TYX", unit="nm", spacing=10, resolution=(0.2, 0.25)),
        VOXEL,
        VOLUME,
    ),
    "channel of Zarr": (lambda p: array(p, TWO) + ":/0=0", None, VOLUME),
    "channel of HDF5": (lambda p: hdf5(p, TWO) + ":/raw,0=0", None, VOLUME),
    "one channel last, TIFF": (lambda p: tiff(p, VOLUME[..., None]), None, VOLUME),
    "one channel last, HDF5": (lambda p: hdf5(p, VOLUME[..., None]), None, VOLUME),
    "one channel last, Zarr": (lambda p: array(p, VOLUME[..., None]), None, VOLUME),
    "grey palettes, TIFF": (lambda p: palette(p, grey, ".tif"), None, VOLUME),
    "grey palettes, PNG": (lambda p: palette(p, grey, ".png"), None, VOLUME),
    "a palette of 8 bits": (
        lambda p: tiff(p, photometric="palette", colormap=grey(np.arange(256, dtype="u2")).T),
        None,
        VOLUME,
    ),
    "unsigned as signed": (lambda p: hdf5(p, SIGNED, BDV), None, WIDE),
    "bytes as signed": (lambda p: array(p, VOLUME.view(np.int8)), None, VOLUME),
    "signed": (lambda p: tiff(p, WIDE.astype(np.int32) - 9999), None, WIDE.astype("i4") - 9999),
    "ImageJ zunit": (lambda p: imagej(p, spacing=10, unit="um", zunit="nm"), VOXEL, VOLUME),
    "ImageJ yunit": (
        lambda p: imagej(p, spacing=0.01, unit="um", yunit="nm", resolution=(200, 0.25)),
        VOXEL,
        VOLUME,
    ),
    "ImageJ without unit": (lambda p: imagej(p, spacing=1), None, VOLUME),
    "ImageJ without spacing": (lambda p: imagej(p, unit="um"), None, VOLUME),
    "OME in pixels": (
        lambda p: tiff(p, metadata={"axes": "ZYX", "PhysicalSizeX": 1}, file={"ome": True}),
        None,
        VOLUME,
    ),
    "a printer's resolution": (
        lambda p: tiff(p, resolution=(72, 72), resolutionunit="INCH"),
        None,
        VOLUME,
    ),
    "x first": (lambda p: array(p, **XYZ), VOXEL, VOLUME),
    "x first, HDF5": (lambda p: hdf5(p, **XYZ), VOXEL, VOLUME),
    "x first, as one word": (lambda p: hdf5(p, **XYZ | {"axes": "x,y,z"}), VOXEL, VOLUME),
    "micrometres": (
        lambda p: hdf5(p, resolution=[0.01, 0.004, 0.005], units=["um"] * 3),
        VOXEL,
        VOLUME,
    ),
    "one unit": (lambda p: array(p, resolution=[100, 40, 50], unit="angstrom"), VOXEL, VOLUME),
    "a channel's resolution": (
        lambda p: array(p, VOLUME[None], resolution=[1, 10, 4, 5], axes=list("czyx")),
        VOXEL,
        VOLUME,
    ),
    "OME-Zarr": (image, VOXEL, VOLUME),
    "OME-Zarr without a scale": (lambda p: image(p, [None]), None, VOLUME),
    "OME-Zarr without a unit": (lambda p: image(p, [(1, 1, 1)], ""), None, VOLUME),
    "one image of bioformats2raw": (lambda p: converted(p, "0"), VOXEL, VOLUME),
    "NIfTI": (nifti, VOXEL, VOLUME),
    "NIfTI without a unit": (lambda p: nifti(p, "unknown"), None, VOLUME),
    "decimals in names": (
        lambda p: slices(p, [f"s_{z:03d}_z={0.99 + z / 200:.4f}um.tif" for z in range(5)]),
        None,
        VOLUME,
    ),
    "below zero": (
        lambda p: slices(p, ["z=-0.2.png", "z=-0.1.png", "z=0.0.png", "z=0.1.png", "z=0.2.png"]),
        None,
        VOLUME,
    ),
    "letters of two cases": (
        lambda p: slices(p, ["S_1.png", "s_2.png", "S_3.png", "s_4.png", "s_10.png"]),
        None,
        VOLUME,
    ),
    "decimals of any length": (
        lambda p: slices(p, ["z9.5.png", "z9.75.png", "z10.png", "z10.25.png", "z10.5.png"]),
        None,
        VOLUME,
    ),
}


@pytest.mark.parametrize("case", READ)
def test_what_can_be_meant_in_one_way_is_read_so(case: str, tmp_path: Path) -> None:
    write, voxel, values = READ[case]
    source = open_image(write(tmp_path))
    assert source.voxel_nm == voxel
    np.testing.assert_array_equal(source.read(0, 5), values, strict=True)
    np.testing.assert_array_equal(source.read(1, 4, 3, 9), values[1:4, 3:9])


PAGES = [VOLUME[0], (VOLUME[1], {"compression": "zlib"}), *VOLUME[2:]]
REFUSED: dict[str, tuple[Case, str]] = {
    "two OME images": (lambda p: ome(p, VOLUME[:2, :9], VOLUME), ":/1 Image1 ZYX (5, 24, 32)"),
    "an OME image that is not there": (lambda p: ome(p) + ":/7", "no image '7'"),
    "an overview in a TIFF": (lambda p: tiff(p, VOLUME[0, :9], VOLUME), "2 images"),
    "a page of another compression": (lambda p: tiff(p, *PAGES, metadata=None), "2 images"),
    "a page of another type": (lambda p: tiff(p, *VOLUME[:4], WIDE[4], metadata=None), "2 images"),
    "fewer planes than pages": (lambda p: edited(p, b'SizeZ="5"', b'SizeZ="3"'), "belong to none"),
    "channels": (lambda p: imagej(p, axes="CYX"), "5 channels: axes c y x"),
    "channels of Zarr v3": (
        lambda p: array(p, TWO, 3, dimension_names=list("czyx")),
        "2 channels: axes c z y x",
    ),
    "no such channel": (lambda p: array(p, TWO) + ":/0=2", "2 places along axis 0"),
    "no such axis": (lambda p: array(p) + ":/c=0", "c is to be chosen"),
    "a channel of slices": (lambda p: slices(p, [f"{z}.png" for z in range(5)]) + ":/c=0", "no"),
    "colours in a palette, TIFF": (lambda p: palette(p, red, ".tif"), "channels differ"),
    "colours in a palette, PNG": (lambda p: palette(p, red, ".png"), "channels differ"),
    "inverted": (lambda p: tiff(p, photometric="miniswhite"), "WhiteIsZero"),
    "inverted on one page": (
        lambda p: tiff(p, *VOLUME[:4], (VOLUME[4], {"photometric": "miniswhite"}), metadata=None),
        "WhiteIsZero",
    ),
    "ink": (lambda p: tiff(p, np.stack([VOLUME] * 4, -1), photometric="separated"), "SEPARATED"),
    "an animation": (animation, "an animation of 2 images"),
    "chunks in folders": (
        lambda p: moved(p, lambda name: name.replace(".", "/")),
        '"dimension_separator": "/"',
    ),
    "chunks of v3 without c": (lambda p: moved(p, lambda name: name[2:], 3), "there as 0/0/0"),
    "no chunks": (lambda p: lost(p, lambda i: False), "none of its chunks"),
    "two images in OME-Zarr": (
        lambda p: changed(image(p), lambda images: images.append(images[0])),
        "2 images",
    ),
    "two images of bioformats2raw": (lambda p: converted(p, "0", "1"), "2 images"),
    "the coarsest scale first": (
        lambda p: changed(image(p, [(1, 1, 1)] * 2), lambda i: i[0]["datasets"].reverse()),
        "the finest first",
    ),
    "two formats": (lambda p: slices(p, ["0.tif", "0.png", "1.png", "2.png", "3.png"]), "0.png"),
    "1 beside 01": (
        lambda p: slices(p, ["s_0.png", "s_1.png", "s_01.png", "s_2.png", "s_3.png"]),
        "several files of one slice: s_",
    ),
    "two orders": (
        lambda p: slices(p, [f"s{z}_{9 - z}.png" for z in range(5)]),
        "by the last number s4_5.png",
    ),
    "points between numbers": (
        lambda p: slices(p, [f"s1.{z}.png" for z in (8, 9, 10, 11, 12)]),
        "with points between numbers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_be_meant_in_several_ways_is_refused(case: str, tmp_path: Path) -> None:
    write, said = REFUSED[case]
    text = str(write(tmp_path))
    with pytest.raises(InputError) as error:
        open_image(text).read(0, 1)
    assert said in str(error.value)


def test_what_a_user_should_know_is_said(tmp_path: Path) -> None:
    def notes(name: str, write: Case) -> str:
        (tmp_path / name).mkdir()
        return " ".join(open_image(write(tmp_path / name)).notes)

    assert "5 images of one shape" in notes("appended", lambda p: tiff(p, *VOLUME))
    assert "50.0% of its chunks" in notes("half", lambda p: lost(p, lambda i: i % 2 == 0))
    assert "stored as int16" in notes("signed", lambda p: hdf5(p, SIGNED))
    said = notes("gap", lambda p: slices(p, [f"{z}.png" for z in (1, 2, 4, 5, 6)]))
    assert "from 1.png to 6.png" in said
    assert "between 2.png and 4.png" in said
    copied = ["1.png", "1 copy.png", "2.png", "3.png", "4.png"]
    assert "one number: 1 copy.png; 1.png" in notes("copy", lambda p: slices(p, copied))
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("raw", (4, 8, 8), "u1", chunks=(1, 8, 8))[1] = 7
    assert "75.0% of its chunks" in open_image(str(tmp_path / "a.h5")).notes[0]


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda p: imagej(p, spacing=10, unit="um"), "10000 x 4 x 5"),  # a micrometre too much
        (lambda p: imagej(p, unit="um", spacing=1, resolution=(1, 1)), "nobody had set a size"),
        (lambda p: image(p, [(1, 1, 1)]), "nobody had set a size"),
        (lambda p: image(p, [(10, 4, 5)], "millimeter"), "no size of EM voxels"),
        (lambda p: array(p, resolution=[0.01, 0.004, 0.005]), "no size of EM voxels"),
        (
            lambda p: hdf5(p, element_size_um=[0.01, 0.004, 0.005], resolution=[30, 4, 5]),
            "disagree",
        ),
        (lambda p: array(p, version=3, dimension_names=list("zyx"), **XYZ), "disagree"),
        (lambda p: nifti(p, pixdim=[1, 0.03, 0.004, 0.01, 0, 0, 0, 0]), "disagree"),
        (lambda p: tiff(p, resolution=(2e6, 2.5e6), resolutionunit="CENTIMETER"), "only ? x 4 x 5"),
        (tiff, "no voxel size"),
    ],
)
def test_a_doubtful_voxel_size_is_asked_for(write: Case, said: str, tmp_path: Path) -> None:
    source = open_image(write(tmp_path))
    with pytest.raises(InputError, match="--voxel-nm") as error:
        voxel_of(source, None)
    assert said in str(error.value)
    assert voxel_of(source, VOXEL) == VOXEL
    with pytest.raises(InputError):
        voxel_of(source, (VOXEL[0] * 1e7, *VOXEL[1:]))


def test_a_voxel_size_that_the_user_states_wins_and_the_other_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_image(nifti(tmp_path))
    assert voxel_of(source, (30.0, 4.0, 5.0)) == (30.0, 4.0, 5.0)
    assert "where the file says 10 x 4 x 5" in capsys.readouterr().err


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PIR", "ASL"])
def test_a_nifti_label_is_turned_onto_its_image(axes: str, tmp_path: Path) -> None:
    """By nibabel's own reorientation of a label that lies on its image."""
    placed = nibabel.Nifti1Image(VOLUME.T, np.diag([0.005, 0.004, 0.01, 1]))
    nibabel.save(placed, tmp_path / "image.nii")
    codes = nibabel.orientations.axcodes2ornt(axes)
    turned = placed.as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.io_orientation(placed.affine), codes)
    )
    nibabel.save(turned, tmp_path / "label.nii.gz")
    (part,) = find_parts(tmp_path, "stack", "number")
    assert part.labels is not None
    np.testing.assert_array_equal(part.labels.read(0, 5), part.images.read(0, 5))
    for affine in (np.eye(4), placed.affine + np.eye(4)[:, [3, 3, 3, 0]] * 0.01):
        nibabel.save(nibabel.Nifti1Image(VOLUME.T, affine), tmp_path / "label.nii.gz")
        with pytest.raises(InputError, match="an affine"):
            find_parts(tmp_path, "stack", "number")


@pytest.mark.parametrize(
    ("files", "settings", "said"),
    [
        (VOXEL, VOXEL, ""),
        (VOXEL, (30.0, 4.0, 5.0), "its slices are 10 nm apart"),
        (VOXEL, (10.0, 40.0, 5.0), "10 x 4 x 5 nm; expected 10 x 40 x 5 nm"),
        (VOXEL[::-1], VOXEL, "5 x 4 x 10 nm; expected 10 x 4 x 5 nm"),
    ],
)
def test_pixels_of_another_size_than_in_the_settings_are_refused(
    files: Any, settings: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = dataclasses.replace(open_image(nifti(tmp_path)), voxel_nm=files)
    try:
        check_sizes([Part("all", source, None)], settings)
        found = capsys.readouterr().err
    except InputError as error:
        found = str(error)
    assert said in found if said else not found
