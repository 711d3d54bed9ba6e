"""Draw results/answer.png and print the README's tables from what results/ keeps."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

RESULTS = Path(__file__).parent / "results"
FEW = {u["regime"]: u for u in json.loads((RESULTS / "summary.json").read_text())["units"]}
ALL = json.loads((RESULTS / "all_slices.json").read_text())
NAMES = {"frozen": "frozen", "lora": "LoRA, from the frozen head"}


def of_part(counts: list[list[int]], part: slice) -> float:
    """IoU pooled over some test slices, from pixels in both, predicted, labelled of each."""
    both, predicted, labelled = np.array(counts)[part].sum(0)
    return float(both / (predicted + labelled - both))


PARTS = {"first 32": slice(0, 32), "next 32": slice(32, 64), "all 64": slice(0, 64)}
SEEDS = {
    name: [of_part(counts, part) for counts in ALL["counts"].values()]
    for name, part in PARTS.items()
}
shown = {
    f"{name}, 48 slices\ntested on first 32": FEW[key]["iou"]["values"]
    for key, name in NAMES.items()
}
for part in ("first 32", "next 32"):
    shown[f"frozen, 165 slices\ntested on {part}"] = SEEDS[part]

figure, axes = plt.subplots(figsize=(7, 3))
for k, values in enumerate(shown.values()):
    axes.plot(values, [-k] * len(values), "|", color="#0072b2", ms=14)
    axes.plot(np.mean(values), -k, "o", color="#0072b2", ms=8)
axes.set_yticks([-k for k in range(len(shown))], list(shown))
axes.set_ylim(0.6 - len(shown), 0.6)
axes.set_xlim(0.8, 0.9)
axes.set_xlabel("foreground IoU (ticks: seeds, point: mean)")
axes.grid(axis="x", alpha=0.3)
figure.tight_layout()
figure.savefig(RESULTS / "answer.png", dpi=110)

print(f"| frozen, 165 training slices; test slices | {' | '.join(SEEDS)} |")
print("|---" * (1 + len(SEEDS)) + "|")
cells = [f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" for values in SEEDS.values()]
print("| IoU | " + " | ".join(cells) + " |")
(unit,) = ALL["units"]
low, high = unit["iou"]["ci95"]
ends, dice, edges = f"{low:.3f} to {high:.3f}", unit["dice"]["mean"], unit["boundary_iou"]["mean"]
print(f"\nAll 64: 95 % of IoU {ends}; Dice {dice:.3f}, boundary IoU {edges:.3f}.\n")

scores = "IoU | Dice | boundary IoU | average precision of objects | trained weights | training"
print(f"| 48 training slices, first 32 test slices | {scores} |")
print("|---|---|---|---|---|---|---|")
for regime, name in NAMES.items():
    unit = FEW[regime]
    cells = [
        f"{unit['iou']['mean']:.3f} ± {unit['iou']['std']:.3f}",
        f"{unit['dice']['mean']:.3f}",
        f"{unit['boundary_iou']['mean']:.3f}",
        f"{unit['instances']['ap50']['mean']:.3f}",
        f"{unit['trainable_params']:,}",
        f"{unit['seconds']:.0f} s",
    ]
    print(f"| {name} | " + " | ".join(cells) + " |")
