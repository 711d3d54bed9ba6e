"""What outputs hold and say, as TIFF and as OME-Zarr."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr as typed_zarr
from ome_types import validate_xml

from emadapt.segment.outputs import provenance, publish, targets
from emadapt.segment.partial import Partial, begin
from emadapt.volumes import write_tiff as tiff_writer
from emadapt.volumes import write_zarr as zarr_writer
from emadapt.volumes.opening import open_source
from emadapt.volumes.write_tiff import write_tiff
from emadapt.volumes.write_zarr import scale_factors, write_zarr
from test_segment_instances import JOB

zarr: Any = typed_zarr  # its types are narrower than what it takes

VOXEL = (30.0, 5.0, 4.0)
VOLUME = np.random.default_rng(0).integers(0, 256, (5, 71, 90), dtype=np.uint8)


@pytest.fixture
def partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Partial:
    monkeypatch.setattr(zarr_writer, "CHUNK", 16)
    monkeypatch.setattr(tiff_writer, "CHUNK", 16)
    monkeypatch.setattr(zarr_writer, "SMALLEST", 20)
    job = dataclasses.replace(
        JOB, shape=(5, 71, 90), depth=2, rows=71, kinds=("mask", "probabilities")
    )
    (tmp_path / "p").mkdir()
    partial = begin(tmp_path / "p", job, False)
    partial.array("mask")[:] = np.where(VOLUME > 99, 255, 0)
    partial.array("probabilities")[:] = VOLUME
    return partial


@pytest.mark.parametrize(
    ("shape", "voxel", "steps"),
    [
        ((100, 1024, 768), (30, 4, 4), ["111", "122", "144"]),
        ((100, 2048, 2048), (10, 5, 5), ["111", "122", "244", "488"]),
        ((9, 1024, 1024), (5, 5, 5), ["111", "222", "444"]),
        ((9, 1024, 1024), (2, 50, 50), ["111", "211", "411", "811", "822", "844"]),
        ((9, 200, 200), (5, 5, 5), ["111"]),
    ],
)
def test_scales_halve_the_shortest_voxels(shape: Any, voxel: Any, steps: list[str]) -> None:
    assert scale_factors(shape, voxel) == [[int(factor) for factor in step] for step in steps]


def test_coarser_scales_of_labels_and_of_means(partial: Partial) -> None:
    for kind in ("mask", "probabilities"):
        write_zarr(partial.folder / kind, kind, VOXEL, {})
        attributes: Any = zarr.open_group(partial.folder / kind, mode="r").attrs.asdict()
        [image] = attributes["multiscales"]
        assert image["version"] == "0.4"
        assert image["axes"] == [{"name": a, "type": "space", "unit": "nanometer"} for a in "zyx"]
        datasets = image["datasets"]
        factors = scale_factors((5, 71, 90), (30.0, 5.0, 4.0))
        assert len(datasets) == len(factors) == 4
        for level, (entry, factor) in enumerate(zip(datasets, factors, strict=True)):
            small = zarr.open_array(partial.folder / kind / entry["path"], mode="r")
            changes = {c["type"]: c[c["type"]] for c in entry["coordinateTransformations"]}
            assert list(changes) in (["scale"], ["scale", "translation"]), "in this order"
            assert small.metadata.dimension_separator == "/"
            assert changes["scale"] == [30.0 * factor[0], 5.0 * factor[1], 4.0 * factor[2]]
            full = np.asarray(partial.array(kind)[:])
            if kind == "mask":
                first = full[:: factor[0], :: factor[1], :: factor[2]]
                np.testing.assert_array_equal(small[:], first)
                assert "translation" not in changes
            else:
                half = [(f - 1) / 2 for f in factor]
                assert changes["translation"] == [30.0 * half[0], 5.0 * half[1], 4.0 * half[2]]
                cell = full[: factor[0], factor[1] : 2 * factor[1], : factor[2]]
                assert abs(int(small[0, 1, 0]) - cell.mean()) <= level
                # a cell cut short
                last = full[:, 71 // factor[1] * factor[1] :, :] if 71 % factor[1] else full
                assert last.min() <= small[0, -1, -1] <= last.max()


def test_tiffs_say_what_they_are(partial: Partial, monkeypatch: pytest.MonkeyPatch) -> None:
    for limits in ({}, {"HELD": 1}, {"TILED": 100}, {"CLASSIC": 100}):
        for name, value in limits.items():
            monkeypatch.setattr(tiff_writer, name, value)
        group = partial.folder / "probabilities"
        path = write_tiff(group, "probabilities", VOXEL, {"unit": "u"})
        first = path.read_bytes()
        assert write_tiff(group, "probabilities", VOXEL, {"unit": "u"}).read_bytes() == first
        with tifffile.TiffFile(path) as tif:
            np.testing.assert_array_equal(tif.asarray(), VOLUME)
            assert tif.pages.first.is_tiled == ("TILED" in limits or "CLASSIC" in limits)
            assert tif.is_bigtiff == ("CLASSIC" in limits)
            assert tif.series[0].axes == "ZYX"
            assert tif.ome_metadata is not None
            validate_xml(tif.ome_metadata)  # against the schema
            image = tifffile.xml2dict(tif.ome_metadata)["OME"]["Image"]
        assert [image["Pixels"][f"PhysicalSize{a}"] for a in "ZYX"] == [0.03, 0.005, 0.004]
        assert json.loads(image["Description"])["unit"] == "u"
    assert open_source(str(path)).voxel_nm == VOXEL


@pytest.mark.parametrize(
    ("path", "stamp", "expected"),
    [
        ("/home/ada/em.tif", [["em.tif", 9, 1]], {"input": "em.tif", "input_bytes": 9}),
        (
            "/home/ada/em.h5:/volumes/raw",
            [["em.h5", 9, 1]],
            {"input": "em.h5:/volumes/raw", "input_bytes": 9},
        ),
        ("/home/ada/em.ome.zarr/0", [[".zarray", 9, 1]], {"input": "em.ome.zarr/0"}),
        ("/home/ada/slices", [["a.png", 9, 1], ["b.png", 9, 1]], {"input": "slices"}),
    ],
)
def test_an_output_names_its_input_without_the_folder(
    path: str, stamp: list[Any], expected: dict[str, Any]
) -> None:
    said = provenance(dataclasses.replace(JOB, input=path, stamp=stamp), "mask")
    assert {key: value for key, value in said.items() if key.startswith("input")} == expected
    assert "ada" not in json.dumps(said)


def test_names_of_outputs() -> None:
    named = targets("a/b.x.ome.tif", ("mask", "probabilities", "instances"))
    assert {k: str(v) for k, v in named.items()} == {
        "probabilities": "a/b.x-probabilities.ome.tif",
        "instances": "a/b.x-instances.ome.tif",
        "table": "a/b.x-instances.csv",
        "mask": "a/b.x.ome.tif",
    }
    assert list(named)[-1] == "mask"


def test_what_is_replaced_is_put_aside_first(tmp_path: Path) -> None:
    for name in ("new", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / "kept").touch()  # renamed before an interruption
    publish(
        {tmp_path / "new": tmp_path / "out", tmp_path / "gone": tmp_path / "kept"},
        tmp_path / "aside",
    )
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["new"]
    assert (tmp_path / "aside/out/out").exists()
