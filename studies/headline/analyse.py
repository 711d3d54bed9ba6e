"""Draw results/answer.png and print the README's table from results/summary.json."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
UNITS = {
    unit["regime"]: unit for unit in json.loads((RESULTS / "summary.json").read_text())["units"]
}
NAMES = {"frozen": "frozen", "lora": "LoRA, from the frozen head"}

figure, axes = plt.subplots(figsize=(7, 1.9))
for k, regime in enumerate(NAMES):
    iou = UNITS[regime]["iou"]
    axes.plot(iou["values"], [-k] * len(iou["values"]), "|", color="#0072b2", ms=14)
    axes.plot(iou["mean"], -k, "o", color="#0072b2", ms=8)
axes.set_yticks([0, -1], list(NAMES.values()))
axes.set_ylim(-1.6, 0.6)
axes.set_xlim(0.8, 0.9)
axes.set_xlabel("foreground IoU on Lucchi (ticks: seeds, point: mean)")
axes.grid(axis="x", alpha=0.3)
figure.tight_layout()
figure.savefig(RESULTS / "answer.png", dpi=110)

print("| | IoU | Dice | boundary IoU | average precision of objects | trained weights | training |")
print("|---|---|---|---|---|---|---|")
for regime, name in NAMES.items():
    unit = UNITS[regime]
    cells = [
        f"{unit['iou']['mean']:.3f} ± {unit['iou']['std']:.3f}",
        f"{unit['dice']['mean']:.3f}",
        f"{unit['boundary_iou']['mean']:.3f}",
        f"{unit['instances']['ap50']['mean']:.3f}",
        f"{unit['trainable_params']:,}",
        f"{unit['seconds']:.0f} s",
    ]
    print(f"| {name} | " + " | ".join(cells) + " |")
