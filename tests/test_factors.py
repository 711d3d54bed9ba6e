"""What each factor of a crossed study does to the IoU."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import fakes
from emadapt.report.factors import cells_of, effects, factors, factors_png, factors_table
from emadapt.report.report import build_report
from emadapt.study.study import DatasetSettings, RegimeSettings, Study, TrainSetSettings
from fakes import a_study

SETS = {
    "lucchi": TrainSetSettings(("lucchi",)),
    "lex": TrainSetSettings(("lex",)),
    "vnc": TrainSetSettings(("vnc",)),
    "paired": TrainSetSettings(("lucchi", "vnc")),
    "paired_lex": TrainSetSettings(("lex", "vnc")),
    "by_size": TrainSetSettings(("lucchi", "vnc"), draw="proportional"),
    "few": TrainSetSettings(("lucchi",), slices=2),
}
SIZE = 100_000  # labelled pixels a slice, so that counts round to the IoU


def study() -> Study:
    base = a_study((0, 1, 2), ("frozen", "lora"))
    specs = base.dataset_settings | {
        "lex": DatasetSettings(
            "lucchi", (5.0, 5.0, 5.0), path="data/lucchi", pairing="lexicographic"
        )
    }
    return dataclasses.replace(
        base,
        datasets=("lucchi", "lex", "vnc"),
        dataset_settings=specs,
        train_sets=tuple(SETS),
        train_set_settings=SETS,
        regime_settings={n: RegimeSettings(n) for n in ("frozen", "lora")},
    )


def planted(regime: str, train_set: str, seed: int) -> float:
    """Effects: LoRA 0.1, several datasets -0.02, mispaired -0.4 and 0.2 less of it under LoRA, several and mispaired 0.05
    more, drawn by size 0.03; seeds 0.01."""
    several, wrong = (
        train_set in ("paired", "paired_lex", "by_size"),
        train_set in ("lex", "paired_lex"),
    )
    effect = 0.1 * (regime == "lora") - 0.02 * several + 0.03 * (train_set == "by_size")
    effect += wrong * (-0.4 + 0.2 * (regime == "lora") + 0.05 * several)
    return 0.7 + effect + 0.01 * seed


def scores(iou: float, slices: int) -> dict[str, Any]:
    counts = [
        [round(iou * SIZE), round(iou * SIZE), SIZE]
    ] * slices  # a part of the label, and nothing else
    return {"iou": iou, "counts": counts, "n": slices, "block_slices": 4}


def groups(own: Study) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    return {
        ("dinov2_s", regime, name): [
            {"seed": s, "test": {d: scores(planted(regime, name, s), 16) for d in own.datasets}}
            for s in own.seeds
        ]
        for regime in own.regimes
        for name in own.train_sets
    }


def test_planted_effects_come_back_and_leave_nothing_over(tmp_path: Path) -> None:
    own = study()
    found = factors(tmp_path, own, groups(own))
    by_test = {fit["test_set"]: {t["term"]: t for t in fit["terms"]} for fit in found["fits"]}
    want = {
        "regime lora": 0.1,
        "several datasets": -0.02,
        "mispaired, lexicographic": -0.4,
        "several datasets and mispaired, lexicographic": 0.05,
        "drawn by size": 0.03,
    }
    want |= {
        f"{name}, under lora": 0.2 * (name == "mispaired, lexicographic") for name in list(want)[1:]
    }
    assert {k: v["estimate"] for k, v in by_test["lucchi"].items()} == pytest.approx(want, abs=1e-5)
    assert all(
        t["ci95"] == pytest.approx([t["estimate"]] * 2, abs=1e-4)
        for t in by_test["lucchi"].values()
    )
    # Vnc alone has no mispaired labels, so these cannot be told from both together: one term says what the two do.
    assert by_test["vnc"]["mispaired, lexicographic"]["estimate"] == pytest.approx(-0.35, abs=1e-5)
    assert "several datasets and mispaired, lexicographic" not in by_test["vnc"]
    assert {fit["units"] for fit in found["fits"]} == {2 * 3 * 5, 2 * 3 * 4}, (
        "few labels are left out"
    )
    contrasts = {
        (c["train_set"], c["against"], c["test_set"], c["regime"]): c["difference"]
        for c in found["contrasts"]
    }
    assert contrasts["paired_lex", "paired", "lucchi", "lora"] == pytest.approx(-0.15, abs=1e-5)
    assert contrasts["paired", "vnc", "vnc", "frozen"] == pytest.approx(-0.02, abs=1e-5)
    assert contrasts["by_size", "paired", "lucchi", "frozen"] == pytest.approx(0.03, abs=1e-5)
    assert {key[:2] for key in contrasts} == {
        ("paired", "lucchi"),
        ("paired", "vnc"),
        ("paired_lex", "lex"),
        ("lex", "lucchi"),
        ("paired_lex", "paired"),
        ("by_size", "paired"),
    }
    pooled = {(p["regime"], p["train_set"]): p["mean"] for p in found["pooled"]}
    assert pooled["frozen", "vnc"] == pytest.approx(0.71, abs=1e-5)
    assert found["ceiling"] == {"lex": None}, "nothing ingested here"
    assert any("mispaired, lexicographic | -0.400" in line for line in factors_table(found))
    factors_png(tmp_path / "a.png", found["fits"], found["contrasts"])
    with Image.open(tmp_path / "a.png") as picture:
        assert np.asarray(picture).std() > 0


def test_a_single_factor_is_students_t_test() -> None:
    rng = np.random.default_rng(0)
    iou, group = rng.normal(0.7, 0.05, 11), (np.arange(11) % 2).astype(np.float64)
    (term,) = effects(iou, {"group": group}, [0] * 11, np.zeros((1, 11)), blocks=1)
    low, high = stats.ttest_ind(iou[group == 1], iou[group == 0]).confidence_interval(0.95)
    assert term["ci95"] == pytest.approx([low, high], abs=1e-6)
    assert term["estimate"] == pytest.approx((low + high) / 2, abs=1e-6)


def test_as_many_terms_as_units_are_no_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left over to read an interval from; contrasts, which slices have one for, stay."""
    own = dataclasses.replace(study(), seeds=(0,))
    found = factors(tmp_path, own, groups(own))
    assert found["fits"] == []
    assert found["contrasts"]
    monkeypatch.setitem(fakes.SLICES, "lex", 32)
    monkeypatch.setitem(fakes.LABELLED, "lex", 48)
    fakes.write_metrics(tmp_path, own)
    build_report(tmp_path, own)
    assert "One factor changed" in (tmp_path / "reports/leaderboard.md").read_text()
    assert not (tmp_path / "reports/figures/factors.png").exists()


def test_slices_widen_an_interval_by_how_much_the_effect_varies_over_them() -> None:
    rng = np.random.default_rng(1)
    group, shift = np.array([0.0, 0, 1, 1]), rng.normal(0, 0.03, 4000)
    draws = 0.7 + np.outer(shift, group)  # replicates differ in the effect alone
    (term,) = effects(0.7 + 0.1 * group, {"group": group}, [0, 1, 0, 1], draws, blocks=5)
    half = stats.t.ppf(0.975, 4) * 0.03 * np.sqrt(5 / 4)
    assert (term["ci95"][1] - term["ci95"][0]) / 2 == pytest.approx(half, rel=0.05)
    common = 0.7 + np.outer(shift, np.ones(4))  # hard slices are hard for all: no wider
    (term,) = effects(0.7 + 0.1 * group, {"group": group}, [0, 1, 0, 1], common, blocks=5)
    assert term["ci95"] == pytest.approx([0.1, 0.1], abs=1e-5)


def test_a_study_without_a_mispaired_twin_has_no_factors(tmp_path: Path) -> None:
    plain = a_study()
    assert factors(tmp_path, plain, {}) == {}
    alone = dataclasses.replace(study(), datasets=("lex", "vnc"))
    assert factors(tmp_path, alone, {}) == {}
    assert "few" not in cells_of(study())
