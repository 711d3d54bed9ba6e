"""End to end: the verbs one after the other, what they refuse, and DVC around it all."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from emadapt import api
from emadapt.cli import main
from emadapt.domains.run import diagnose
from emadapt.segment.model import open_model
from emadapt.tracking import store
from emadapt.training.model_card import EVALUATED
from runs import runs_of
from shipped import check_summary, emadapt, run_all
from tiny import blobs, make_study, settings, under_dvc

ROOT = Path(__file__).parents[1]


def test_the_verbs_one_after_the_other_with_the_lab_book(
    tmp_path: Path, plain_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = make_study(tmp_path, ingested=False)
    emadapt("check")
    check_summary(run_all(study), study)
    client, runs = store.client(tmp_path), runs_of(tmp_path)
    assert sorted(r.data.tags["unit"] for r in runs) == sorted(u.name for u in study.units())
    for run in runs:
        tags, metrics = run.data.tags, run.data.metrics
        assert {"train/loss", "val/iou", "test/iou.a", "domain/frechet.a__b"} <= metrics.keys()
        assert {"seconds", "peak_mb", "trainable_params", "train/lr_head"} <= metrics.keys()
        scores = json.loads((EVALUATED / tags["unit"] / "metrics.json").read_text())["test"]
        for name, key in itertools.product(scores, ("ap50", "pq")):
            assert metrics[f"test/{key}.{name}"] == scores[name]["instances"][key]
        assert {"backbone", "regime", "train_set", "seed", "study", "params.sha256"} <= tags.keys()
        assert {"model.md5", "weights.source", "weights.sha256"} <= tags.keys()
        assert run.info.status == "FINISHED"
        folders = [f.path for f in client.list_artifacts(run.info.run_id)]
        files = {a.path for f in folders for a in client.list_artifacts(run.info.run_id, f)}
        assert {"overlays/overlay-a.png", "domain/pca.png"} <= files
        curve = client.get_metric_history(run.info.run_id, "val/iou")
        assert [m.step for m in curve] == [1, 2]
        adapted = tags["regime"] == "lora"
        assert ("train/lr_adapter" in metrics) == adapted
        assert ("train.adapter_lr" in run.data.params) == adapted
        check_model(client, run)


def check_model(client: Any, run: Any) -> None:
    """MLflow opens a run's model, which segments as the unit does; its scores name datasets."""
    from mlflow.pyfunc import load_model

    unit, image = run.data.tags["unit"], blobs((2, 90, 100), 3)[0]
    opened = load_model(f"runs:/{run.info.run_id}/model")
    found = opened.predict(image, params={"voxel_nm": [30.0, 5.0, 5.0]})
    expected = api.segment(image, open_model(unit), (30.0, 5.0, 5.0), probabilities=True)
    np.testing.assert_array_equal(found, expected)
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert (model.name, model.status, model.tags["unit"]) == ("model", "READY", unit)
    scores = {(m.key, m.dataset_name): m.value for m in model.metrics}
    for name in ("a", "b"):
        assert scores[f"test/iou.{name}", name] == run.data.metrics[f"test/iou.{name}"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "t-frozen-a-7"], "is not in study 'tiny'"),
        (["ingest", "c"], "'c' is not in study.datasets"),
        (["tokens", "t", "c"], "'c' is not in study.datasets"),
        (["evaluate", "t-frozen-a-0"], "dvc repro train@"),
    ],
)
def test_wrong_words_end_with_2_and_one_line(
    tmp_path: Path, monkeypatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_study(tmp_path, ingested=False)
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert len([line for line in result.output.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.parametrize(
    ("words", "heavy"),
    [
        ("--help", ("torch", "mlflow", "timm", "dvc", "numpy", "albumentations")),
        ("check", ("torch", "mlflow", "timm", "dvc", "scipy", "albumentations")),
        ("plan", ("torch", "mlflow", "scipy", "matplotlib")),
        ("measure o.tif o.csv --voxel-nm 9 9 9", ("torch", "mlflow", "dvc")),
    ],
)
def test_quick_answers_need_no_heavy_import(
    tmp_path: Path, words: str, heavy: tuple[str, ...]
) -> None:
    make_study(tmp_path)
    objects = np.arange(3, dtype="u1").repeat(100).reshape(3, 10, 10)
    tifffile.imwrite(tmp_path / "o.tif", objects, photometric="minisblack")
    code = (
        "import sys\nfrom emadapt.cli import main\n"
        f"main({words.split()}, standalone_mode=False)\n"
        f"assert not [module for module in {heavy} if module in sys.modules]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.slow
def test_dvc_runs_the_pipeline_in_parallel_then_has_nothing_to_do(tmp_path: Path) -> None:
    """Two stages of a tiny study at a time; a second run; edited data; a changed setting."""
    params = settings(epochs=1, steps_per_epoch=1)
    params["study"] |= {"datasets": ["a"], "train_sets": ["a"]}
    params["diagnose"]["controls"] = False
    make_study(tmp_path, params, ingested=False)
    sh = under_dvc(tmp_path)

    def stale() -> set[str]:
        lines = sh("dvc", "status").splitlines()
        return {line.rstrip(":") for line in lines if line and line[0] not in "\t "}

    out = sh("emadapt", "repro", "--jobs", "2")
    assert (tmp_path / "reports/summary.json").is_file()
    assert "failed" not in out
    assert stale() == {"plan"}  # which always runs
    assert "every stage is up to date" in sh("emadapt", "repro", "--jobs", "2")
    with (tmp_path / "data/a/image.tif").open("ab") as file:
        file.write(b" ")
    assert "not what data.dvc records" in sh("emadapt", "repro", code=2)
    shutil.rmtree(tmp_path / "data")
    assert "dvc pull data.dvc" in sh("emadapt", "repro", code=2)
    sh("dvc", "checkout", "--force", "data.dvc")
    text = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("rank: 2", "rank: 3"))
    ran = re.findall(r"^(\S+): \d+ s$", sh("emadapt", "repro", "--jobs", "2"), re.MULTILINE)
    unit = "t-lora-a-0"
    assert set(ran) == {"plan", f"train@{unit}", f"evaluate@{unit}", "diagnose@t-lora", "report"}
    assert stale() == {"plan"}


def test_check_catches_what_fits_neither_the_backbone_nor_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    params = settings()
    params["diagnose"]["blocks"] = 9
    del params["split"]
    params["regimes"] |= {
        "deep": {"kind": "lora_last_k", "k": 3},
        "wide": {"kind": "lora", "rank": 65},
    }
    params["study"]["regimes"] += ["deep", "wide"]
    params["backbones"]["short"] = params["backbones"]["t"] | {"blocks": [1, 2]}
    params["study"]["backbones"].append("short")
    make_study(tmp_path, params, ingested=False)
    result = CliRunner().invoke(main, ["check"])
    assert result.exit_code == 2
    assert "params.yaml: section 'split' is missing, which dvc.yaml needs;" in result.output
    assert "data/a: found 8 slices in train, val and test; expected at least 9" in result.output
    assert "regimes.deep.k: found 3; expected at most 2" in result.output
    assert result.output.count("regimes.wide.rank: found 65; expected at most 64") == 2


def test_one_dataset_of_few_slices_is_enough_for_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diagnosis compares datasets, so of one it has nothing to measure and asks for no slices."""
    monkeypatch.chdir(tmp_path)
    params = settings()
    params["study"] |= {"datasets": ["a"], "train_sets": ["a"]}
    params["diagnose"]["blocks"] = 9
    study = make_study(tmp_path, params)
    result = CliRunner().invoke(main, ["check"])
    assert result.exit_code == 0, result.output
    assert json.loads(diagnose(study, "t", "frozen").read_text())["pairs"] == []
