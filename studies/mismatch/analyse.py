"""Draw results/answer.png and print the README's tables from the kept diagnoses."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
FROZEN, LORA = (
    json.loads((RESULTS / f"dinov2_s-{regime}.json").read_text()) for regime in ("frozen", "lora")
)
LEVELS = {"token": "tokens", "image": "slice means", "pixel": "pixels"}

ROWS: list[tuple[str, dict[str, Any]]] = [
    *((f"DINOv2, {LEVELS[pair['level']]}", pair) for pair in FROZEN["pairs"]),
    *((f"after LoRA, {LEVELS[pair['level']]}", pair) for pair in LORA["pairs"]),
    *((f"random weights, {LEVELS[pair['level']]}", pair) for pair in FROZEN["controls"]["random"]),
    *(("raw pixels", pair) for pair in FROZEN["controls"]["pixels"]),
]

print("| | Fréchet distance | 95 % | null | reads as | probe | kNN mixing |")
print("|---" * 7 + "|")
for name, pair in ROWS:
    share = pair["relative"] / pair["frechet"]  # of the variance
    low, high = (end * share for end in pair["ci95"])
    cells = [
        f"{pair['relative']:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{pair['null'] * share:.2f}",
        pair["reads_as"],
        f"{pair['probe']['balanced_accuracy']:.3f}",
        f"{pair['knn_mixing']:.2f}",
    ]
    print(f"| {name} | {' | '.join(cells)} |")

print("\n| labels of | carried to | DINOv2 | after LoRA |")
print("|---|---|---|---|")
for before, after in zip(FROZEN["segmentation"], LORA["segmentation"], strict=True):
    ends = f"{before['train']} | {before['test']}"
    print(f"| {ends} | {before['knn_iou']:.3f} | {after['knn_iou']:.3f} |")

figure, axes = plt.subplots(figsize=(7, 3))
for k, (_, pair) in enumerate(ROWS):
    share = pair["relative"] / pair["frechet"]
    low, high = (end * share for end in pair["ci95"])
    axes.plot([low, high], [-k, -k], color="#0072b2")
    axes.plot(pair["relative"], -k, "o", color="#0072b2")
    axes.plot(pair["null"] * share, -k, "|", color="black", ms=14)
axes.set_yticks([-k for k in range(len(ROWS))], [name for name, _ in ROWS])
axes.set_xlabel("Fréchet distance, Lucchi to VNC, share of the variance (tick: the null)")
axes.set_xscale("log")
axes.grid(axis="x", alpha=0.3)
figure.tight_layout()
figure.savefig(RESULTS / "answer.png", dpi=110)
