"""What outputs hold and say, as TIFF and as OME-Zarr."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr as typed_zarr
from ome_types import validate_xml

from emadapt.segment.outputs import provenance, publish
from emadapt.segment.partial import begin
from emadapt.volumes import write_tiff as tiff_writer
from emadapt.volumes import write_zarr as zarr_writer
from emadapt.volumes.opening import open_source
from emadapt.volumes.write_tiff import write_ome_tiff, write_tiff
from emadapt.volumes.write_zarr import scale_factors, write_zarr
from test_segment_instances import JOB

zarr: Any = typed_zarr  # its types are narrower than what it takes

VOXEL = (30.0, 5.0, 4.0)
VOLUME = np.random.default_rng(0).integers(0, 256, (5, 71, 90), dtype=np.uint8)


@pytest.fixture
def partial(tmp_path, monkeypatch):
    """The blocks of a run that is done."""
    monkeypatch.setattr(zarr_writer, "CHUNK", 16)
    monkeypatch.setattr(tiff_writer, "CHUNK", 16)
    monkeypatch.setattr(zarr_writer, "SMALLEST", 20)
    how: dict[str, Any] = {"depth": 2, "rows": 71, "kinds": ("mask", "probabilities")}
    partial = begin(tmp_path, dataclasses.replace(JOB, shape=VOLUME.shape, **how), False)
    partial.array("mask")[:] = np.where(VOLUME > 99, 255, 0)
    partial.array("probabilities")[:] = VOLUME
    return partial


@pytest.mark.parametrize(
    ("shape", "voxel", "steps"),
    [
        ((100, 1024, 768), (30, 4, 4), ["111", "122", "144"]),
        ((100, 2048, 2048), (10, 5, 5), ["111", "122", "244", "488"]),
        ((9, 1024, 1024), (2, 50, 50), ["111", "211", "411", "811", "822", "844"]),
        ((9, 200, 200), (5, 5, 5), ["111"]),
    ],
)
def test_scales_halve_the_shortest_voxels(shape, voxel, steps):
    assert scale_factors(shape, voxel) == [[int(factor) for factor in step] for step in steps]


@pytest.mark.parametrize("kind", ["mask", "probabilities"])
def test_coarser_scales_of_labels_and_of_means(partial, kind):
    write_zarr(partial.folder / kind, kind, VOXEL, {})
    attributes: Any = zarr.open_group(partial.folder / kind, mode="r").attrs.asdict()
    [image] = attributes["multiscales"]
    assert image["version"] == "0.4"
    assert image["axes"] == [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
    full, factors = partial.array(kind)[:], scale_factors(VOLUME.shape, VOXEL)
    for level, (entry, factor) in enumerate(zip(image["datasets"], factors, strict=True)):
        small = zarr.open_array(partial.folder / kind / entry["path"], mode="r")
        changes = {c["type"]: c[c["type"]] for c in entry["coordinateTransformations"]}
        assert changes["scale"] == [v * f for v, f in zip(VOXEL, factor, strict=True)]
        if kind == "mask":
            first = full[:: factor[0], :: factor[1], :: factor[2]]
            np.testing.assert_array_equal(small[:], first)
            assert "translation" not in changes
            continue
        half = [v * (f - 1) / 2 for v, f in zip(VOXEL, factor, strict=True)]
        assert list(changes) == ["scale", "translation"], "in this order"
        assert changes["translation"] == half
        cell = full[: factor[0], factor[1] : 2 * factor[1], : factor[2]]
        assert abs(int(small[0, 1, 0]) - cell.mean()) <= level


def written(partial, write):
    """The file of the probabilities; written a second time, it has the same bytes."""
    first, again = (
        write(partial.folder / "probabilities", "probabilities", VOXEL, {"unit": "u"}).read_bytes()
        for _ in range(2)
    )
    assert first == again
    return partial.folder / "probabilities.tif"


@pytest.mark.parametrize("small", [(), ("HELD",), ("HELD", "TILED"), ("TILED", "CLASSIC")])
def test_ome_tiffs_say_what_they_are(partial, monkeypatch, small):
    for name in small:
        monkeypatch.setattr(tiff_writer, name, 100)
    path = written(partial, write_ome_tiff)
    with tifffile.TiffFile(path) as tif:
        np.testing.assert_array_equal(tif.asarray(), VOLUME)
        assert tif.pages.first.is_tiled == ("TILED" in small)
        assert tif.is_bigtiff == ("CLASSIC" in small)
        assert tif.series[0].axes == "ZYX"
        validate_xml(str(tif.ome_metadata))  # against the schema
        image = tifffile.xml2dict(str(tif.ome_metadata))["OME"]["Image"]
    assert json.loads(image["Description"])["unit"] == "u"
    assert open_source(str(path)).voxel_nm == VOXEL


@pytest.mark.parametrize("small", ["", "HELD", "TILED", "CLASSIC"])
def test_tiffs_are_those_of_imagej_as_far_as_it_reads_them(partial, monkeypatch, small):
    if small:
        monkeypatch.setattr(tiff_writer, small, 100)
    path = written(partial, write_tiff)
    with tifffile.TiffFile(path) as tif:
        np.testing.assert_array_equal(tif.asarray(), VOLUME)
        assert tif.is_imagej == (small not in ("TILED", "CLASSIC"))
        if tif.is_imagej:
            assert json.loads((tif.imagej_metadata or {})["Info"]) == {"unit": "u"}
    assert open_source(str(path)).voxel_nm == VOXEL


def test_an_output_names_its_input_without_the_folder():
    for path, name in (
        ("/home/ada/em.h5:/raw", "em.h5:/raw"),
        ("/home/ada/em.zarr/0", "em.zarr/0"),
    ):
        job = dataclasses.replace(JOB, input=path, stamp=[["any", 9, 1]])
        said = provenance(job, "mask")
        assert said["input"] == name
        assert "ada" not in json.dumps(said)


def test_what_is_replaced_is_put_aside_first(tmp_path):
    for name in ("new", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / "kept").touch()  # renamed before an interruption
    moves = {tmp_path / "new": tmp_path / "out", tmp_path / "gone": tmp_path / "kept"}
    publish(moves, tmp_path / "aside")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert (tmp_path / "aside/out/out").exists()
