"""Models that ship with the package, each a folder of `shipped/`: `starter` is the default.

`python -m emadapt.segment.shipped UNIT NAME THRESHOLD` takes a trained and evaluated unit in as
NAME; THRESHOLD is the probability above which its masks have foreground.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from emadapt.errors import InputError
from emadapt.files import write_text
from emadapt.training.model_card import EVALUATED, metrics_of, terms_of

SHIPPED = Path(__file__).with_name("shipped")
UNITS = Path("build/units")
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
            seen = "trained on it" if name in card["data_md5"] else "never seen"
            interval = f"{test['iou']:.3f} [{low:.3f}, {high:.3f}]"
            yield f"  IoU on {name} ({seen}): {interval}, {test['n']} slices"
        weights = card["weights"]
        yield f"  backbone: {card['backbone']['arch']}, {weights['name']} from {weights['source']}"
        yield from (f"  terms: {line}" for line in terms_of(card))
        yield f"  card: {folder / 'model-card.md'}"


def pack(unit: str, name: str, threshold: float) -> Path:
    """Copy a trained and evaluated unit into the package as `name`.

    Raises:
        InputError: the unit was not evaluated with these weights.
    """
    source, target = UNITS / unit, SHIPPED / name
    card = json.loads((source / "model.json").read_text())
    if not metrics_of(source, card):
        found, do = "no scores of this model", f"Run `emadapt evaluate {unit}`."
        raise InputError(source, found=found, expected="metrics.json of the same model", do=do)
    target.mkdir(parents=True, exist_ok=True)
    write_text(
        target / "model.json",
        json.dumps(card | {"threshold": threshold}, indent=1, sort_keys=True) + "\n",
    )
    shutil.copyfile(source / "model.safetensors", target / "model.safetensors")
    for file in ("metrics.json", "model-card.md"):
        shutil.copyfile(EVALUATED / unit / file, target / file)
    return target


if __name__ == "__main__":
    print(pack(sys.argv[1], sys.argv[2], float(sys.argv[3])))
