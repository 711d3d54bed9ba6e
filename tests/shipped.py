"""The studies in studies/ made small, and the verbs that `dvc repro` runs on them, in its order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from PIL import Image

from emadapt.cli import main
from emadapt.study.loading import load_study
from emadapt.study.study import Study
from tiny import blobs

STUDIES = Path(__file__).parents[1] / "studies"


def in_small(name: str, train: dict[str, Any], **backbone: Any) -> dict[str, Any]:
    """The settings of a shipped study with one seed, tiny backbones and a short diagnosis.

    Regimes that start from a model folder are left out: its backbone is not a tiny one.

    Args:
        name: of the study.
        train: replaces its section; epochs of single regimes go.
        backbone: what is changed in each of its backbones besides.
    """
    params = dict(yaml.safe_load((STUDIES / name / "study.yaml").read_text()))
    params["study"]["seeds"] = [0]
    params["train"] = train
    params["diagnose"] = {
        "blocks": 4,
        "tokens": 200,
        "permutations": 3,
        "replicates": 2,
        "slices": 4,
        "controls": False,
    }
    for name_of_regime, regime in [*params["regimes"].items()]:
        regime.pop("epochs", None)
        if "/" in regime.get("warm_start", ""):
            del params["regimes"][name_of_regime]
            params["study"]["regimes"].remove(name_of_regime)
    for dataset in params["datasets"].values():
        if "domains" in dataset:
            dataset["domains"] = 8
    for spec in params["backbones"].values():
        spec |= {"arch": "tiny_dinov2_reg", "source": "random", **backbone}
    return params


def run_small(params: dict[str, Any]) -> dict[str, Any]:
    """Write params.yaml, check it, run all of it; gives the summary, which was looked through."""
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    emadapt("check")
    study = load_study()
    summary = run_all(study)
    check_summary(summary, study)
    return summary


def emadapt(*words: str) -> str:
    result = CliRunner().invoke(main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return str(result.output)


def run_all(study: Study) -> dict:
    """What `dvc repro` runs, in its order."""
    for dataset in study.datasets:
        emadapt("ingest", dataset)
    emadapt("plan")
    for backbone in study.backbones:
        for dataset in study.datasets:
            emadapt("tokens", backbone, dataset)
    for unit in study.units():
        emadapt("train", unit.name)
        emadapt("evaluate", unit.name)
    for backbone in study.backbones:
        for regime in study.regimes:
            emadapt("diagnose", backbone, regime)
    emadapt("report")
    return dict(json.loads(Path("reports/summary.json").read_text()))


def check_summary(summary: dict, study: Study) -> None:
    seeds = len(study.seeds)
    found = {(u["backbone"], u["regime"], u["train_set"], u["test_set"]) for u in summary["units"]}
    scored = [name for name in study.datasets if study.dataset_settings[name].labelled]
    assert found == {(u.backbone, u.regime, u.train_set, d) for u in study.units() for d in scored}
    for unit in summary["units"]:
        assert unit["n"] > 0
        assert unit["trainable_params"] > 0
        assert unit["seconds"] > 0
        assert unit["peak_mb"] > 0
        for metric in ("iou", "dice", "boundary_iou"):
            assert len(unit[metric]["values"]) == seeds
            assert all(0 <= v <= 1 for v in unit[metric]["values"])
            assert unit[metric]["mean"] == pytest.approx(np.mean(unit[metric]["values"]), abs=1e-5)
            assert unit[metric]["ci95"][0] <= unit[metric]["mean"] + 1e-6


def write_reference_layouts(data: Path, slices: int, sections: int = 10) -> None:
    """Lucchi and VNC in their public layouts, small: Lucchi 72 x 96, VNC 80 x 80."""
    for seed, part in enumerate(("Train", "Test")):
        image, label = blobs((slices, 72, 96), seed)
        for folder, name, stack in (
            (f"{part}_In", "mask{:04d}.png", image),
            (f"{part}_Out", "{}.png", label * 255),
        ):
            (data / "lucchi" / folder).mkdir(parents=True)
            for z, plane in enumerate(stack):
                Image.fromarray(plane).save(data / "lucchi" / folder / name.format(z))
    image, label = blobs((sections, 80, 80), 2)
    for folder, name, stack in (
        ("raw", "{:02d}.tif", image),
        ("mitochondria", "{:02d}.png", label * 255),
    ):
        (data / "vnc" / folder).mkdir(parents=True)
        for z, plane in enumerate(stack):
            Image.fromarray(plane).save(data / "vnc" / folder / name.format(z))
