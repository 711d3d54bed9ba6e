"""Files that mean something else than they seem to: the same volume as the control, or an error."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from emadapt.data.ingest import check_sizes
from emadapt.data.layouts import find_parts
from emadapt.data.pairing import Part
from emadapt.errors import InputError
from emadapt.segment.labelled import labelled
from emadapt.volumes.opening import open_image
from emadapt.volumes.source import voxel_of
from volume_files import (
    RAMP,
    UM,
    VOLUME,
    VOXEL,
    WIDE,
    array,
    hdf5,
    image,
    imagej,
    nifti,
    ome,
    refused,
    slices,
    tiff,
    zarr,
)

Case = Callable[[Path], Any]


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
    for z, values in enumerate(VOLUME):
        order = np.random.default_rng(z).permutation(256).astype(np.uint8)
        stored, shown = np.argsort(order).astype(np.uint8)[values], colours(order)
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


def animation(path: Path) -> str:
    frames = [Image.fromarray(RAMP), Image.fromarray(255 - RAMP)]
    frames[0].save(path / "a.png", save_all=True, append_images=frames[1:])
    return str(path / "a.png")


def group(path: Path, *names: str) -> str:
    made = zarr.create_group(path / "g.zarr")
    for name in names:
        made.create_array(name, data=VOLUME)
    return str(path / "g.zarr")


def nan(path: Path, write: Callable[[Path, Any], str]) -> str:
    volume = VOLUME.astype(np.float32)
    volume[3, 4, 5:7] = np.nan, np.inf
    return write(path, volume)


def cut_short(path: Path) -> str:
    """A folder of slices, the last of other rows."""
    Image.fromarray(RAMP[:20]).save(Path(slices(path, [f"{z}.png" for z in range(5)])) / "5.png")
    return str(path)


SIGNED = WIDE.view(np.int16)
TWO = np.stack([VOLUME, VOLUME // 255])  # image and mask
BDV = "t00000/s00/0/cells"
XYZ: dict[str, Any] = {"resolution": [5.0, 4.0, 10.0], "axes": ["x", "y", "z"]}
STATED: dict[str, Case] = {
    "second OME image": lambda p: ome(p, VOLUME[:2, :9], VOLUME) + ":/1",
    "named OME image": lambda p: ome(p, VOLUME[:2, :9], VOLUME) + ":/Image1",
    "slices as time points": lambda p: imagej(
        p, axes="TYX", unit="nm", spacing=10, resolution=(0.2, 0.25)
    ),
    "ImageJ zunit": lambda p: imagej(p, spacing=10, unit="um", zunit="nm"),
    "ImageJ yunit": lambda p: imagej(
        p, spacing=0.01, unit="um", yunit="nm", resolution=(200, 0.25)
    ),
    "x first": lambda p: array(p, **XYZ),
    "x first, HDF5": lambda p: hdf5(p, **XYZ),
    "x first, as one word": lambda p: hdf5(p, **XYZ | {"axes": "x,y,z"}),
    "micrometres": lambda p: hdf5(p, resolution=UM, units=["um"] * 3),
    "one unit": lambda p: array(p, resolution=[100, 40, 50], unit="angstrom"),
    "a channel's resolution": lambda p: array(
        p, VOLUME[None], resolution=[1, 10, 4, 5], axes=list("czyx")
    ),
    "OME-Zarr": image,
    "one image of bioformats2raw": lambda p: converted(p, "0"),
    "NIfTI": nifti,
}
"""Files that hold `VOLUME` and state `VOXEL`."""
UNSTATED: dict[str, Case] = {
    "slices appended": lambda p: tiff(p, *VOLUME),
    "slices appended, packed": lambda p: tiff(p, *VOLUME, compression="zlib"),
    "blocks appended": lambda p: tiff(p, VOLUME[:2], VOLUME[2:4], VOLUME[4]),
    "a channel": lambda p: tiff(p, np.moveaxis(TWO, 0, 1), metadata={"axes": "ZCYX"}) + ":/c=0",
    "slices as channels": lambda p: imagej(p, axes="CYX") + ":/c=z",
    "channel of Zarr": lambda p: array(p, TWO) + ":/0=0",
    "channel of HDF5": lambda p: hdf5(p, TWO) + ":/raw,0=0",
    "one channel last, TIFF": lambda p: tiff(p, VOLUME[..., None]),
    "one channel last, HDF5": lambda p: hdf5(p, VOLUME[..., None]),
    "one channel last, Zarr": lambda p: array(p, VOLUME[..., None]),
    "grey palettes, TIFF": lambda p: palette(p, grey, ".tif"),
    "grey palettes, PNG": lambda p: palette(p, grey, ".png"),
    "a palette of 8 bits": lambda p: tiff(
        p, photometric="palette", colormap=grey(np.arange(256, dtype="u2")).T
    ),
    "unsigned as signed": lambda p: hdf5(p, SIGNED, BDV),
    "unsigned as signed, high byte first": lambda p: hdf5(p, SIGNED.astype(">i2"), BDV),
    "bytes as signed": lambda p: array(p, VOLUME.view(np.int8)),
    "signed": lambda p: tiff(p, WIDE.astype(np.int32) - 9999),
    "ImageJ without unit": lambda p: imagej(p, spacing=1),
    "ImageJ without spacing": lambda p: imagej(p, unit="um"),
    "OME in pixels": lambda p: tiff(
        p, metadata={"axes": "ZYX", "PhysicalSizeX": 1}, file={"ome": True}
    ),
    "a printer's resolution": lambda p: tiff(p, resolution=(72, 72), resolutionunit="INCH"),
    "OME-Zarr without a scale": lambda p: image(p, [None]),
    "OME-Zarr without a unit": lambda p: image(p, [(1, 1, 1)], ""),
    "NIfTI without a unit": lambda p: nifti(p, unit="unknown"),
}
"""Files that hold `VOLUME`, or what `VALUES` has, and state no voxel size."""
VALUES = {
    "unsigned as signed": WIDE,
    "unsigned as signed, high byte first": WIDE,
    "signed": WIDE.astype("i4") - 9999,
}
IN_ORDER: dict[str, list[str]] = {
    "decimals in names": [f"s_{z:03d}_z={0.99 + z / 200:.4f}um.tif" for z in range(5)],
    "below zero": ["z=-0.2.png", "z=-0.1.png", "z=0.0.png", "z=0.1.png", "z=0.2.png"],
    "letters of two cases": ["S_1.png", "s_2.png", "S_3.png", "s_4.png", "s_10.png"],
    "decimals of any length": ["z9.5.png", "z9.75.png", "z10.png", "z10.25.png", "z10.5.png"],
}
"""Names of slices."""


@pytest.mark.parametrize("case", STATED | UNSTATED)
def test_what_can_be_meant_in_one_way_is_read_so(case: str, tmp_path: Path) -> None:
    source = open_image((STATED | UNSTATED)[case](tmp_path))
    values = VALUES.get(case, VOLUME)
    assert source.voxel_nm == (VOXEL if case in STATED else None)
    np.testing.assert_array_equal(source.read(0, 5), values, strict=True)
    np.testing.assert_array_equal(source.read(1, 4, 3, 9), values[1:4, 3:9])


@pytest.mark.parametrize("names", IN_ORDER.values(), ids=IN_ORDER)
def test_slices_are_in_the_order_that_their_names_have(names: list[str], tmp_path: Path) -> None:
    source = open_image(slices(tmp_path, names))
    np.testing.assert_array_equal(source.read(0, 5), VOLUME)


PAGES = [VOLUME[0], (VOLUME[1], {"compression": "zlib"}), *VOLUME[2:]]
RGB = np.random.default_rng(0).integers(0, 255, (4, 20, 30, 3), dtype=np.uint8)
TURNED = json.dumps({"axes": [{"key": k} for k in "xyz"]})
REFUSED: dict[str, tuple[Case, str]] = {
    "colours": (lambda p: tiff(p, RGB, photometric="rgb"), "channels differ"),
    "colours in Zarr": (lambda p: array(p, RGB), "3 places along axis 3 (colours?)"),
    "one slice of colours": (lambda p: hdf5(p, RGB[0]), "(colours?)"),
    "times": (
        lambda p: image(p, [None], axes="tzyx", volume=VOLUME[None].repeat(2, 0)),
        "axes t z y x",
    ),
    "turned axes": (lambda p: image(p, [None], axes="xyz"), "axes x y z"),
    "NIfTI of one slice": (lambda p: nifti(p, VOLUME[0]), "an array of shape (44, 31)"),
    "turned axes in HDF5": (lambda p: hdf5(p, axistags=TURNED), "axes x y z"),
    "NaN": (lambda p: nan(p, tiff), "2 NaN or infinite"),
    "NaN in Zarr": (lambda p: nan(p, array), "slices 0 to 4: found 2 NaN"),
    "nothing": (lambda p: p / "nothing.tif", "no such volume"),
    "no file": (lambda p: p / "nothing.h5", "no such volume"),
    "no array": (lambda p: group(p, "one") + "/three", "no such volume"),
    "another kind": (lambda p: Path(__file__), "another kind"),
    "no dataset": (lambda p: hdf5(p) + ":/missing", "one of :/raw"),
    "two arrays": (lambda p: group(p, "one", "two"), "2 volumes"),
    "slices of two sizes": (cut_short, "5.png: found slices of shape (20, 44)"),
    "two OME images": (lambda p: ome(p, VOLUME[:2, :9], VOLUME), ":/1 Image1 ZYX (5, 31, 44)"),
    "an OME image that is not there": (lambda p: ome(p) + ":/7", "no image '7'"),
    "an overview in a TIFF": (lambda p: tiff(p, VOLUME[0, :9], VOLUME), "2 images"),
    "a page of another compression": (lambda p: tiff(p, *PAGES, metadata=None), "2 images"),
    "a page of another type": (lambda p: tiff(p, *VOLUME[:4], WIDE[4], metadata=None), "2 images"),
    "fewer planes than pages": (lambda p: edited(p, b'SizeZ="5"', b'SizeZ="3"'), "belong to none"),
    "channels": (lambda p: imagej(p, axes="CYX"), "5 channels: axes c y x"),
    "channels of Zarr v3": (
        lambda p: array(p, TWO, 3, {"dimension_names": list("czyx")}),
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
    "an animation": (animation, "found 2 images"),
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
    assert said in refused(write(tmp_path))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda p: imagej(p, spacing=10, unit="um"), "10000 x 4 x 5"),  # a micrometre too much
        (lambda p: imagej(p, unit="um", spacing=1, resolution=(1, 1)), "nobody had set a size"),
        (lambda p: image(p, [(1, 1, 1)]), "nobody had set a size"),
        (lambda p: image(p, [(10, 4, 5)], "millimeter"), "no size of EM voxels"),
        (lambda p: array(p, resolution=UM), "no size of EM voxels"),
        (
            lambda p: hdf5(p, element_size_um=UM, resolution=[30, 4, 5]),
            "disagree",
        ),
        (lambda p: array(p, VOLUME, 3, {"dimension_names": list("zyx")}, **XYZ), "disagree"),
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
    stack, _ = labelled(part.images, tmp_path / "label.nii.gz", (1, 2))
    np.testing.assert_array_equal(stack.read(0, 5), part.images.read(0, 5))
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
