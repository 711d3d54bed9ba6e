"""Draw results/answer.png and print the README's table from what keep_scores.py kept."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).parent / "results"
WAYS = {
    "labels of the other dataset": "frozen-to_{}",
    "the same, self-training": "self_training-to_{}",
    "synthetic EM": "frozen-synthetic",
    "the same, self-training ": "self_training-adapt_to_{}",
    "synthetic EM and the other dataset": "frozen-synthetic_to_{}",
    "the same, self-training  ": "self_training-synthetic_to_{}",
}
"""Way -> regime and training set."""
TARGETS = {"lucchi": ("Lucchi", "#d55e00", "s"), "vnc": ("VNC", "#0072b2", "o")}

scores = json.loads((RESULTS / "scores.json").read_text())


def tests(unit: str, target: str) -> list[dict]:
    """What the seeds of a unit have on a dataset."""
    names = [name for name in scores if name.rsplit("-", 1)[0] == f"histogram-{unit}"]
    return [scores[name][target] for name in sorted(names)]


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


figure, axes = plt.subplots(figsize=(8, 3.6))
print("| learned from | Lucchi, test half | Lucchi, all | seeds | VNC, all | seeds |")
print("|---|---|---|---|---|---|")
for k, (way, unit) in enumerate(WAYS.items()):
    row = f"| {way.strip()} |"
    for n, (target, (name, colour, marker)) in enumerate(TARGETS.items()):
        found = tests(unit.format(target), target)
        whole = [test["whole"]["iou"] for test in found]
        half = f" {cell([test['iou'] for test in found])} |" if target == "lucchi" else ""
        row += f"{half} {cell(whole)} | {len(found)} |"
        at = -k + 0.12 - 0.24 * n
        low, high = np.mean([test["whole"]["iou_ci95"] for test in found], axis=0)
        axes.plot([low, high], [at, at], color=colour, alpha=0.3, lw=3)
        label = None if k else f"scored on {name}"
        axes.plot(whole, [at] * len(whole), marker, color=colour, ms=6, ls="", label=label)
    print(row)
own = {"lucchi": "frozen-to_vnc", "vnc": "frozen-to_lucchi"}  # trained on the labels of the target
cells = [[test["iou"] for test in tests(unit, target)] for target, unit in own.items()]
n = [len(values) for values in cells]
print(f"| labels of its own | {cell(cells[0])} | | {n[0]} | {cell(cells[1])} (test) | {n[1]} |")
axes.set_yticks([-k for k in range(len(WAYS))], [way.strip() for way in WAYS])
axes.set_xlabel("foreground IoU without labels (points: seeds; bars: 95 % over places)")
axes.grid(axis="x", alpha=0.3)
axes.set_xlim(0.28, 0.82)
axes.legend(frameon=False, loc="upper right")
figure.tight_layout()
figure.savefig(RESULTS / "answer.png", dpi=110)
