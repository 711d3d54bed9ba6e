"""What a person who is handed a model reads about it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emadapt.data.fetch import record_of
from emadapt.data.sources import DATASETS
from emadapt.study.regimes import regime_settings
from emadapt.study.study import Unit
from emadapt.training.evaluate import evaluate_unit
from emadapt.training.model_card import model_card, terms_of
from emadapt.training.prepare import behind_folders
from emadapt.training.train import train_unit
from fakes import a_study
from tiny import make_study, settings

SOURCES = {name: record_of(DATASETS[name]) for name in ("lucchi", "vnc")}
"""As SOURCE.json has them."""


Evaluated = tuple[str, dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    """The card that evaluate wrote, and what it was made of."""
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("EMADAPT_TRACKING", "off")
        study = make_study(root, settings(epochs=1, steps_per_epoch=1))
        own = Unit("t", "lora", "a", 0)
        folder, path = train_unit(study, own), evaluate_unit(study, own)
        card, metrics = (json.loads(Path(p).read_text()) for p in (folder / "model.json", path))
        return (path.parent / "model-card.md").read_text(), card, metrics


def test_evaluate_writes_it_with_the_scores_that_it_found(unit: Evaluated) -> None:
    text, card, metrics = unit
    assert text == model_card(card, metrics)
    for name, kind in (("a", "trained on it"), ("b", "not trained on")):
        own = metrics["test"][name]
        assert f"| {name} | {kind} | {own['n']} | {own['iou']:.3f} (" in text
    assert "Random weights: a control" in text
    assert f"{metrics['test']['b']['iou']:.2f} on b" in text
    assert "a: not known here." in text
    assert metrics["model_md5"] in text
    assert "Fewer than ten test slices (a, b)" in text


def test_terms_of_training_data_reach_the_adapter(unit: Evaluated) -> None:
    _, card, metrics = unit
    names = ("lucchi", "vnc")
    both = (
        card
        | {"sources": SOURCES}
        | {key: dict.fromkeys(names, card[key]["a"]) for key in ("data_md5", "pairing", "voxel_nm")}
    )
    both["pairing"] = both["pairing"] | {"lucchi": "lexicographic"}
    text = model_card(both, metrics)
    assert "- vnc: CC BY-NC-SA 3.0. No commercial use." in text
    assert "Gerhard" in text
    assert "**lucchi: images with other slices' labels, to replicate a mistake." in text
    alone = model_card(
        card | {"weights": card["weights"] | {"source": "pypi"}},
        {**metrics, "test": {"a": metrics["test"]["a"]}},
    )
    assert "Not tested on any dataset that it was not trained on." in alone
    assert "Random weights" not in alone


def test_terms_of_what_earlier_models_saw_reach_the_adapter(unit: Evaluated) -> None:
    """A unit fine-tuned on data of its own from a unit of VNC, which itself started from one of a
    twin of Lucchi."""
    text, card, metrics = unit
    assert "through the model" not in text
    twin: dict[str, Any] = {"datasets": {"mispaired": {}}}
    settings = card["settings"] | {"source": {"datasets": {"vnc": {}}, "source": twin}}
    sources = {"vnc": SOURCES["vnc"], "mispaired": SOURCES["lucchi"]}
    tuned = model_card(
        card | {"settings": settings, "sources": sources},
        metrics | {"test": {"vnc": metrics["test"]["a"]}},
    )
    assert "- a: not known here.\n" in tuned
    before = "through the model that it starts from"
    assert f"- vnc ({before}): CC BY-NC-SA 3.0. No commercial use." in tuned
    assert f"- mispaired ({before}): research use; cite both papers. No commercial use." in tuned
    assert f"| vnc | {before} |" in tuned
    text = model_card(card | {"unlabelled_md5": {"vnc": "0"}, "sources": SOURCES}, metrics)
    assert "- vnc (its images, without labels): CC BY-NC-SA 3.0. No commercial use." in text


def test_terms_reach_through_models_in_folders(tmp_path: Path) -> None:
    card = {
        "data_md5": {"mine": "0"},
        "settings": {"source": {"datasets": {"vnc": {}}}},
        "sources": {"vnc": SOURCES["vnc"]},
    }
    (tmp_path / "model.json").write_text(json.dumps(card))
    lora = regime_settings(kind="lora")
    regimes = {
        "tuned": lora.changed(warm_start=str(tmp_path)),
        "again": lora.changed(warm_start="tuned"),
    }
    study = replace(a_study(), regime_settings=regimes, regimes=tuple(regimes))
    before = behind_folders(study, Unit("dinov2_s", "again", "lucchi", 0))
    assert before == [{"name": "mine", "source": {}}, {"name": "vnc", "source": SOURCES["vnc"]}]
    own = {
        "data_md5": {"lucchi": "0"},
        "started_from": before,
        "weights": {"source": "pypi"},
        "backbone": {"arch": "dinov2_s"},
    }
    terms = "\n".join(terms_of(own))
    assert "vnc (through the model that it starts from): CC BY-NC-SA 3.0." in terms
    assert "which is not in the file" in terms
    assert "which is in the file: Apache-2.0." in terms_of(own, with_backbone=True)[-1]


def test_images_under_other_labels_are_not_new(unit: Evaluated) -> None:
    _, card, metrics = unit
    own = {key: {"twin": card[key]["a"]} for key in ("data_md5", "pairing", "voxel_nm")}
    text = model_card(
        card | own | {"sources": {"twin": SOURCES["lucchi"]}},
        metrics | {"test": {"lucchi": metrics["test"]["a"]}},
    )
    assert "| lucchi | its images under other labels |" in text
    assert "On data it has not seen" not in text


def test_labels_of_the_same_images_are_not_new_whatever_their_names(
    unit: Evaluated, tmp_path: Path, tracking_off: None
) -> None:
    _, card, metrics = unit
    make_study(tmp_path)
    assert "| b | not trained on |" in model_card(card, metrics)
    one, other = (tmp_path / f"build/ingest/{name}/manifest.json" for name in "ab")
    images = {"image_md5": json.loads(one.read_text())["image_md5"]}
    other.write_text(json.dumps(json.loads(other.read_text()) | images))
    assert "| b | its images under other labels |" in model_card(card, metrics)
