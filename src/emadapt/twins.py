"""Units that cannot differ: trained once, and then copied.

Ridge draws nothing, so its seeds are one model; a U-Net from scratch is the same under every backbone that cuts the same tiles.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors.torch import load_file

from emadapt.models.segmenter import Segmenter

ROOT = Path("scratch/twins")
INPUT = ("scale", "longest_edge", "tile", "overlap", "precision")
"""What a U-Net's input takes from the backbone's settings."""


def identity(described: dict[str, Any], segmenter: Segmenter) -> dict[str, Any]:
    """What of `Study.describe` the trained weights depend on."""
    kind = segmenter.regime.kind
    if kind == "ridge":
        return described | {"unit": None}
    if kind == "unet2d":
        settings = {name: getattr(segmenter.spec, name) for name in INPUT}
        return described | {"unit": {"seed": described["unit"]["seed"]}, "backbone": settings}
    return described


def turn(segmenter: Segmenter, key: str) -> AbstractContextManager[Any]:
    """Held while a unit that may have twins is trained, so that of several at once one trains and the others copy."""
    if segmenter.regime.kind not in ("ridge", "unet2d"):
        return nullcontext()
    ROOT.mkdir(parents=True, exist_ok=True)
    return FileLock(ROOT / f"{key}.lock")


def find(units: Path, key: str, name: str) -> Path | None:
    """The folder of a finished unit that is not called `name` and has the same key."""
    for file in sorted(units.glob("[!.]*/model.json")):  # a dot: not yet renamed to its place
        try:
            card = json.loads(file.read_text())
        except ValueError:
            continue
        if isinstance(card, dict) and card.get("key") == key and card.get("unit") != name:
            return file.parent
    return None


def adopt(folder: Path, segmenter: Segmenter) -> tuple[dict[str, Any], dict[str, float]]:
    """Take over a twin's weights.

    Returns:
        Its progress (fields of `train.Progress`) and its validation scores.
    """
    segmenter.load_trained(load_file(folder / "model.safetensors"))
    card, history = (json.loads((folder / name).read_text()) for name in ("model.json", "history.json"))
    progress = {"epoch": len(history["epochs"]), "best_epoch": card["best_epoch"], "seconds": history["seconds"],
                "history": history["epochs"], "peak_mb": history["peak_mb"]}  # fmt: skip
    return progress, card["val"]
