"""A study whose backbones align slices: trained, evaluated, diagnosed, and followed by DVC."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from emadapt.data import align
from emadapt.data.align import METHODS, aligner_of, statistics
from emadapt.data.ingest import open_volume
from emadapt.domains.run import diagnose
from emadapt.models.segmenter import load_segmenter
from emadapt.models.tokens import run
from emadapt.study.rules import ALIGNMENTS
from emadapt.study.study import Study, Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.train import train_unit
from tiny import alignment, make_study, settings, under_dvc


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMADAPT_TRACKING", "off")


def aligned_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A backbone for each method, two datasets of different pixel size."""
    monkeypatch.setattr("emadapt.models.unet2d.FEATURES", (8, 8, 16, 32, 64, 8))
    params = settings(epochs=1, steps_per_epoch=1)
    params["backbones"] = {m: params["backbones"]["t"] | alignment(m) for m in ALIGNMENTS}
    params["diagnose"] |= {"controls": False, "permutations": 3, "replicates": 2}
    params["datasets"]["a"]["voxel_nm"] = [30, 4, 4]
    params["regimes"] = {
        "frozen": {"kind": "frozen"},
        "unet2d": {"kind": "unet2d"},
        "lora": {"kind": "lora", "rank": 2},
    }
    params["study"] |= {
        "backbones": list(ALIGNMENTS),
        "regimes": list(params["regimes"]),
        "train_sets": ["paired"],
    }
    return make_study(tmp_path, params)


def train_and_evaluate(study: Study, unit: Unit) -> None:
    folder = train_unit(study, unit)
    assert set(json.loads(evaluate_unit(study, unit).read_text())["test"]) == {"a", "b"}
    check_card(study, unit.backbone, load_segmenter(folder)[1])


def test_a_union_trains_and_evaluates_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = aligned_study(tmp_path, monkeypatch)
    train_and_evaluate(study, Unit("histogram", "frozen", "paired", 0))
    train_and_evaluate(study, Unit("voxel", "unet2d", "paired", 0))


@pytest.mark.slow
def test_a_study_trains_evaluates_and_diagnoses_with_each_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = aligned_study(tmp_path, monkeypatch)
    for method in ALIGNMENTS:
        for dataset in study.datasets:
            run(study, method, dataset)
        for regime in ("frozen", *(["lora"] if method == "fda" else [])):
            train_and_evaluate(study, Unit(method, regime, "paired", 0))
            assert json.loads(diagnose(study, method, regime).read_text())["pairs"]


def check_card(study: Study, method: str, card: dict[str, Any]) -> None:
    """What a model says of its alignment is enough to align other data without the reference's files."""
    assert (card["backbone"]["align"], card["settings"]["backbone"]["align"]) == (method, method)
    said, own = card["align"], statistics(open_volume("a"))
    assert said["datasets"]["a"]["method"] == method
    reference = align.Statistics(**said["reference"]) if "reference" in said else own
    shutil.move("build/ingest/b", "elsewhere")
    again = METHODS[method](own, reference)
    shutil.move("elsewhere", "build/ingest/b")
    image = open_volume("a").image[0]
    expected = aligner_of(open_volume("a"), study.backbone_settings[method])
    assert again.facts == expected.facts
    np.testing.assert_array_equal(again(image), expected(image))


@pytest.mark.slow
def test_dvc_makes_aligned_tokens_again_when_the_reference_changes_and_no_others(
    tmp_path: Path,
) -> None:
    params = settings(epochs=1, steps_per_epoch=1)
    params["backbones"]["h"] = params["backbones"]["t"] | alignment("histogram")
    params["study"] |= {"backbones": ["t", "h"], "regimes": ["ridge"], "train_sets": ["a"]}
    params["regimes"] = {"ridge": {"kind": "ridge"}}
    make_study(tmp_path, params, ingested=False)
    sh = under_dvc(tmp_path)
    trained = ["train@t-ridge-a-0", "train@h-ridge-a-0"]
    sh("dvc", "repro", *trained)
    path = tmp_path / "data/b/image.tif"
    tifffile.imwrite(path, 255 - tifffile.imread(path), photometric="minisblack")
    sh("dvc", "add", "-q", "data")
    before = ["trainset@t-a", "trainset@h-a"]
    ran = {
        line.split("'")[1]
        for line in sh("dvc", "repro", *before).splitlines()
        if line.startswith("Running stage")
    }
    assert {"ingest@b", "reference@h", "tokens@h-a", "trainset@h-a"} <= ran
    assert "tokens@t-a" not in ran  # ingest@a looks at all of data/, and writes the same again
    stale = {
        line.rstrip(":")
        for line in sh("dvc", "status", *trained).splitlines()
        if line.endswith(":") and line[0] != "\t"
    }
    assert stale == {"train@h-ridge-a-0"}
