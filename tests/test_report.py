"""The report: what it computes over seeds, what it refuses, and figures that keep their colours and stay small."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from emadapt.errors import InputError
from emadapt.report import comparisons, figures, report
from emadapt.report.comparisons import kind_of
from emadapt.report.unions import unions
from emadapt.study.datasets import DatasetSettings, TrainSetSettings
from emadapt.study.regimes import regime_settings
from fakes import DATASETS, SPECS, a_study, write_domain, write_metrics, write_objects


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    root, study = tmp_path_factory.mktemp("reported"), a_study()
    write_metrics(root, study)
    (root / "params.yaml").write_text("a: 1\n")
    assert report.build_report(root, study) == root / "reports/summary.json"
    return root


def test_summary(reported):
    summary = json.loads((reported / "reports/summary.json").read_text())
    fixed = [
        "study",
        "git",
        "data_md5",
        "params_sha256",
        "ci95_method",
        "units",
        "comparisons_method",
        "comparisons",
        "against_best",
        "unions",
    ]
    assert list(summary) == fixed
    assert summary["study"] == "demo"
    assert len(summary["params_sha256"]) == 64
    keys = [(e["backbone"], e["regime"], e["train_set"], e["test_set"]) for e in summary["units"]]
    assert len(set(keys)) == len(keys) == 2 * 3 * 2
    entry = summary["units"][keys.index(("dinov2_s", "lora", "paired", "vnc"))]
    assert (entry["n"], entry["trainable_params"], entry["seconds"], entry["peak_mb"]) == (
        12,
        442368,
        100.5,
        901,
    )
    assert entry["iou"]["values"] == [0.85, 0.86]  # over seeds, rounded to 6 digits
    assert entry["iou"]["mean"] == 0.855
    assert entry["iou"]["std"] == pytest.approx(0.01 / 2**0.5, abs=1e-6)
    for name in ("iou", "dice", "boundary_iou"):
        assert list(entry[name]) == ["mean", "std", "values", "ci95"]
        low, high = entry[name]["ci95"]
        assert 0 <= low <= entry[name]["mean"] - 0.02
        assert entry[name]["mean"] + 0.01 <= high <= 1


def test_leaderboard(reported):
    text = (reported / "reports/leaderboard.md").read_text()
    text, together = text.split("## Together or alone")
    lucchi, vnc = text.split("## Test dataset")[1:]
    assert lucchi.startswith(" `lucchi` (32 slices)")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in vnc.splitlines()
        if line.startswith("| ")
    ][1:]
    assert {len(row) for row in rows} == {12}
    ranks = [(row[2], row[3], row[4]) for row in rows]
    assert set(ranks[:2]) == {("lora", "vnc", "in-domain"), ("lora", "paired", "union")}
    assert set(ranks[2:4]) == {("frozen", "vnc", "in-domain"), ("frozen", "paired", "union")}
    assert ranks[4:] == [("lora", "lucchi", "cross-domain"), ("frozen", "lucchi", "cross-domain")]
    assert rows[0][5] == "**0.855** ± 0.007"
    assert rows[0][9:] == ["2", "442,368", "100 s"]
    assert (
        sum(
            line.startswith(("| lucchi | paired | lucchi |", "| vnc | paired | vnc |"))
            for line in together.splitlines()
        )
        == 4
    )


def test_images_under_other_labels_are_no_other_domain():
    study = a_study()
    twin = DatasetSettings(
        layout="lucchi", voxel_nm=(5.0, 5.0, 5.0), path="data/lucchi", pairing="lexicographic"
    )
    sets = {
        **SPECS,
        "twin": TrainSetSettings(datasets=("twin",)),
        "both": TrainSetSettings(datasets=("twin", "vnc")),
    }
    study = dataclasses.replace(
        study, dataset_settings={**DATASETS, "twin": twin}, train_set_settings=sets
    )
    kinds = {
        (own, test): kind_of(study, "frozen", own, test)
        for own in sets
        for test in ("lucchi", "twin", "vnc")
    }
    for pair in (("twin", "lucchi"), ("lucchi", "twin"), ("both", "lucchi"), ("paired", "twin")):
        assert kinds[pair] == "other labels"
    assert kinds["twin", "twin"] == kinds["lucchi", "lucchi"] == "in-domain"
    assert kinds["both", "twin"] == kinds["both", "vnc"] == "union"
    assert kinds["twin", "vnc"] == kinds["vnc", "twin"] == kinds["vnc", "lucchi"] == "cross-domain"
    began = dataclasses.replace(
        study,
        regime_settings=study.regime_settings
        | {"began": regime_settings(kind="lora", warm_start="lora-vnc")},
    )
    assert kind_of(began, "began", "lucchi", "vnc") == "seen at the start"
    assert kind_of(began, "began", "lucchi", "lucchi") == "in-domain"
    assert set(kinds.values()) | {"zero-shot", "oracle prompts", "seen at the start"} == set(
        figures.KINDS
    )


def test_every_regime_against_the_first(reported):
    compared = json.loads((reported / "reports/summary.json").read_text())["comparisons"]
    assert len(compared) == 3 * 2
    for entry in compared:
        assert (entry["backbone"], entry["regime"], entry["against"], entry["seeds"]) == (
            "dinov2_s",
            "lora",
            "frozen",
            [2, 2],
        )
        assert (entry["n"], entry["block_slices"]) == {"lucchi": (32, 4), "vnc": (12, 1)}[
            entry["test_set"]
        ]
        assert entry["difference"] == pytest.approx(
            0.05, abs=0.01
        )  # what fakes.iou_of adds for lora
        assert entry["ci95"][0] < entry["difference"] < entry["ci95"][1]
        assert entry["p_value"] <= entry["p_holm"] <= min(1, 6 * entry["p_value"] + 1e-6)
    assert min(e["p_holm"] for e in compared) == pytest.approx(
        6 * min(e["p_value"] for e in compared), abs=1e-5
    )


def test_every_model_against_the_best_and_unions_against_single_datasets(reported):
    summary = json.loads((reported / "reports/summary.json").read_text())
    iou = {
        (e["backbone"], e["regime"], e["train_set"], e["test_set"]): e["iou"]["mean"]
        for e in summary["units"]
    }
    assert (
        len(summary["against_best"]) == 2 * 3
    )  # of four models that were trained on a dataset, all but the best
    for entry in summary["against_best"]:
        best = (*entry["against"].values(), entry["test_set"])
        own = (entry["backbone"], entry["regime"], entry["train_set"], entry["test_set"])
        trained = [
            value for key, value in iou.items() if key[3] == entry["test_set"] and value > 0.7
        ]
        assert iou[best] == max(trained) >= iou[own]
        assert entry["difference"] == pytest.approx(
            iou[own] - iou[best], abs=0.01
        )  # counts give IoU to about that
        assert entry["ci95"][0] <= entry["difference"] <= entry["ci95"][1]
    assert {
        (e["regime"], e["train_set"], e["against"], e["test_set"]) for e in summary["unions"]
    } == {
        (regime, "paired", single, single)
        for regime in ("frozen", "lora")
        for single in ("lucchi", "vnc")
    }
    assert not any(e["few"] for e in summary["unions"])


def test_systems_that_were_not_trained_are_no_model_for_several_datasets() -> None:
    study, kinds = (
        a_study(),
        {
            "frozen": regime_settings(kind="frozen"),
            "given": regime_settings(kind="mitonet", weights="w"),
        },
    )
    study = dataclasses.replace(study, regimes=tuple(kinds), regime_settings=kinds)
    test = {name: {"counts": [[5, 6, 7]] * 4, "block_slices": 1} for name in study.datasets}
    groups = {("dinov2_s", regime, name): [{"test": test}] for regime in kinds for name in SPECS}
    assert {row["regime"] for row in unions(study, groups)} == {"frozen"}


def test_a_few_labels_beside_another_dataset_meet_the_same_few_alone(tmp_path: Path) -> None:
    """`slices: {vnc: 2}` beside all of Lucchi: on VNC against two slices of VNC, on Lucchi against all of Lucchi."""
    sets = {
        **SPECS,
        "vnc_2": TrainSetSettings(datasets=("vnc",), slices=2),
        "vnc_4": TrainSetSettings(datasets=("vnc",), slices=4),
        "new": TrainSetSettings(datasets=("lucchi", "vnc"), slices={"vnc": 2}),
    }
    study = dataclasses.replace(a_study(), train_set_settings=sets, train_sets=tuple(sets))
    write_metrics(tmp_path, study)
    report.build_report(tmp_path, study)
    summary = json.loads((tmp_path / "reports/summary.json").read_text())
    few = {(e["regime"], e["against"], e["test_set"]) for e in summary["unions"] if e["few"]}
    assert few == {
        (r, against, test)
        for r in ("frozen", "lora")
        for against, test in (("vnc_2", "vnc"), ("lucchi", "lucchi"))
    }
    panels = {tuple(curve["datasets"]) for curve in summary["few_shot"]}
    assert panels == {("vnc",)}  # no curve has a place for few of one dataset and all of another
    page = (tmp_path / "reports/index.html").read_text()
    assert 'id="unions"' in page
    assert page.count("<td>new</td><td>vnc_2</td>") == 2


def test_a_difference_turned_round(reported):
    study = a_study()
    groups: dict[tuple[str, str, str], list[Any]] = {
        (u.backbone, u.regime, u.train_set): [] for u in study.units()
    }
    for unit in study.units():
        metrics = json.loads((reported / "build/evaluate" / unit.name / "metrics.json").read_text())
        groups[unit.backbone, unit.regime, unit.train_set].append(metrics)
    keys = ("dinov2_s", "lora", "vnc"), ("dinov2_s", "frozen", "lucchi")
    there, back = (comparisons.difference(groups, *pair, "vnc") for pair in (keys, keys[::-1]))
    assert there["difference"] == -back["difference"] > 0
    assert there["ci95"] == pytest.approx([-end for end in back["ci95"][::-1]], abs=0.01)
    assert comparisons.difference(groups, keys[0], keys[0], "vnc")["difference"] == 0


def test_one_regime_has_nothing_to_compare(tmp_path):
    study = a_study(seeds=(0,), regimes=("frozen",))
    write_metrics(tmp_path, study)
    assert json.loads(report.build_report(tmp_path, study).read_text())["comparisons"] == []


def test_metrics_of_an_older_evaluate(tmp_path):
    study = a_study(seeds=(0,))
    write_metrics(tmp_path, study)
    file = tmp_path / "build/evaluate/dinov2_s-lora-vnc-0/metrics.json"
    metrics = json.loads(file.read_text())
    del metrics["test"]["vnc"]["counts"]
    file.write_text(json.dumps(metrics))
    with pytest.raises(InputError, match=r"`emadapt evaluate dinov2_s-lora-vnc-0`"):
        report.build_report(tmp_path, study)
    assert not (tmp_path / "reports").exists()


def test_again_gives_the_same_bytes(reported):
    def content():
        return {
            file: file.read_bytes() for file in (reported / "reports").rglob("*") if file.is_file()
        }

    before = content()
    assert {file.name for file in before} == {
        "summary.json",
        "leaderboard.md",
        "index.html",
        "domain-vs-iou.json",
        "iou.png",
        "overlays-lucchi.png",
        "overlays-vnc.png",
    }
    report.build_report(reported, a_study())
    assert content() == before


def test_missing_and_wrong_metrics(tmp_path):
    study = a_study(seeds=(0,))
    with pytest.raises(InputError, match=r"dvc repro evaluate@dinov2_s-frozen-lucchi-0"):
        report.build_report(tmp_path, study)
    write_metrics(tmp_path, study)
    file = tmp_path / "build/evaluate/dinov2_s-lora-vnc-0/metrics.json"
    good = json.loads(file.read_text())
    for wrong in (
        '{"unit": ',
        "{}",
        json.dumps({**good, "unit": "another"}),
        json.dumps({**good, "test": {"lucchi": {}}}),
    ):
        file.write_text(wrong)
        with pytest.raises(InputError, match=r"dvc repro evaluate@dinov2_s-lora-vnc-0") as error:
            report.build_report(tmp_path, study)
        assert str(file) in str(error.value)
    assert not (tmp_path / "reports").exists()


def test_the_scatter_comes_and_goes_with_diagnose(tmp_path):
    study = a_study(seeds=(0,))
    write_metrics(tmp_path, study)
    write_domain(tmp_path, study)
    report.build_report(tmp_path, study)
    scatter = tmp_path / "reports/figures/domain-vs-iou.png"
    with Image.open(scatter) as picture:
        assert picture.width > 600
    for file in (tmp_path / "reports/domain").glob("*.json"):
        file.unlink()
    report.build_report(tmp_path, study)
    assert not scatter.exists()


def test_overlays_that_are_not_there_are_no_error(tmp_path):
    study = a_study(seeds=(0,))
    write_metrics(tmp_path, study)
    for file in tmp_path.rglob("overlay-vnc*.png"):
        file.unlink()
    report.build_report(tmp_path, study)
    assert {file.name for file in (tmp_path / "reports/figures").iterdir()} == {
        "iou.png",
        "overlays-lucchi.png",
    }


def test_interval_of_one_seed_is_the_bootstrap():
    assert report.combine([0.5], [(0.4, 0.7)]) == {
        "mean": 0.5,
        "std": 0.0,
        "values": [0.5],
        "ci95": [0.4, 0.7],
    }
    assert report.combine([0.5, 0.5], [(0.4, 0.7), (0.4, 0.7)])["ci95"] == [0.4, 0.7]
    assert report.combine([0.1, 0.99], [(0.0, 0.2), (0.9, 1.0)])["ci95"] == [0, 1]


@pytest.mark.parametrize(("of_slices", "of_seeds"), [(0.02, 0.005), (0.01, 0.01), (0.003, 0.02)])
def test_interval_over_seeds_covers_the_truth(of_slices, of_seeds):
    """Simulated studies: every seed sees the same slices (a shared error) and adds an error of its own."""
    rng, truth, hits, studies = np.random.default_rng(0), 0.7, 0, 600
    for _ in range(studies):
        values = truth + rng.normal(0, of_slices) + rng.normal(0, of_seeds, size=5)
        low, high = report.combine(
            values, [(v - 1.96 * of_slices, v + 1.96 * of_slices) for v in values]
        )["ci95"]
        hits += low <= truth <= high
    assert 0.93 <= hits / studies <= 0.995


def pixels(path, colour):
    """How many pixels of a picture are close to a colour."""
    with Image.open(path) as picture:
        rgb = np.asarray(picture.convert("RGB")).astype(int)
    target = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return int((np.abs(rgb - target).max(axis=-1) < 40).sum())


def test_a_stack_stays_under_a_megabyte(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 1700), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    figures.stack_png(tmp_path / "stack.png", [tmp_path / "noise.png"] * 4)
    assert (tmp_path / "stack.png").stat().st_size <= figures.LIMIT
    with Image.open(tmp_path / "stack.png") as picture:
        assert picture.width / picture.height == pytest.approx(1700 / 2400, rel=0.02)


def test_objects_and_tuned_thresholds_where_evaluate_has_them(tmp_path):
    study = a_study()
    write_metrics(tmp_path, study)
    report.build_report(tmp_path, study)
    assert (
        "## Objects" not in (tmp_path / "reports/leaderboard.md").read_text()
    )  # of an earlier evaluate
    write_objects(tmp_path, study, "lora", "vnc")
    summary = json.loads(report.build_report(tmp_path, study).read_text())
    entries = [entry for entry in summary["units"] if "instances" in entry]
    assert {(entry["regime"], entry["test_set"]) for entry in entries} == {("lora", "vnc")}
    assert entries[0]["instances"]["pq"] == {"mean": 0.4, "values": [0.4, 0.4]}
    assert (entries[0]["tuned"]["thresholds"], entries[0]["tuned"]["iou"]["mean"]) == (
        [0.41, 0.42],
        0.91,
    )
    text = (tmp_path / "reports/leaderboard.md").read_text()
    (row,) = [
        line for line in text.split("## Objects")[1].splitlines() if "| lora | paired |" in line
    ]
    assert "| 0.500 | 0.250 | 0.400 | 0.800 | 0.500 | 9 / 7 | 0.41, 0.42 | 0.910 (" in row
