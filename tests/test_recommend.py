"""What is recommended follows from the summary, every IoU has its interval, and a summary that does not fit is refused."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from emadapt.errors import InputError
from emadapt.report import report
from emadapt.report.recommend import WIDTH, recommend
from emadapt.study.regimes import regime_settings
from fakes import a_study, few_study, write_metrics

STUDY = few_study((0, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("recommend")
    write_metrics(root, STUDY)
    (root / "params.yaml").write_text("a: 1\n")
    return json.loads(report.build_report(root, STUDY).read_text())


@pytest.fixture
def summary(made: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(made)


def said(root: Path, summary: Any, *datasets: str) -> str:
    """What is recommended, in one line."""
    (root / "reports").mkdir(exist_ok=True)
    (root / "reports/summary.json").write_text(json.dumps(summary))
    (root / "params.yaml").write_text("a: 1\n")
    lines = recommend(root, STUDY, datasets or STUDY.datasets)
    assert all(len(line) <= WIDTH for line in lines)
    assert len(lines) <= 30
    return " ".join(" ".join(lines).split())


def against_best(summary: dict[str, Any], regime: str, ci95: list[float]) -> None:
    for comparison in summary["against_best"]:
        if comparison["regime"] == regime:
            comparison["ci95"] = ci95


def test_every_iou_has_its_interval(tmp_path: Path, summary: dict[str, Any]) -> None:
    text = said(tmp_path, summary)
    number = r"[-+]?\d\.\d{3}"
    loose = re.sub(rf"{number} \({number} to {number}\)", "", text)
    assert re.findall(number, text)
    assert re.findall(number, loose) == []


def test_the_best_with_what_it_takes(tmp_path: Path, summary: dict[str, Any]) -> None:
    text = said(tmp_path, summary, "lucchi")
    best = max(
        (e for e in summary["units"] if e["test_set"] == "lucchi"), key=lambda e: e["iou"]["mean"]
    )
    low, high = best["iou"]["ci95"]
    assert "lucchi, 32 test slices" in text
    assert (
        f"Best: dinov2_s, regime lora, head pyramid, trained on {best['train_set']} (48 slices): IoU 0.855"
        in text
    )
    assert f"({low:.3f} to {high:.3f}), 100 s, 0.9 GB" in text
    assert "vnc, 12 test slices" not in text


@pytest.mark.parametrize(
    ("ridge", "frozen", "words"),
    [
        (
            [-0.08, -0.02],
            [-0.08, -0.02],
            "the best is also the cheapest that is not significantly worse",
        ),
        (
            [-0.08, 0.02],
            [-0.08, 0.02],
            "No GPU, or little time: dinov2_s, regime ridge, trained on lucchi (48 slices)",
        ),
        (
            [-0.08, -0.02],
            [-0.08, 0.02],
            "the best is also the cheapest that is not significantly worse",
        ),
    ],
)
def test_the_cheapest_that_is_not_significantly_worse(
    tmp_path: Path, summary: dict[str, Any], ridge: list[float], frozen: list[float], words: str
) -> None:
    against_best(summary, "ridge", ridge)
    against_best(summary, "frozen", frozen)
    text = said(tmp_path, summary, "lucchi")
    assert words in text
    if ridge[1] > 0:
        assert "not significantly worse, though it may be by up to 0.08" in text
        assert "Baselines against the best: ridge does as well" in text
    else:
        assert "Baselines against the best: ridge is worse" in text


def test_a_baseline_that_is_the_best(tmp_path: Path, summary: dict[str, Any]) -> None:
    swap = {"ridge": "lora", "lora": "ridge"}
    for entry in [
        *summary["units"],
        *summary["against_best"],
        *(c["against"] for c in summary["against_best"]),
    ]:
        entry["regime"] = swap.get(entry["regime"], entry["regime"])
    assert "A baseline: no adaptation does better here." in said(tmp_path, summary)


def test_labels(tmp_path: Path, summary: dict[str, Any]) -> None:
    text = said(tmp_path, summary)
    assert re.search(
        r"Labels: dinov2_s lora reaches 90 % of the 0\.855 \(.*?\) of all 48 with 16 slices: 0\.773 \(",
        text,
    )
    assert re.search(
        r"Labels: dinov2_s lora needs more than 4 slices for 90 % of the 0\.855 \(.*?\) of all 12: 4 give",
        text,
    )
    assert "leave out the validation slices" in text
    del summary["few_shot"]
    text = said(tmp_path, summary)
    assert (
        "how many are enough was not measured; add training sets such as vnc_4: {datasets: [vnc], slices: 4}"
        in text
    )
    assert "Curves of few labels were not run for lucchi and vnc." in text


def test_one_model_for_both(tmp_path: Path, summary: dict[str, Any]) -> None:
    assert "dinov2_s lora trained on paired: on lucchi IoU 0.855" in said(tmp_path, summary)
    assert "no loss was found, within these intervals" in said(tmp_path, summary)
    for union in summary["unions"]:
        union["ci95"] = [-0.2, -0.1] if union["test_set"] == "vnc" else [-0.1, 0.1]
    assert "So it costs IoU on vnc." in said(tmp_path, summary)
    summary["unions"] = []
    assert "One model for several datasets: not measured" in said(tmp_path, summary)


def test_what_is_not_known_follows_from_facts(tmp_path: Path, summary: dict[str, Any]) -> None:
    text = said(tmp_path, summary)
    kinds = (
        "lucchi is the only one with near-isotropic voxels",
        "vnc is the only one with thick sections",
    )
    for words in (
        *kinds,
        "6 models for lucchi, 6 models for vnc",
        "Not tried: backbones dinov2_b,",
        "regimes lora_last_k",
    ):
        assert words in text
    assert "One seed" not in text
    assert "params.yaml has changed" not in text
    assert "tiny" not in text
    summary["params_sha256"] = "another"
    for entry in summary["units"]:
        if entry["test_set"] == "vnc":
            entry["n"], entry["iou"]["ci95"] = 4, [0.3, 0.9]
    text = said(tmp_path, summary)
    assert "params.yaml has changed since" in text
    assert "vnc has 4 test slices and an interval 0.60 wide" in text


def test_a_summary_that_does_not_fit(tmp_path: Path, summary: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"summary.json: found no file; .*`emadapt report`"):
        recommend(tmp_path, STUDY, STUDY.datasets)
    for change, words in (
        ({"study": "another"}, "found that of study another; .*`emadapt use another`"),
        (
            {"units": summary["units"][1:]},
            "found other units than params.yaml has .*is in params.yaml alone",
        ),
        (
            {"units": [*summary["units"], {**summary["units"][0], "regime": "dora"}]},
            "dora.* is in the summary alone",
        ),
        ({"units": None}, "found no summary"),
    ):
        with pytest.raises(InputError, match=words):
            said(tmp_path, {**summary, **change})
    with pytest.raises(InputError, match="found no against_best: an older report wrote it"):
        said(tmp_path, {key: value for key, value in summary.items() if key != "against_best"})
    with pytest.raises(InputError, match="found no summary"):
        said(tmp_path, [])
    (tmp_path / "reports/summary.json").write_text("{")
    with pytest.raises(InputError, match="found no JSON"):
        recommend(tmp_path, STUDY, STUDY.datasets)


def test_one_seed_and_no_baseline(tmp_path: Path) -> None:
    study = a_study((0,))
    write_metrics(tmp_path, study)
    report.build_report(tmp_path, study)
    text = " ".join(" ".join(recommend(tmp_path, study, study.datasets)).split())
    assert "One seed: chance in training is in no interval." in text
    assert "Baselines (ridge, knn, unet2d, resunet3d, mitonet, sam2) were not run" in text


@pytest.mark.parametrize("deep", ["lora", "frozen"])
def test_a_baseline_in_3d_is_called_what_it_is(
    tmp_path: Path, summary: dict[str, Any], deep: str
) -> None:
    """It has no backbone, and what is labelled of it with `crops` are patches."""
    study = dataclasses.replace(
        STUDY, regime_settings={**STUDY.regime_settings, deep: regime_settings(kind="resunet3d")}
    )
    for curve in summary["few_shot"]:
        curve["amount"] = "crops"
    for entry in summary["units"]:
        entry["labelled"]["crops"][0] = 8
    said(tmp_path, summary)
    text = " ".join(" ".join(recommend(tmp_path, study, study.datasets)).split())
    named = f"{deep} (a 3D U-Net from scratch)"
    assert f"dinov2_s {deep}" not in text
    assert f"dinov2_s, regime {deep}" not in text
    if deep == "lora":  # the best
        assert re.search(
            rf"Best: regime {re.escape(named)}, trained on \w+ \(8 of \d+ patches\)", text
        )
        assert "A baseline: no adaptation does better here." in text
        assert re.search(rf"Labels: {re.escape(named)} reaches 90 % .* with 16 patches:", text)
        assert f"One model for several datasets: {named} trained on paired" in text
    else:
        assert re.search(
            rf"Baselines against the best: .*{re.escape(named)} (is worse|does as well)", text
        )
