"""Draw results/answer.png and print the README's table.

Reads results/summary.json; models of one dataset alone are those of the studies collapse and trade.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STUDIES = Path(__file__).parents[1]
TESTS = ("lucchi", "vnc")
ROWS = {  # name: (study, regime, training set; None: the tested dataset alone)
    "LoRA, one model for each": ("trade", "lora_random", None),
    "LoRA, one model for both": ("joint", "lora", "paired"),
    "LoRA, router and two adapters": ("joint", "routed_lora", "paired"),
    "frozen, one model for each": ("collapse", "frozen", None),
    "frozen, one model for both": ("joint", "frozen", "paired"),
    "the same, adversarial loss": ("joint", "adversarial", "paired"),
    "the same, CORAL, weight 0.1": ("joint", "coral", "paired"),
    "the same, CORAL, weight 100": ("joint", "coral_strong", "paired"),
    "the same, norm layers for each": ("joint", "norm", "paired"),
    "the same, router and two heads": ("joint", "routed", "paired"),
}


def units(study: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Regime, training set and test set -> IoU."""
    path = STUDIES / study / "results/summary.json"
    found = json.loads(path.read_text())["units"]
    return {(u["regime"], u["train_set"], u["test_set"]): u["iou"] for u in found}


UNITS = {study: units(study) for study in ("joint", "trade", "collapse")}
IOUS = {
    name: [UNITS[study][regime, train or test, test] for test in TESTS]
    for name, (study, regime, train) in ROWS.items()
}

figure, axes = plt.subplots(figsize=(8, 3.8))
for n, (test, colour, marker) in enumerate(zip(TESTS, ("#0072b2", "#d55e00"), "os", strict=True)):
    for k, ious in enumerate(IOUS.values()):
        at = -k + 0.14 - 0.28 * n
        label = None if k else f"tested on {'Lucchi' if test == 'lucchi' else 'VNC'}"
        axes.plot(ious[n]["values"], [at] * 3, "|", color=colour, ms=8)
        axes.plot(ious[n]["mean"], at, marker, color=colour, ms=6, label=label)
axes.set_yticks([-k for k in range(len(IOUS))], list(IOUS))
axes.set_xlabel("foreground IoU (ticks: seeds)")
axes.grid(axis="x", alpha=0.3)
axes.legend(frameon=False, loc="upper left")
figure.tight_layout()
figure.savefig(STUDIES / "joint/results/answer.png", dpi=110)

print("| | Lucchi | VNC |\n|---|---|---|")
for name, ious in IOUS.items():
    print(f"| {name} | " + " | ".join(f"{i['mean']:.3f} ± {i['std']:.3f}" for i in ious) + " |")
