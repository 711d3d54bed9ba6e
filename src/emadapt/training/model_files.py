"""A trained model in a folder: model.json and model.safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from emadapt.errors import InputError
from emadapt.models.adapters import State
from emadapt.models.classifier import HEADS
from emadapt.models.segmenter import Segmenter
from emadapt.study.backbones import BackboneSettings
from emadapt.study.datasets import ONE_CLASS
from emadapt.study.reading import parse, parse_tagged
from emadapt.study.regimes import REGIME_SETTINGS
from emadapt.study.study import Study, Unit, dumped
from emadapt.training.plan import unit_key
from emadapt.training.regimes import IMAGE_REGIMES, REGIMES
from emadapt.training.regimes.regime import Regime
from emadapt.training.tracked import UNITS

UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError),
    SafetensorError,
)
"""What reading a damaged model raises."""


def save_model(segmenter: Segmenter, regime: Regime, folder: Path, facts: dict[str, Any]) -> None:
    """Write the trained tensors, and a card with all that builds the model, and `facts`."""
    folder.mkdir(parents=True, exist_ok=True)
    card = {
        "backbone": dumped(regime.spec),
        "regime": dumped(regime.settings),
        "head": regime.head_name,
        "weights": segmenter.backbone.provenance.to_dict(),
        **({"classes": segmenter.classes} if segmenter.classes != ONE_CLASS else {}),
        **facts,
    }
    save_file(segmenter.trained_state(), folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps(card, indent=1, sort_keys=True) + "\n")


def load_model(folder: Path) -> tuple[Segmenter, dict[str, Any]]:
    """Build the model that `save_model` wrote, in eval mode, and its model.json.

    Raises:
        InputError: the folder holds no model or a damaged one, or the backbone's weights are not
            the ones that it was trained on.
    """
    card, state, regime = read_model(folder)
    segmenter = regime.build(seed=0, classes=classes_of(card))
    trained_on, sha256 = card["weights"]["sha256"], segmenter.backbone.provenance.sha256
    if sha256 != trained_on:
        found, do = f"backbone weights {sha256[:12]}", "Restore those weights, or train again."
        expected = f"{trained_on[:12]}, which it was trained on"
        raise InputError(folder, found=found, expected=expected, do=do)
    segmenter.load_trained(state)
    return segmenter.eval(), card


def load_unit(study: Study, unit: Unit) -> tuple[Segmenter, dict[str, Any]]:
    """As `load_model`, of a trained unit of the study.

    Raises:
        InputError: also if it was trained with other settings, data or weights.
    """
    folder = UNITS / unit.name
    segmenter, card = load_model(folder)
    if card["key"] != unit_key(study, unit):
        raise InputError(
            folder,
            found="a model of other settings, data or weights than those selected now",
            expected="a model of these",
            do=f"Run `dvc repro train@{unit.name}`.",
        )
    return segmenter, card


def read_model(folder: Path) -> tuple[dict[str, Any], State, Regime]:
    """The model.json in a folder, the trained tensors, and the regime of which it is.

    Raises:
        InputError: the folder holds no model or a damaged one.
    """
    try:
        card = json.loads((folder / "model.json").read_text())
        state = load_file(folder / "model.safetensors")
        regime, _ = regime_from(card), str(card["weights"]["sha256"])
    except UNREADABLE as error:
        raise InputError(
            folder,
            found=f"no model that can be read ({type(error).__name__}: {str(error)[:300]})",
            expected="model.json and model.safetensors, as `emadapt train` writes them",
            do="Correct the folder, or train the model: `dvc repro train@UNIT`.",
        ) from error
    return card, state, regime


def classes_of(card: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classes of a model.json."""
    return tuple(card.get("classes", ONE_CLASS))


def regime_from(card: dict[str, Any]) -> Regime:
    """The regime of a model.json. Raises ValueError or KeyError for settings that are none."""
    problems: list[str] = []
    settings = parse_tagged(REGIME_SETTINGS, card["regime"], "regime", problems)
    spec = parse(BackboneSettings, card["backbone"], "backbone", problems)
    if problems:
        raise ValueError("; ".join(problems))
    head = str(card["head"])
    kinds = IMAGE_REGIMES if head in HEADS else REGIMES
    return kinds[settings.kind](settings, spec, head)
