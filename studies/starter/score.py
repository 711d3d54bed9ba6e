"""Score the model that ships on real volumes, as `emadapt segment` without `--model` segments them.

`python studies/starter/score.py [FOLDER]` takes the datasets of FOLDER (default `data`), of which
the model has seen nothing: the test half of Lucchi, all sections of VNC. It prints a line for each
and writes the scores and the card next to the model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from emadapt import api
from emadapt.data.layouts import find_parts
from emadapt.data.sources import DATASETS
from emadapt.files import write_json, write_text
from emadapt.segment.shipped import SHIPPED, STARTER
from emadapt.training.model_card import model_card

LARGE = ("per_slice", "counts", "boundary_counts", "slices")
"""What the model that ships leaves out."""


def main(root: Path) -> None:
    """Segment and score each dataset of a folder."""
    folder, model = SHIPPED / STARTER, api.load_model(STARTER)
    metrics = json.loads((folder / "metrics.json").read_text()) | {"test": {}}
    for name in ("lucchi", "vnc"):
        known = DATASETS[name]
        part = find_parts(root / name, known.layout, "number")[-1]
        image = part.images.read(0, part.depth)
        label = part.labels.read(0, part.depth) > int(known.foreground[1:])
        mask = api.segment(image, model, known.voxel_nm)
        scores = api.evaluate_masks(mask, label, known.voxel_nm)
        metrics["test"][name] = {k: v for k, v in scores.items() if k not in LARGE}
        low, high = scores["iou_ci95"]
        share = np.mean(mask) / np.mean(label)
        iou = f"IoU {scores['iou']:.3f} [{low:.3f}, {high:.3f}]"
        print(
            f"{name}: {iou}, {part.depth} slices, foreground {share:.2f} times that of the labels"
        )
    write_json(folder / "metrics.json", metrics)
    write_text(folder / "model-card.md", model_card(model.card, metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
