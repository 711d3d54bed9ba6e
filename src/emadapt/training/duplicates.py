"""Units with the same key are one model: it is trained once and then copied."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import load_file

from emadapt.models import parallel
from emadapt.models.segmenter import Segmenter
from emadapt.training.inputs import Progress
from emadapt.training.tracked import UNITS

LOCKS = Path("scratch/keys")


def turn(key: str) -> AbstractContextManager[Any]:
    """Held while a unit is trained: others that want the same model wait and then find it.

    Processes that train one unit together do not take turns.
    """
    if parallel.size() > 1:
        return nullcontext()
    LOCKS.mkdir(parents=True, exist_ok=True)
    return FileLock(LOCKS / f"{key}.lock")


def find(key: str, but: str = "") -> Path | None:
    """The folder of a finished unit that has this key and is not called `but`."""
    for file in sorted(UNITS.glob("[!.]*/model.json")):  # a dot: not yet complete
        try:
            card = json.loads(file.read_text())
        except ValueError:
            continue
        if isinstance(card, dict) and card.get("key") == key and card.get("unit") != but:
            return file.parent
    return None


def take_over(folder: Path, segmenter: Segmenter) -> tuple[Progress, dict[str, float]]:
    """Load a finished unit's weights; gives how it was trained, and its validation scores."""
    segmenter.load_trained(load_file(folder / "model.safetensors"))
    card = json.loads((folder / "model.json").read_text())
    epochs = json.loads((folder / "history.json").read_text())["epochs"]
    return Progress(len(epochs), best_epoch=card["best_epoch"], history=epochs), card["val"]
