"""Where a unit starts from, if not from pretrained weights alone: the adapter and head of another model (`init_from`)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from emadapt.errors import InputError
from emadapt.models.regimes import State
from emadapt.models.segmenter import Segmenter
from emadapt.study.study import RegimeSettings, Study, Unit
from emadapt.training.model_card import datasets_behind


def load_start(segmenter: Segmenter, state: State) -> str:
    """Put the head and, where the source has one, the adapter of `state` in the place of the segmenter's initial values.

    Returns:
        Sha256 of `state`.
    """
    segmenter.load_trained({**segmenter.trained_state(), **state})
    return hashlib.sha256(save(dict(sorted(state.items())))).hexdigest()


def folder_state(folder: Path, segmenter: Segmenter) -> State:
    """Trained tensors of a model folder.

    Raises:
        InputError: it is no model, or one of another backbone, head or adapter.
    """
    try:
        card, state = (
            json.loads((folder / "model.json").read_text()),
            load_file(folder / "model.safetensors"),
        )
        arch, weights, head, regime = (
            card["backbone"]["arch"],
            card["weights"]["sha256"],
            card["head"],
            card["regime"],
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise InputError(
            f"init_from {folder}",
            found=f"no model that can be read ({type(error).__name__}: {error})",
            expected="model.json and model.safetensors, as `train` writes them",
            do="Correct `init_from`, or train that model first.",
        ) from error
    own = segmenter.spec.arch, segmenter.backbone.provenance.sha256
    if (arch, weights) != own and not segmenter.regime.from_scratch:
        raise InputError(
            f"init_from {folder}",
            found=f"a model of backbone {arch}, weights {weights[:12]}",
            expected=f"{own[0]}, weights {own[1][:12]}",
            do="Start from a model of the same backbone.",
        )
    if head != segmenter.head_name:
        raise InputError(
            f"init_from {folder}",
            found=f"a head {head}",
            expected=segmenter.head_name,
            do="Give the regime that head.",
        )
    have, want = _adapter(regime), _adapter(vars(segmenter.regime))
    if any(name.startswith("adapter.") for name in state) and have != want:
        raise InputError(
            f"init_from {folder}",
            found=f"an adapter {have}",
            expected=str(want),
            do="Give the regime the settings of that adapter.",
        )
    return state


def behind_folders(study: Study, unit: Unit) -> list[dict[str, Any]]:
    """Datasets behind the models in folders that a unit, or a unit that it starts from, starts from; for its model.json.

    Returns:
        `name` of each in its study, and `source`: what its SOURCE.json says.
    """
    found: dict[str, Any] = {}
    for at in (unit, *study.sources_of(unit)):
        if "/" in (start := study.regime_settings[at.regime].init_from):
            card = json.loads((Path(start) / "model.json").read_text())
            found |= {data.name: dict(data.source) for data in datasets_behind(card)}
    return [{"name": name, "source": source} for name, source in found.items()]


def _adapter(regime: dict[str, Any]) -> dict[str, Any]:
    """The settings that give an adapter's tensors their names, shapes and meaning."""
    empty = vars(RegimeSettings("frozen"))
    return {name: regime.get(name, empty[name]) for name in ("kind", "rank", "alpha", "k")}
