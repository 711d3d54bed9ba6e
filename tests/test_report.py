"""The report: contrasts change one thing, numbers are those of the metrics, files are stable."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emadapt.errors import InputError
from emadapt.report.contrasts import FACTORS, contrasts
from emadapt.report.domain import pair_rows, read_cards
from emadapt.report.labels import curves
from emadapt.report.report import build_report
from emadapt.report.units import RELATIONS, entries, ranked, read_units, relation
from emadapt.study.study import Unit
from fakes import (
    BACKBONES,
    DATASETS,
    FEW,
    REGIMES,
    TRAIN_SETS,
    WITH_RIDGE,
    a_card,
    a_study,
    iou_of,
    write_domain,
    write_metrics,
    write_models,
)

ALIGNED = {**BACKBONES["dinov2_s"], "align": "histogram", "reference": "lucchi"}
RICH = a_study(
    seeds=(0, 1),
    regimes={
        **REGIMES,
        "lora_warm": {"kind": "lora", "warm_start": "lora-lucchi"},
        "lora_adversarial": {"kind": "lora", "self_training": 1.0},
    },
    train_sets={
        **TRAIN_SETS,
        "vnc_4": FEW["vnc_4"],
        "new": {"datasets": ("lucchi", "vnc"), "slices": {"vnc": 4}},
    },
    backbones={
        **BACKBONES,
        "dinov2_b": {"arch": "dinov2_b", "source": "hub"},
        "histogram": ALIGNED,
    },
)
MAY_DIFFER = {
    "backbone": {"backbone"},
    "regime": {"regime"},
    "union": {"train_set.datasets", "train_set.slices"},
    "warm_start": {"regime.warm_start"},
    "alignment": {"backbone.align", "backbone.reference", "regime.self_training"},
    "labels": {"train_set.slices"},
}
"""What the two models of a contrast may differ in: whole settings, or some of their fields."""


def spread(root: Path) -> None:
    """Gives every model its own counts, since models of equal predictions are not compared."""
    for at, file in enumerate(sorted((root / "build/evaluate").glob("*/metrics.json"))):
        metrics = json.loads(file.read_text())
        for scores in metrics["test"].values():
            scores["counts"][0][0][0][0] -= at
        file.write_text(json.dumps(metrics))


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    root = tmp_path_factory.mktemp("rich")
    write_metrics(root, RICH)
    spread(root)
    return root, read_units(root, RICH)


def differing(model: dict[str, str], against: dict[str, str]) -> set[str]:
    """Fields of settings in which two models differ."""
    maps: dict[str, Any] = {
        "backbone": RICH.backbone_settings,
        "regime": RICH.regime_settings,
        "train_set": RICH.train_set_settings,
    }
    found = set()
    for part, settings in maps.items():
        one, other = (settings[name[part]].model_dump() for name in (model, against))
        fields = set(one) | set(other)
        found |= {f"{part}.{f}" for f in fields if one.get(f) != other.get(f)}
    return found


@pytest.mark.parametrize("factor", FACTORS)
def test_models_of_a_contrast_differ_in_one_thing(rich, factor):
    _, rows = rich
    found = contrasts(rows, factor)
    assert found
    for row in found:
        names = differing(row["model"], row["against"])
        assert names
        assert names <= MAY_DIFFER[factor] or {n.split(".")[0] for n in names} == MAY_DIFFER[factor]
        if factor == "union":  # the same labels of the test dataset
            one, other = (
                RICH.train_set_settings[row[who]["train_set"]] for who in ("model", "against")
            )
            assert other.datasets == (row["test_set"],)
            assert one.slices_of(row["test_set"]) == other.slices_of(row["test_set"])


def test_a_contrast_is_that_of_the_counts(rich):
    root, rows = rich

    def iou(names: dict[str, str], test_set: str) -> float:
        values = []
        for seed in RICH.seeds:
            unit = Unit(names["backbone"], names["regime"], names["train_set"], seed).name
            text = (root / "build/evaluate" / unit / "metrics.json").read_text()
            counts = json.loads(text)["test"][test_set]["counts"]
            both, one, other = np.sum(counts, axis=(0, 1, 2))
            values.append(both / (one + other - both))
        return float(np.mean(values))

    for row in contrasts(rows, "regime"):
        a, b = (iou(row[who], row["test_set"]) for who in ("model", "against"))
        assert row["iou"] == pytest.approx(a, abs=1e-6)
        assert row["against_iou"] == pytest.approx(b, abs=1e-6)
        assert row["difference"] == pytest.approx(a - b, abs=1e-6)
        assert row["ci95"][0] <= row["at_least"] <= row["difference"] <= row["ci95"][1]
        assert row["p"] <= row["p_holm"] <= 1


def test_models_that_saw_other_labels_of_the_test_set_are_not_compared(rich):
    _, rows = rich
    warm = [row for row in contrasts(rows, "warm_start") if row["test_set"] == "lucchi"]
    # All others start from a model that saw labels of Lucchi which they lack.
    assert {row["model"]["train_set"] for row in warm} == {"lucchi", "paired", "new"}
    regimes = [row for row in contrasts(rows, "regime") if row["test_set"] == "lucchi"]
    assert {
        row["model"]["train_set"] for row in regimes if row["model"]["regime"] == "lora_warm"
    } == {"lucchi", "paired", "new"}


def test_equal_predictions_and_single_levels_make_no_contrast(tmp_path):
    study = a_study(regimes=WITH_RIDGE)  # in the fakes ridge predicts what frozen does
    write_metrics(tmp_path, study)
    rows = read_units(tmp_path, study)
    assert {row["level"] for row in contrasts(rows, "regime")} == {"lora"}
    for factor in ("backbone", "warm_start", "alignment", "labels"):
        assert contrasts(rows, factor) == []


def test_slices_of_the_whole_dataset_count_where_neither_has_seen_it(tmp_path, plain_pictures):
    study = a_study((0, 1, 2))
    write_metrics(tmp_path, study)
    for unit in study.units():
        file = tmp_path / "build/evaluate" / unit.name / "metrics.json"
        metrics = json.loads(file.read_text())
        for name in set(study.datasets) - set(study.train_set_settings[unit.train_set].datasets):
            both = 500 + 100 * (unit.regime == "lora") + unit.seed
            whole = {"n": 24, "counts": [[[[both, both, 1000]] * 2] * 2] * 24}
            metrics["test"][name]["unseen"] = {**whole, "iou": both / 1000, "iou_ci95": [0.1, 0.9]}
        file.write_text(json.dumps(metrics))
    summary = json.loads(build_report(tmp_path, study).read_text())
    regimes = [row for row in summary["contrasts"] if row["factor"] == "regime"]
    for row in regimes:
        crossing = row["relation"] == "cross-domain"
        assert (row["slices"], row["n"] == 24) == (("all", True) if crossing else ("test", False))
        if crossing:
            assert row["difference"] == pytest.approx(0.1)
    units = {(u["regime"], u["train_set"], u["test_set"]): u for u in summary["units"]}
    assert units["lora", "lucchi", "vnc"]["unseen"]["iou"]["values"] == [0.6, 0.601, 0.602]
    assert "unseen" not in units["lora", "paired", "vnc"]
    assert "0.601 (" in (tmp_path / "reports/leaderboard.md").read_text()


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    root, study = tmp_path_factory.mktemp("reported"), a_study()
    write_metrics(root, study)
    write_domain(root, study)
    (root / "params.yaml").write_text("a: 1\n")
    assert build_report(root, study) == root / "reports/summary.json"
    return root


def test_summary(reported):
    summary = json.loads((reported / "reports/summary.json").read_text())
    fixed = ["study", "git", "data_md5", "params_sha256", "units", "contrasts"]
    assert list(summary) == fixed
    assert len(summary["params_sha256"]) == 64
    keys = [tuple(u[n] for n in ("regime", "train_set", "test_set")) for u in summary["units"]]
    assert len(set(keys)) == len(keys) == 2 * 3 * 2
    entry = summary["units"][keys.index(("lora", "paired", "vnc"))]
    assert (entry["n"], entry["trainable_params"]) == (12, 442368)
    assert (entry["seconds"], entry["peak_mb"]) == (100.5, 901)
    assert entry["iou"]["values"] == [0.84, 0.85]
    assert list(entry["iou"]) == ["mean", "std", "values", "ci95"]
    assert entry["instances"]["pq"] == {"mean": 0.4, "values": [0.4, 0.4]}
    best = [row for row in summary["contrasts"] if row["factor"] == "best"]
    assert {row["against"]["regime"] for row in best} == {"lora"}
    assert all(row["difference"] <= 0 for row in best)


def content(root: Path) -> dict[str, bytes]:
    folder = root / "reports"
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_only_files_outside_git_change_with_the_time_that_training_took(reported):
    before = content(reported)
    figures = {f"figures/{name}" for name in ("iou.png", "regime.png", "overlays-vnc.jpg")}
    assert {"leaderboard.md", "index.html", *figures} < set(before)
    build_report(reported, a_study())
    assert content(reported) == before
    for file in (reported / "scratch/costs").iterdir():
        file.write_text(json.dumps({"seconds": 7.0, "peak_mb": 7}))
    build_report(reported, a_study())
    after = content(reported)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"summary.json", "index.html"}


def test_figures_of_an_earlier_report_go_and_those_of_others_stay(tmp_path, plain_pictures):
    study = a_study(seeds=(0,), regimes={"frozen": {"kind": "frozen"}})
    write_metrics(tmp_path, study)
    folder = tmp_path / "reports/figures"
    folder.mkdir(parents=True)
    for name in ("regime.png", "curves.png", "mine.png"):
        (folder / name).write_bytes(b"old")
    build_report(tmp_path, study)
    left = {file.name for file in folder.iterdir()}
    assert {"mine.png", "iou.png"} < left
    assert not {"regime.png", "curves.png"} & left


WRONG: list[Any] = [
    "{",
    {"unit": "another"},
    {"test": {"lucchi": {}}},
    {"made_from": {"dataset lucchi": "e" * 32}},  # seed 0 has seen other data
    {"key": "another"},  # the model was trained again
]
"""Instead of the metrics of a unit, or of some of them."""


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_metrics_that_do_not_fit_the_study_are_refused(tmp_path, wrong):
    study = a_study()
    with pytest.raises(InputError, match="dvc repro evaluate@dinov2_s-frozen-lucchi-0"):
        build_report(tmp_path, study)
    write_metrics(tmp_path, study)
    write_models(tmp_path, study)
    read_units(tmp_path, study)
    file = tmp_path / "build/evaluate/dinov2_s-lora-vnc-1/metrics.json"
    good = json.loads(file.read_text())
    file.write_text(wrong if isinstance(wrong, str) else json.dumps(good | wrong))
    with pytest.raises(InputError, match="dinov2_s-lora-vnc-1"):
        build_report(tmp_path, study)
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize("wrong", ["{", "[]", '{"study": "another"}'])
def test_diagnostics_that_do_not_fit_the_study_are_refused(tmp_path, wrong):
    study = a_study(seeds=(0,))
    write_domain(tmp_path, study)
    (tmp_path / "reports/domain/dinov2_s-lora.json").write_text(wrong)
    with pytest.raises(InputError, match="delete the file"):
        read_cards(tmp_path, study)


def test_how_a_model_relates_to_its_test_set():
    datasets = {**DATASETS, "twin": {**DATASETS["lucchi"], "path": "data/lucchi"}}
    sets = {**TRAIN_SETS, "twin": {"datasets": ("twin",)}}
    regimes = {
        **REGIMES,
        "warm": {"kind": "lora", "warm_start": "lora-vnc"},
        "given": {"kind": "sam2", "weights": "w"},
        "prompted": {"kind": "sam2", "weights": "w", "prompts": "box"},
    }
    study = a_study((0,), regimes, sets, datasets=datasets)
    expected = {
        ("lora", "lucchi", "lucchi"): "in-domain",
        ("lora", "paired", "lucchi"): "union",
        ("lora", "lucchi", "vnc"): "cross-domain",
        ("lora", "twin", "lucchi"): "other labels",
        ("warm", "lucchi", "vnc"): "warm start",
        ("given", "lucchi", "lucchi"): "zero-shot",
        ("prompted", "lucchi", "vnc"): "label prompts",
    }
    for (regime, train_set, test_set), words in expected.items():
        assert relation(study, Unit("dinov2_s", regime, train_set, 0), test_set) == words
    assert set(expected.values()) == set(RELATIONS)


def test_curves_of_few_labels(tmp_path):
    study = a_study((0,), WITH_RIDGE, {**FEW, **TRAIN_SETS})
    write_metrics(tmp_path, study)
    rows = read_units(tmp_path, study)
    good = {"factor": "labels", "test_set": "lucchi", "as_good": True}

    def with_good(*numbers: int) -> list[dict[str, Any]]:
        lora = {"backbone": "dinov2_s", "regime": "lora"}
        models = [{**lora, "train_set": f"lucchi_{n}"} for n in numbers]
        return curves(entries(rows), [{**good, "model": model} for model in models])

    found = with_good(16, 4)
    assert len(found) == 2 * 3
    lora = next(c for c in found if (c["test_set"], c["regime"]) == ("lucchi", "lora"))
    assert [(p["n"], p["all"]) for p in lora["points"]] == [
        (1, False),
        (4, False),
        (16, False),
        (48, True),
    ]
    units = [Unit("dinov2_s", "lora", name, 0) for name in [*[*FEW][:3], "lucchi"]]
    wanted = [iou_of(study, unit, "lucchi") for unit in units]
    assert [p["score"] for p in lora["points"]] == pytest.approx(wanted, abs=1e-6)
    assert lora["enough"] == 4
    assert {c["enough"] for c in found if c is not lora} == {None}
    assert {c["enough"] for c in with_good(4, 1)} == {None}, "16 slices are not enough"


def test_systems_prompted_with_labels_are_last():
    prompted, best, other = (
        {"relation": relation, "iou": {"mean": mean}}
        for relation, mean in (("label prompts", 0.99), ("union", 0.8), ("in-domain", 0.7))
    )
    assert ranked([prompted, other, best]) == [best, other, prompted]


def test_distances_are_means_over_seeds_in_units_of_the_variance(tmp_path):
    (pretrained, _) = pair_rows(a_card(a_study(seeds=(0, 1)), "frozen")["pairs"])
    assert pretrained["frechet"] == pytest.approx(0.41)
    assert pretrained["null"] == pytest.approx(0.1)
    assert pretrained["ratio"] == pytest.approx(4.1)
    assert pretrained["ci95"] == pytest.approx((0.8 * 0.41, 1.2 * 0.41))


def test_the_report_runs_without_torch_and_mlflow(tmp_path):
    study = a_study(seeds=(0,))
    write_metrics(tmp_path, study)
    code = (
        "import sys; from pathlib import Path; from fakes import a_study;"
        "from emadapt.report import recommend, report; study = a_study((0,));"
        "report.build_report(Path(sys.argv[1]), study);"
        "recommend.recommend(Path(sys.argv[1]), study, study.tested);"
        "assert not {'torch', 'mlflow', 'optuna'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parent, check=True
    )
