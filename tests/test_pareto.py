"""In-domain against unseen IoU: the front, the differences, and what the report shows of them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from emadapt.report import figures, pareto, report
from emadapt.report.comparisons import difference
from emadapt.report.pareto import front, pareto_png, said, trade_offs, verdict
from emadapt.study.study import Study, TrainSetSettings
from fakes import SPECS, a_study, counts_of, few_study, iou_of, transfer_study, write_metrics

REGIMES = ("frozen", "lora", "wise50", "last3")


def entries(study: Study) -> list[dict[str, Any]]:
    """Of the summary, as far as the trade needs them."""
    values: dict[tuple[str, ...], list[float]] = {}
    for unit in study.units():
        for test in study.datasets:
            values.setdefault((unit.backbone, unit.regime, unit.train_set, test), []).append(
                iou_of(study, unit, test)
            )
    names = ("backbone", "regime", "train_set", "test_set")
    return [
        dict(zip(names, key, strict=True))
        | {"n": 12, "iou": {"mean": float(np.mean(v)), "values": v, "ci95": [0.1, 0.9]}}
        for key, v in values.items()
    ]


def groups(study: Study) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Metrics of the seeds, as far as a difference needs them."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for unit in study.units():
        counts = {
            test: counts_of(iou_of(study, unit, test), test).tolist() for test in study.datasets
        }
        test = {
            name: {"counts": own, "block_slices": 4 if len(own) > 16 else 1}
            for name, own in counts.items()
        }
        found.setdefault((unit.backbone, unit.regime, unit.train_set), []).append({"test": test})
    return found


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_point_dominates(points: list[tuple[int, int]]) -> None:
    def dominated(p: tuple[int, int]) -> bool:
        return any(q[0] >= p[0] and q[1] >= p[1] and q != p for q in points)

    assert front([(x / 4, y / 4) for x, y in points]) == [not dominated(p) for p in points]


@pytest.mark.parametrize(
    ("in_domain", "unseen", "given_up"),
    [
        ((0.01, 0.03), (0.0, 0.02), "nothing"),
        ((0.0, 0.0), (0.0, 0.0), "nothing"),  # as good in both
        ((0.01, 0.03), (-0.05, -0.01), "something"),
        ((-0.05, -0.01), (0.10, 0.20), "something"),
        ((0.01, 0.03), (-0.10, 0.20), "open"),
    ],
)
def test_what_a_setting_gives_up(
    in_domain: tuple[float, float], unseen: tuple[float, float], given_up: str
) -> None:
    assert verdict([in_domain, unseen], 3) == given_up
    assert verdict([in_domain, unseen], 2) == "too few seeds"


def test_single_datasets_with_all_labels_against_each_unseen_one() -> None:
    study = a_study((0, 1, 2), REGIMES)
    trades = trade_offs(study, groups(study), entries(study))
    assert [(t["backbone"], t["train_set"], t["a"], t["b"]) for t in trades] == [
        ("dinov2_s", "lucchi", "lucchi", "vnc"),
        ("dinov2_s", "vnc", "vnc", "lucchi"),
    ]
    for trade in trades:
        points = {p["regime"]: p for p in trade["points"]}
        assert set(points) == set(REGIMES)
        assert trade["points"][0]["regime"] == "lora"
        assert "against" not in points["frozen"]
        for name, test in (("in_domain", trade["a"]), ("unseen", trade["b"])):
            found = points["lora"]["against"][name]
            lora, frozen = (
                ("dinov2_s", regime, trade["train_set"]) for regime in ("lora", "frozen")
            )
            assert found == difference(groups(study), lora, frozen, test)
            assert found["difference"] == pytest.approx(0.05, abs=0.01)
        assert [p["regime"] for p in trade["points"] if p["front"]] == ["lora"]
        assert (
            said(trade)
            == "Settings that give up nothing against frozen: lora. Open: wise50, last3."
        )


def test_too_few_regimes_or_seeds_or_no_frozen_one() -> None:
    assert trade_offs(a_study(), groups(a_study()), entries(a_study())) == []
    study = a_study((0, 1), REGIMES)
    assert {said(t) for t in trade_offs(study, groups(study), entries(study))} == {
        "Whether a setting gives up nothing cannot be said with 2 seeds: 3 are needed."
    }
    study = a_study((0, 1, 2), REGIMES[1:])
    trades = trade_offs(study, groups(study), entries(study))
    assert {said(t) for t in trades} == {"The study has no frozen regime to compare with."}


def test_a_dataset_whose_labels_or_images_a_unit_has_seen_is_not_unseen() -> None:
    study = transfer_study()
    regimes = {
        (t["a"], t["b"]): {p["regime"] for p in t["points"]}
        for t in trade_offs(study, groups(study), entries(study))
    }
    assert regimes == {
        ("lucchi", "vnc"): {"lora", "frozen", "from_lucchi", "lpft"},
        ("vnc", "lucchi"): {"lora", "frozen", "lpft"},
    }
    onto = {
        "lucchi": TrainSetSettings(("lucchi",), unlabelled=("vnc",)),
        "paired": SPECS["paired"],
        "vnc": SPECS["vnc"],
    }
    study = dataclasses.replace(a_study((0, 1, 2), REGIMES), train_set_settings=onto)
    assert [t["a"] for t in trade_offs(study, groups(study), entries(study))] == ["vnc"]
    wrong = dataclasses.replace(
        study.dataset_settings["lucchi"], pairing="lexicographic"
    )  # the same images
    study = dataclasses.replace(
        a_study((0, 1, 2), REGIMES), dataset_settings=study.dataset_settings | {"lucchi": wrong}
    )
    assert trade_offs(study, groups(study), entries(study)) == []
    few = dataclasses.replace(few_study(), train_sets=("lucchi_1", "vnc_4"))
    assert trade_offs(few, groups(few), entries(few)) == []


def test_leaderboard_page_and_figure_show_it(tmp_path: Path) -> None:
    study = dataclasses.replace(a_study((0, 1, 2), REGIMES[:3]), train_sets=("lucchi", "vnc"))
    write_metrics(tmp_path, study)
    summary = json.loads(report.build_report(tmp_path, study).read_text())
    assert "over slices and seeds" in summary["pareto_method"]
    board = (
        (tmp_path / "reports/leaderboard.md").read_text().split("## In domain against unseen")[1]
    )
    page = (tmp_path / "reports/index.html").read_text()
    section = page.split('id="pareto"')[1].split("</section>")[0]
    assert 'href="#pareto"' in page
    assert section.count("data:image/") == 1
    for trade in summary["pareto"]:
        assert said(trade) in board
        assert said(trade) in section
        for point in trade["points"]:
            row = next(
                line
                for line in board.splitlines()
                if f"| {point['regime']} | {point['in_domain']['mean']:.3f}" in line
            )
            assert row.startswith("| ● |") == point["front"]
            for own in (point["in_domain"], point["unseen"]):
                assert f"{own['mean']:.3f} ({own['ci95'][0]:.3f} to {own['ci95'][1]:.3f})" in row
                assert (
                    f"{own['mean']:.3f}<small>{own['ci95'][0]:.3f} to {own['ci95'][1]:.3f}"
                    in section
                )
            if "against" in point:
                assert f"{point['against']['unseen']['difference']:+.3f}" in row
    fewer = dataclasses.replace(study, regimes=("frozen", "lora"), train_sets=("vnc",), seeds=(0,))
    report.build_report(tmp_path, fewer)
    assert not (tmp_path / "reports/figures/pareto.png").exists()
    assert 'id="pareto"' not in (tmp_path / "reports/index.html").read_text()


def test_the_figure_names_every_regime_beside_its_own_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, drawn = np.random.default_rng(0), []
    regimes = [f"regime{i}" for i in range(9)]
    study = dataclasses.replace(a_study((0,), ("frozen", *regimes)), datasets=("lucchi", "vnc"))
    trades = trade_offs(study, groups(study), entries(study))
    for trade in trades:
        for point in trade["points"]:
            for name, width in (("in_domain", 0.01), ("unseen", 0.2)):
                mean = 0.5 + width * rng.normal()
                point[name] = {"mean": mean, "ci95": [mean - width, mean + width]}
        on = front([(p["in_domain"]["mean"], p["unseen"]["mean"]) for p in trade["points"]])
        trade["points"] = [p | {"front": f} for p, f in zip(trade["points"], on, strict=True)]
    write = pareto._name

    def spied(axes: Any, points: Any) -> None:
        drawn.append((axes, points))
        write(axes, points)

    monkeypatch.setattr(pareto, "_name", spied)
    pareto_png(tmp_path / "pareto.png", [*trades, trades[0]])  # three panels of four
    assert len(drawn) == 3
    for axes, points in drawn:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert [text.get_text() for text in axes.texts] == list(points)
        assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    with Image.open(tmp_path / "pareto.png") as opened:
        picture = np.asarray(opened.convert("RGB")).astype(int)
    for colour in (figures.BLUE, figures.ORANGE, figures.GREEN):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(picture - rgb).sum(-1) < 12).sum() > 100
