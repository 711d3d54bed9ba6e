"""docs/your-own-data.md: its Python runs, and its studies can be ingested."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr as typed_zarr

from emadapt.data.ingest import Volume, ingest, open_volume
from emadapt.models.token_statistics import token_facts
from emadapt.segment.job import Order
from emadapt.segment.run import segment_volume
from emadapt.study.loading import load_study
from emadapt.training.model_files import load_model
from tiny import blobs, write_model

zarr: Any = typed_zarr  # its types are narrower than what it takes

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/your-own-data.md").read_text()
VOXEL = (30.0, 5.0, 5.0)


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """What the document's reader has: a volume and a model."""
    monkeypatch.chdir(tmp_path)
    image, label = blobs((30, 90, 100), 3)
    zarr.create_array("volume.zarr", data=image)
    write_model(Path("models/lucchi"))
    segmenter, _ = load_model(Path("models/lucchi"))
    own = Volume(
        "a",
        image,
        label,
        {"split": {"train": [0, 1], "val": [2, 3], "test": []}, "md5": "", "voxel_nm": VOXEL},
    )
    write_model(Path("models/lucchi"), facts={"tokens": token_facts(segmenter, [own], [])})
    return tmp_path


def test_slices_to_label_become_a_dataset_of_a_study(here):
    segment_volume(Order("volume.zarr", "mask.tif", "models/lucchi", voxel_nm=VOXEL))
    labelling, notebook = blocks("python")
    exec(compile(labelling, "labelling", "exec"), {})
    names = sorted(p.name for p in Path("data/mine/labels").iterdir())
    assert names == sorted(p.name for p in Path("data/mine/images").iterdir())
    assert len(names) == 10
    study_text, *_ = blocks("yaml")
    Path("params.yaml").write_text(study_text)
    study = load_study(Path("params.yaml"))
    ingest(study, "mine", Path("data"), Path("build/ingest"))
    volume = open_volume("mine", Path("build/ingest"))
    # As the text says.
    assert {part: len(own) for part, own in volume.split.items()} == {
        "train": 5,
        "val": 1,
        "test": 2,
    }
    shown = zarr.open_array("volume.zarr", mode="r")[int(names[3][:5])]
    np.testing.assert_array_equal(volume.image[3], shown)
    np.testing.assert_array_equal(
        volume.label[3] > 0, tifffile.imread("mask.tif")[int(names[3][:5])] > 0
    )
    meta = {
        "axes": "ZYX",
        **{f"PhysicalSize{a}": v / 1e3 for a, v in zip("ZYX", VOXEL, strict=True)},
    }
    tifffile.imwrite("volume.ome.tif", volume.image[:3], photometric="minisblack", metadata=meta)
    exec(compile(notebook, "notebook", "exec"), {})
