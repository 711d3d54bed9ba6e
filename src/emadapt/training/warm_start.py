"""Warm starts from a model in a folder: its head and adapter are the initial values of a unit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from emadapt.errors import InputError
from emadapt.models.adapters import State
from emadapt.study.study import Study, Unit
from emadapt.training.model_card import datasets_behind
from emadapt.training.model_files import regime_from
from emadapt.training.regimes.regime import Regime


def folder_state(folder: Path, regime: Regime) -> State:
    """Trained tensors of a model folder.

    Args:
        folder: that `train` wrote.
        regime: of the unit that starts from it.

    Raises:
        InputError: it is no model, or one of another backbone, head or adapter.
    """
    try:
        card = json.loads((folder / "model.json").read_text())
        state = load_file(folder / "model.safetensors")
        backbone = card["backbone"]["arch"], card["weights"]["sha256"]
        head, adapter = card["head"], regime_from(card).settings.adapter
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise InputError(
            f"warm start from {folder}",
            found=f"no model that can be read ({type(error).__name__}: {error})",
            expected="model.json and model.safetensors, as `train` writes them",
            do="Correct the folder, or train that model first.",
        ) from error
    own = regime.spec.arch, regime.weights_sha256
    if backbone != own and own[1] != "none":
        raise InputError(
            f"warm start from {folder}",
            found=f"a model of backbone {backbone[0]}, weights {backbone[1][:12]}",
            expected=f"{own[0]}, weights {own[1][:12]}",
            do="Start from a model of the same backbone.",
        )
    if head != regime.head_name:
        raise InputError(
            f"warm start from {folder}",
            found=f"a head {head}",
            expected=regime.head_name,
            do="Give the regime that head.",
        )
    wanted = regime.settings.adapter
    if any(name.startswith("adapter.") for name in state) and adapter != wanted:
        raise InputError(
            f"warm start from {folder}",
            found=f"an adapter {adapter}",
            expected=str(wanted),
            do="Give the regime the settings of that adapter.",
        )
    return state


def behind_folders(study: Study, unit: Unit) -> list[dict[str, Any]]:
    """Datasets behind the model folders that a unit or its sources start from.

    Returns:
        `name` of each in its study, and `source`: what its SOURCE.json says.
    """
    found: dict[str, Any] = {}
    for at in (unit, *study.sources_of(unit)):
        if "/" in (start := study.warm_start_of(at)):
            card = json.loads((Path(start) / "model.json").read_text())
            found |= {data.name: dict(data.source) for data in datasets_behind(card)}
    return [{"name": name, "source": source} for name, source in found.items()]
