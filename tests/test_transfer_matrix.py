"""Source x target: which units are compared with which, and what a source must not have seen."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from emadapt.report import figures, report
from emadapt.report.comparisons import seen_elsewhere
from emadapt.report.transfer_matrix import (
    base_of,
    labelled_words,
    matrices,
    transfer_cells,
    transfer_png,
)
from emadapt.study.datasets import TrainSetSettings
from emadapt.study.regimes import regime_settings
from emadapt.study.study import Unit
from fakes import a_study, few_study, transfer_study, write_metrics


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("transfer")
    write_metrics(root, transfer_study((0,)))
    report.build_report(root, transfer_study((0,)))
    return root / "reports"


def test_differences_are_those_to_the_base(reported: Path) -> None:
    summary = json.loads((reported / "summary.json").read_text())
    iou = {(e["regime"], e["train_set"], e["test_set"]): e["iou"]["mean"] for e in summary["units"]}
    study = transfer_study()
    targets = {
        (name, test)
        for name in study.train_sets
        for test in study.train_set_settings[name].datasets
    }
    for regime in ("lora", "from_lucchi"):
        assert {
            (c["target"], c["test_set"]) for c in summary["transfer"] if c["regime"] == regime
        } == targets
    assert {c["regime"] for c in summary["transfer"]} == {
        "lora",
        "from_lucchi",
    }  # LP-FT starts from its own training set
    compared = [c for c in summary["transfer"] if "difference" in c]
    for cell in compared:
        key = cell["target"], cell["test_set"]
        assert (cell["base"], cell["differs"], cell["source"], cell["source_regime"]) == (
            "lora",
            ["epochs"],
            "lucchi",
            "lora",
        )
        assert cell["difference"] == pytest.approx(
            iou["from_lucchi", *key] - iou["lora", *key], abs=0.01
        )
        assert cell["ci95"][0] <= cell["difference"] <= cell["ci95"][1]
        assert cell["p_value"] <= cell["p_holm"] <= min(1, len(compared) * cell["p_value"] + 1e-6)
    few = {"lucchi_1", "lucchi_4", "lucchi_16"}  # the source has seen all labels of Lucchi
    assert {c["target"] for c in summary["transfer"] if c["seen"]} == few
    assert {(c["target"], c["test_set"]) for c in compared} == {
        key for key in targets if key[0] not in few
    }


def test_regimes_are_compared_where_both_have_seen_the_same_labels(reported: Path) -> None:
    compared = json.loads((reported / "summary.json").read_text())["comparisons"]
    lpft, from_lucchi = (
        {(c["train_set"], c["test_set"]) for c in compared if c["regime"] == regime}
        for regime in ("lpft", "from_lucchi")
    )
    lacking = (
        "lucchi_1",
        "lucchi_4",
        "lucchi_16",
        "vnc_4",
        "vnc",
    )  # not all labels of Lucchi, which the source has seen
    assert lpft - from_lucchi == {(name, "lucchi") for name in lacking}
    assert from_lucchi < lpft


def test_the_leaderboard_shows_every_cell(reported: Path) -> None:
    summary = json.loads((reported / "summary.json").read_text())
    text = (reported / "leaderboard.md").read_text().split("## Starting from another model")[1]
    assert text.count("†") == 1 + 3
    for cell in summary["transfer"]:
        shown = f"{cell['iou']['mean']:.3f} ({cell['iou']['ci95'][0]:.3f} to {cell['iou']['ci95'][1]:.3f})"
        assert shown in text
        if "difference" in cell:
            found = f"{cell['difference']:+.3f}"
            bold = f"**{found}**" if cell["p_holm"] < 0.05 else found
            assert f"{bold} ({cell['ci95'][0]:+.3f} to {cell['ci95'][1]:+.3f})" in text
    assert "(from_lucchi; other epochs)" in text


def test_the_figure_has_the_numbers_of_every_cell(
    reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = json.loads((reported / "summary.json").read_text())["transfer"]
    drawn: list[Figure] = []
    monkeypatch.setattr(figures, "write_figure", lambda path, figure: drawn.append(figure))
    transfer_png(tmp_path / "transfer.png", cells)
    (axes,) = (axes for axes in drawn[0].axes if axes.texts)  # the other one is the colour bar
    texts = [text.get_text() for text in axes.texts]
    assert len(texts) == len(cells)
    for text, cell in zip(texts, cells, strict=True):  # both in the order of rows and targets
        assert text.startswith(f"{cell['iou']['mean']:.3f}")
        assert ("†" in text) == cell["seen"]
        assert (f"{cell['difference']:+.3f}" in text) if "difference" in cell else "\n" not in text
    values: np.ma.MaskedArray = np.ma.masked_invalid(
        np.ma.asarray(axes.images[0].get_array()).filled(np.nan)
    )
    assert values.compressed() == pytest.approx(
        [c["difference"] for c in cells if "difference" in c]
    )
    assert (reported / "figures/transfer.png").stat().st_size > 5000


def test_the_base_has_the_same_adapter_and_head_and_the_fewest_other_settings() -> None:
    start = regime_settings(kind="lora", rank=4, epochs=2, warm_start="lora-lucchi")
    others = {
        "rank8": regime_settings(kind="lora", rank=8, epochs=2),
        "head": regime_settings(kind="lora", rank=4, epochs=2, head="linear"),
        "far": regime_settings(kind="lora", rank=4, epochs=9, head_lr=0.1),
        "near": regime_settings(kind="lora", rank=4, epochs=9),
    }
    study = few_study(regimes={"mine": start, **others})
    assert base_of(study, "mine") == ("near", ["epochs"])
    assert base_of(few_study(regimes={"mine": start, "head": others["head"]}), "mine") is None
    named = regime_settings(
        kind="lora", rank=4, epochs=2, head="pyramid"
    )  # what the study's own head is called
    assert base_of(few_study(regimes={"mine": start, "named": named}), "mine") == ("named", [])


def test_without_a_base_there_is_no_difference() -> None:
    study = dataclasses.replace(
        transfer_study((0,)), regimes=("from_lucchi",), train_sets=("vnc_4", "vnc")
    )
    entries = [
        {
            "backbone": "dinov2_s",
            "regime": "from_lucchi",
            "train_set": name,
            "test_set": test,
            "n": 12,
            "labelled": None,
            "iou": {"mean": 0.5, "ci95": [0.4, 0.6]},
        }
        for name in study.train_sets
        for test in study.datasets
    ]
    cells = transfer_cells(study, {}, entries)
    assert [cell["target"] for cell in cells] == ["vnc_4", "vnc"]
    assert all(cell["base"] is None and "difference" not in cell for cell in cells)
    (table,) = matrices(cells)
    assert (table["base"], len(table["rows"]), len(table["columns"])) == (None, 1, 2)
    assert transfer_cells(few_study(), {}, []) == []


def test_what_was_seen_is_found_through_a_chain() -> None:
    lora = regime_settings(kind="lora")
    starts = {"lora": "", "one": "lora-vnc", "two": "one-lucchi", "own": "lora", "folder": "a/b"}
    chain = {name: lora.changed(warm_start=start) for name, start in starts.items()}
    study = few_study(regimes=chain)

    def seen(regime: str, train_set: str) -> set[str]:
        return seen_elsewhere(study, Unit("dinov2_s", regime, train_set, 0))

    assert seen("one", "vnc_4") == {"vnc"}
    assert seen("two", "vnc_4") == seen("two", "lucchi_4") == {"lucchi", "vnc"}
    assert seen("two", "lucchi") == {"vnc"}  # all labels of Lucchi are there anyway
    assert seen("one", "paired") == set()
    assert seen("own", "lucchi_4") == seen("folder", "lucchi_4") == set()


@pytest.mark.parametrize(
    ("slices", "crops", "words"),
    [
        ((4, 48), (16, 192), "4 of 48 slices"),
        ((48, 48), (192, 192), "48 slices"),
        ((3, 48), (8, 192), "8 of 192 tiles"),
        ((8, 48), (8, 192), "8 of 192 tiles"),
    ],
)
def test_amounts_in_words(slices: tuple[int, int], crops: tuple[int, int], words: str) -> None:
    assert labelled_words({"slices": slices, "crops": crops}) == words
    assert labelled_words(None) == ""


def test_few_labels_of_one_dataset_beside_all_of_another(tmp_path: Path) -> None:
    """What a source has seen counts dataset by dataset, and cells stand under their own test dataset."""
    few: dict[str, int | str] = {"vnc": 1}
    both, turned = (
        TrainSetSettings(datasets=names, slices=few)
        for names in (("lucchi", "vnc"), ("vnc", "lucchi"))
    )
    sets = {
        "vnc": TrainSetSettings(datasets=("vnc",)),
        "lucchi": TrainSetSettings(datasets=("lucchi",)),
        "both": both,
        "turned": turned,
    }
    specs = {
        "lora": regime_settings(kind="lora"),
        "from_vnc": regime_settings(kind="lora", warm_start="lora-vnc"),
        "from_lucchi": regime_settings(kind="lora", warm_start="lora-lucchi"),
    }
    study = dataclasses.replace(
        a_study((0,)),
        regimes=tuple(specs),
        regime_settings=specs,
        train_set_settings=sets,
        train_sets=tuple(sets),
    )
    write_metrics(tmp_path, study)
    cells = json.loads(report.build_report(tmp_path, study).read_text())["transfer"]
    seen = {(c["regime"], c["target"], c["test_set"]) for c in cells if c["seen"]}
    assert seen == {("from_vnc", "both", "vnc"), ("from_vnc", "turned", "vnc")}
    for table in matrices(cells):
        expected = [(target, test) for target, spec in sets.items() for test in spec.datasets]
        assert all(
            [(c["target"], c["test_set"]) for c in own] == expected for *_, own in table["rows"]
        )
