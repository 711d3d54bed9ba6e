"""A dataset of images alone: read, looked at by penalties and diagnostics, never scored."""

import json
from pathlib import Path
from typing import Any

import pytest

from emadapt.data.ingest import ingest
from emadapt.domains.run import diagnose
from emadapt.errors import InputError
from emadapt.models.tokens import run
from emadapt.pipeline.check import check_study
from emadapt.report.recommend import recommend
from emadapt.report.report import build_report
from emadapt.study.study import Study
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.train import train_unit
from tiny import blobs, make_study, settings, write_stack


@pytest.fixture(autouse=True)
def place(tracking_off):
    """A folder of its own."""


def params(train_set: Any = None) -> dict[str, Any]:
    """Trained on a and b with labels, while c has images alone."""
    own = settings(epochs=1, steps_per_epoch=2)
    own["datasets"]["c"] = {"layout": "stack", "voxel_nm": [40, 5, 5], "labelled": False}
    own["study"]["datasets"] = ["a", "b", "c"]
    own["regimes"] |= {"taught": {"kind": "frozen", "self_training": 1.0}}
    own["train_sets"] = {"onto_c": train_set or {"datasets": ["a", "b"], "unlabelled": ["c"]}}
    own["study"] |= {"regimes": ["taught"], "train_sets": ["onto_c"]}
    own["diagnose"] |= {"controls": False}
    return own


def study_of(root: Path, own: dict[str, Any], *, ingested: bool = True) -> Study:
    write_stack(root / "data/c", *blobs((7, 80, 90), 2))
    (root / "data/c/label.tif").unlink()
    return make_study(root, own, ingested=ingested)


def test_from_images_to_the_report(tmp_path, plain_pictures):
    study = study_of(tmp_path, params())
    assert study.tested == ("a", "b")
    assert check_study(tmp_path / "params.yaml") == []
    for name in study.datasets:
        run(study, "t", name)
    (unit,) = study.units()
    train_unit(study, unit)
    assert set(json.loads(evaluate_unit(study, unit).read_text())["test"]) == {"a", "b"}
    card = json.loads(Path("build/units/t-taught-onto_c-0/model.json").read_text())
    assert set(card["unlabelled_md5"]) == {"c"}
    found = json.loads(diagnose(study, "t", "taught").read_text())
    pairs = {(e["a"], e["b"], e["level"]) for e in found["pairs"]}
    assert pairs == {(a, b, at) for a, b in ("ab", "ac", "bc") for at in ("token", "image")}
    assert {(e["train"], e["test"]) for e in found["segmentation"]} == {
        (x, y) for x in "ab" for y in "ab"
    }
    summary = json.loads(build_report(tmp_path, study).read_text())
    assert {e["test_set"] for e in summary["units"]} == {"a", "b"}
    page = (tmp_path / "reports/index.html").read_text()
    assert "a, c" in page
    assert recommend(tmp_path, study, study.tested)


def test_missing_labels_are_still_an_error_where_they_are_expected(tmp_path):
    own = params()
    del own["datasets"]["c"]["labelled"]
    study = study_of(tmp_path, own, ingested=False)
    problems = check_study(tmp_path / "params.yaml")
    assert any("expected one volume" in problem for problem in problems)
    with pytest.raises(InputError, match="expected one volume called label"):
        ingest(study, "c", tmp_path / "data")
