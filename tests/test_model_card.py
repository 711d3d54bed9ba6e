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
VNC = "CC BY-NC-SA 3.0. No commercial use."


@pytest.fixture(scope="module")
def unit(tmp_path_factory):
    """The card that evaluate wrote, and the two files that it was made of."""
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("EMADAPT_TRACKING", "off")
        study = make_study(root, settings(epochs=1, steps_per_epoch=1))
        own = Unit("t", "lora", "a", 0)
        folder, path = train_unit(study, own), evaluate_unit(study, own)
        card, metrics = (json.loads(Path(p).read_text()) for p in (folder / "model.json", path))
        return (path.parent / "model-card.md").read_text(), card, metrics


def trained_on(card: dict[str, Any], *names: str) -> dict[str, Any]:
    """A card as of a model of these datasets."""
    of = {key: dict.fromkeys(names, card[key]["a"]) for key in ("data_md5", "pairing", "voxel_nm")}
    return card | of


def test_evaluate_writes_it_with_the_scores_that_it_found(unit):
    text, card, metrics = unit
    assert text == model_card(card, metrics)
    for name, kind in (("a", "trained on it"), ("b", "not trained on")):
        own = metrics["test"][name]
        assert f"| {name} | {kind} | {own['n']} | {own['iou']:.3f} (" in text
    assert metrics["model_md5"] in text


def test_terms_of_all_data_that_a_model_has_seen_reach_its_card(unit):
    """Trained on it, as images alone, and by the model that it starts from, or one before that."""
    text, card, metrics = unit
    assert VNC not in text
    assert f"- vnc: {VNC}" in model_card(trained_on(card, "vnc") | {"sources": SOURCES}, metrics)
    alone = model_card(card | {"unlabelled_md5": {"vnc": "0"}, "sources": SOURCES}, metrics)
    assert f"- vnc (its images, without labels): {VNC}" in alone
    twin: dict[str, Any] = {"datasets": {"twin": {}}}
    chain = card["settings"] | {"source": {"datasets": {"vnc": {}}, "source": twin}}
    sources = {"vnc": SOURCES["vnc"], "twin": SOURCES["lucchi"]}
    tests = {"test": {"vnc": metrics["test"]["a"]}}
    tuned = model_card(card | {"settings": chain, "sources": sources}, metrics | tests)
    before = "through the model that it starts from"
    assert f"- vnc ({before}): {VNC}" in tuned
    assert f"- twin ({before}): research use" in tuned
    assert f"| vnc | {before} |" in tuned


def test_terms_reach_through_models_in_folders(tmp_path):
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
    own = {"data_md5": {"lucchi": "0"}, "started_from": before}
    own |= {"weights": {"source": "pypi"}, "backbone": {"arch": "dinov2_s"}}
    assert VNC in "\n".join(terms_of(own))
    assert "which is in the file: Apache-2.0." in terms_of(own, with_backbone=True)[-1]


def test_images_under_other_labels_are_not_new(unit, tmp_path, tracking_off):
    """By the source of a dataset, or by its images."""
    _, card, metrics = unit
    twin = trained_on(card, "twin") | {"sources": {"twin": SOURCES["lucchi"]}}
    text = model_card(twin, metrics | {"test": {"lucchi": metrics["test"]["a"]}})
    assert "| lucchi | its images under other labels |" in text
    make_study(tmp_path)
    assert "| b | not trained on |" in model_card(card, metrics)
    one, other = (tmp_path / f"build/ingest/{name}/manifest.json" for name in "ab")
    images = {"image_md5": json.loads(one.read_text())["image_md5"]}
    other.write_text(json.dumps(json.loads(other.read_text()) | images))
    assert "| b | its images under other labels |" in model_card(card, metrics)
