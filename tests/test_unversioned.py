"""Raw data behind links and outside of data/: changes are noticed; no advice destroys a file."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile

from emadapt.data.ingest import ingest
from emadapt.errors import InputError
from emadapt.pipeline.check import check_study
from emadapt.study.loading import load_study
from emadapt.training.plan import write_plans
from tiny import make_study, settings, under_dvc


def linked(root: Path) -> None:
    """data/a is a link to a folder elsewhere."""
    shutil.move(root / "data/a", root / "elsewhere")
    (root / "data/a").symlink_to(root / "elsewhere")


def linked_inside(root: Path) -> None:
    """data/a has two volumes, each a link to a folder elsewhere."""
    (root / "data/a").rename(root / "elsewhere")
    (root / "data/a").mkdir()
    for part in ("train", "test"):
        (root / "data/a" / part).symlink_to(root / "elsewhere")


def outside(root: Path) -> None:
    """`path` names a folder that is not in data/."""
    shutil.move(root / "data/a", root / "elsewhere")
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(
        text.replace("  a:\n    layout", f"  a:\n    path: {root}/elsewhere\n    layout")
    )


@pytest.mark.parametrize("place", [linked, linked_inside, outside])
def test_a_change_where_dvc_does_not_look_is_noticed(tmp_path, tracking_off, place):
    make_study(tmp_path, ingested=False)
    place(tmp_path)
    study = load_study()
    for name in study.datasets:
        ingest(study, name)
    write_plans(study)
    assert check_study(Path("params.yaml")) == []
    image = tifffile.imread("elsewhere/image.tif")
    tifffile.imwrite("elsewhere/image.tif", 255 - image, photometric="minisblack")
    with pytest.raises(InputError, match="--force --single-item ingest@a"):
        write_plans(study)
    assert any("ingest@a" in problem for problem in check_study(Path("params.yaml")))
    ingest(study, "a")
    write_plans(study)
    assert check_study(Path("params.yaml")) == []
    shutil.rmtree("elsewhere")  # as on a machine that has what was ingested from DVC's cache
    write_plans(study)


@pytest.mark.slow
def test_the_advice_on_changed_data_destroys_nothing(tmp_path):
    """What is printed puts the newer file aside, brings back the older one, and spares links."""
    make_study(tmp_path, settings(), ingested=False)
    sh = under_dvc(tmp_path)
    old = (tmp_path / "data/a/image.tif").read_bytes()
    linked(tmp_path)
    elsewhere = (tmp_path / "elsewhere/image.tif").read_bytes()
    newer = np.zeros((10, 90, 100), np.uint8)
    tifffile.imwrite(tmp_path / "data/b/image.tif", newer, photometric="minisblack")
    said = sh("emadapt", "repro", code=2)
    advice = said.split("`")[-2]
    assert advice.startswith("mv data ")
    sh("sh", "-c", advice)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "data.changed/b/image.tif"), newer)
    assert (tmp_path / "data/a/image.tif").read_bytes() == old
    assert (tmp_path / "elsewhere/image.tif").read_bytes() == elsewhere
