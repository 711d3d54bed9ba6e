"""Units with the same plan are the same model: it is trained once and then copied.

Ridge draws nothing but few labels, so its seeds are one model. A U-Net from scratch is the same under
every backbone with the same tiles. A pretrained system used as it is has neither seed nor backbone.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import load_file

from emadapt.models import parallel
from emadapt.models.segmenter import Segmenter

ROOT = Path("scratch/twins")


def turn(key: str) -> AbstractContextManager[Any]:
    """Held while a unit is trained, so that of several processes that want the same model one trains and the others find it.

    Not by processes that train one unit together, which would wait for each other.
    """
    if parallel.size() > 1:
        return nullcontext()
    ROOT.mkdir(parents=True, exist_ok=True)
    return FileLock(ROOT / f"{key}.lock")


def find(units: Path, key: str, but: str = "") -> Path | None:
    """The folder of a finished unit that has this key and is not called `but`."""
    for file in sorted(units.glob("[!.]*/model.json")):  # a dot: not yet renamed to its place
        try:
            card = json.loads(file.read_text())
        except ValueError:
            continue
        if isinstance(card, dict) and card.get("key") == key and card.get("unit") != but:
            return file.parent
    return None


def adopt(folder: Path, segmenter: Segmenter) -> tuple[dict[str, Any], dict[str, float]]:
    """Take over a twin's weights.

    Returns:
        Its progress (fields of `train.Progress`) and its validation scores.
    """
    segmenter.load_trained(load_file(folder / "model.safetensors"))
    card, history = (
        json.loads((folder / name).read_text()) for name in ("model.json", "history.json")
    )
    progress = {
        "epoch": len(history["epochs"]),
        "best_epoch": card["best_epoch"],
        "seconds": history["seconds"],
        "history": history["epochs"],
        "peak_mb": history["peak_mb"],
    }
    return progress, card["val"]
