"""Print the differences of docs/studies.md: two models' kept IoUs, 95 % over seeds (Welch's t)."""

import json
from pathlib import Path

import numpy as np

from emadapt.metrics.intervals import added, of_seeds

STUDIES = Path(__file__).parent
DIFFERENCES = [  # study; tested on; regime and training set of the one, of the other
    ("collapse", "lucchi", "frozen lucchi_far", "frozen lucchi"),
    ("collapse", "lucchi", "last3 lucchi_far", "last3 lucchi"),
    ("collapse", "lucchi", "unet2d lucchi_far", "unet2d lucchi"),
    ("collapse", "lucchi", "frozen_bn paired_far", "frozen_bn paired"),
    ("collapse", "vnc", "frozen paired_far", "frozen paired"),
    ("collapse", "vnc", "last3 paired_far", "last3 paired"),
    ("collapse", "vnc", "frozen_bn paired_far", "frozen_bn paired"),
    ("collapse", "vnc", "unet2d paired_far", "unet2d paired"),
    ("collapse", "lucchi", "frozen paired", "frozen lucchi"),
    ("collapse", "vnc", "frozen paired", "frozen vnc"),
    ("joint", "lucchi", "routed paired", "frozen paired"),
    ("joint", "lucchi", "lora paired", "trade lora_random lucchi"),
    ("joint", "vnc", "lora paired", "trade lora_random vnc"),
    ("few_shot_lucchi", "lucchi", "frozen lucchi_4", "frozen lucchi"),
    ("few_shot_lucchi", "lucchi", "frozen lucchi_16", "frozen lucchi"),
    ("few_shot_lucchi", "lucchi", "lora lucchi_4", "lora lucchi"),
    ("few_shot_vnc", "vnc", "frozen vnc_1", "frozen vnc"),
    ("few_shot_vnc", "vnc", "frozen vnc_2", "frozen vnc"),
    ("new_data", "lucchi", "frozen vnc_and_lucchi_1", "frozen lucchi_1"),
    ("new_data", "vnc", "frozen lucchi_and_vnc_1", "frozen vnc_1"),
    ("headline", "lucchi", "lora lucchi", "frozen lucchi"),
]


def values(study: str, test: str, model: str) -> np.ndarray:
    """IoU of each seed; a model of three words is of another study, the first of them."""
    *other, regime, train = model.split()
    path = STUDIES / (other or [study])[0] / "results/summary.json"
    for unit in json.loads(path.read_text())["units"]:
        names = unit["backbone"], unit["regime"], unit["train_set"], unit["test_set"]
        if names == ("dinov2_s", regime, train, test):
            return np.array(unit["iou"]["values"])
    raise SystemExit(f"{path}: no {regime} trained on {train}, tested on {test}")


for study, test, one, other in DIFFERENCES:
    a, b = values(study, test, one), values(study, test, other)
    gain, margin = float(a.mean() - b.mean()), added(of_seeds(a), of_seeds(b)).margin(0.975)
    ends = f"({gain - margin:+.3f} to {gain + margin:+.3f})"
    print(f"{study}, {test}: {one} - {other}: {gain:+.3f} {ends}")
