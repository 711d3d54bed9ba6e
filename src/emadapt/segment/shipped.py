"""Models that ship with the package, each a folder of `shipped/`: `starter` is the default."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from emadapt.training.model_card import metrics_of, terms_of

SHIPPED = Path(__file__).resolve().with_name("shipped")
STARTER = "starter"


def listing() -> Iterator[str]:
    """What `emadapt models` prints: figures, size, weights and terms of each shipped model."""
    for folder in sorted(path.parent for path in SHIPPED.glob("*/model.json")):
        card = json.loads((folder / "model.json").read_text())
        size = (folder / "model.safetensors").stat().st_size / 1e6
        datasets = ", ".join(card["data_md5"])
        yield f"{folder.name}: {size:.1f} MB, emadapt {card['version']}, trained on {datasets}"
        metrics = metrics_of(folder, card)
        for name, test in (metrics["test"] if metrics else {}).items():
            low, high = test["iou_ci95"]
            seen = "trained on it" if name in card["data_md5"] else "not trained on it"
            interval = f"{test['iou']:.3f} [{low:.3f}, {high:.3f}]"
            yield f"  IoU on {name} ({seen}): {interval}, {test['n']} slices"
        if chosen := card.get("chosen_on"):
            yield f"  chosen among other versions on {chosen}"
        weights = card["weights"]
        yield f"  backbone: {card['backbone']['arch']}, {weights['name']} from {weights['source']}"
        yield from (f"  terms: {line}" for line in terms_of(card))
        yield f"  card: {folder / 'model-card.md'}"
