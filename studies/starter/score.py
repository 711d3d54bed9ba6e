"""Score the model that ships on real volumes, as `emadapt segment` without `--model` segments them.

`python studies/starter/score.py [FOLDER]` takes the datasets of FOLDER (default `data`), of which
the model has seen nothing: the test half of Lucchi, all sections of VNC. For each it prints the
scores of one look (`--fast`) and of two, and their paired difference. It writes the scores of two
looks and the card next to the model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from emadapt import api
from emadapt.data.layouts import find_parts
from emadapt.data.sources import DATASETS
from emadapt.files import write_json, write_text
from emadapt.metrics.contrasts import paired
from emadapt.segment.model import Model
from emadapt.segment.shipped import SHIPPED, STARTER
from emadapt.training.model_card import model_card

LARGE = ("per_slice", "counts", "boundary_counts", "slices")
"""What the model that ships leaves out."""


def score(model: Model, root: Path, name: str, fast: bool) -> dict[str, Any]:
    """Segment a dataset; prints and gives its scores."""
    known = DATASETS[name]
    part = find_parts(root / name, known.layout, "number")[-1]
    image = part.images.read(0, part.depth)
    label = part.labels.read(0, part.depth) > int(known.foreground[1:])
    mask = api.segment(image, model, known.voxel_nm, fast=fast)
    scores = api.evaluate_masks(mask, label, known.voxel_nm)
    low, high = scores["iou_ci95"]
    share = np.mean(mask) / np.mean(label)
    print(
        f"{name}, {'one look' if fast else 'two looks'}: IoU {scores['iou']:.3f} "
        f"[{low:.3f}, {high:.3f}], {part.depth} slices, foreground {share:.2f} times the labels'",
        flush=True,
    )
    return scores


def main(root: Path) -> None:
    """Segment and score each dataset of a folder."""
    folder, model = SHIPPED / STARTER, api.load_model(STARTER)
    metrics = json.loads((folder / "metrics.json").read_text()) | {"test": {}}
    for name in ("lucchi", "vnc"):
        once, twice = (score(model, root, name, fast) for fast in (True, False))
        of_once, of_twice = (np.asarray([scores["counts"]]) for scores in (once, twice))
        gain = paired(of_twice, of_once)
        low, high = gain.ci95
        print(f"{name}, the second look: {gain.difference:+.3f} [{low:+.3f}, {high:+.3f}]")
        metrics["test"][name] = {k: v for k, v in twice.items() if k not in LARGE}
    write_json(folder / "metrics.json", metrics)
    write_text(folder / "model-card.md", model_card(model.card, metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
