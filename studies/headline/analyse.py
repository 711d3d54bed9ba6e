"""Draw results/answer.png and print the README's tables from what results/ keeps."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from emadapt.metrics.intervals import added, of_seeds

RESULTS = Path(__file__).parent / "results"
FEW = {u["regime"]: u for u in json.loads((RESULTS / "summary.json").read_text())["units"]}
KEPT = json.loads((RESULTS / "all_slices.json").read_text())
ALL = {u["regime"]: u for u in KEPT["units"]}
NAMES = {
    "frozen": "frozen",
    "lora": "LoRA, from the frozen head",
    "shipped": "LoRA, from the model that ships",
    "unet2d": "U-Net from scratch",
}
COMPARED = (
    ("frozen less U-Net", "frozen", "unet2d"),
    ("LoRA, from the model that ships, less frozen", "shipped", "frozen"),
)
PARTS = {"first 32": slice(0, 32), "next 32": slice(32, 64)}


def of_part(regime: str, part: slice) -> list[float]:
    """IoU of each seed pooled over some test slices of the models of 165 training slices."""
    found = []
    for counts in KEPT["counts"][regime].values():
        both, predicted, labelled = np.array(counts)[part].sum(0)
        found.append(float(both / (predicted + labelled - both)))
    return found


def said(values: list[float]) -> str:
    """Mean and standard deviation over seeds; of one seed its value."""
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def costs(unit: dict[str, Any]) -> list[str]:
    """Cells that say what a model took."""
    return [f"{unit['trainable_params']:,}", f"{unit['seconds']:.0f} s"]


def draw(shown: dict[str, list[float]]) -> None:
    """IoU of each seed, and the mean, a row for each name."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for k, values in enumerate(shown.values()):
        axes.plot(values, [-k] * len(values), "|", color="#0072b2", ms=14)
        axes.plot(np.mean(values), -k, "o", color="#0072b2", ms=8)
    axes.set_yticks([-k for k in range(len(shown))], list(shown))
    axes.set_ylim(0.6 - len(shown), 0.6)
    axes.set_xlabel("foreground IoU (ticks: seeds, point: mean)")
    axes.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(RESULTS / "answer.png", dpi=110)


few = {f"{NAMES[r]}, 48 slices\ntested on first 32": u["iou"]["values"] for r, u in FEW.items()}
parts = {
    f"{name}, 165 slices\ntested on {part}": of_part(regime, at)
    for part, at in PARTS.items()
    for regime, name in NAMES.items()
}
draw(few | parts)

print("| 165 training slices, 64 test slices | seeds | IoU | 95 % | first 32 | next 32 |", end="")
print(" Dice | boundary IoU | trained weights | training |")
print("|---" * 10 + "|")
for regime in NAMES:
    unit = ALL[regime]
    low, high = unit["iou"]["ci95"]
    cells = [
        str(len(unit["iou"]["values"])),
        said(unit["iou"]["values"]),
        f"{low:.3f} to {high:.3f}",
        *(said(of_part(regime, at)) for at in PARTS.values()),
        f"{unit['dice']['mean']:.3f}",
        f"{unit['boundary_iou']['mean']:.3f}",
        *costs(unit),
    ]
    print(f"| {NAMES[regime]} | {' | '.join(cells)} |")
print("\n| difference of IoU | mean | 95 % over seeds |\n|---|---|---|")
for name, first, second in COMPARED:
    ours, theirs = (np.array(ALL[regime]["iou"]["values"]) for regime in (first, second))
    gain = ours.mean() - theirs.mean()
    margin = added(of_seeds(ours), of_seeds(theirs)).margin(0.975)
    print(f"| {name} | {gain:+.3f} | {gain - margin:+.3f} to {gain + margin:+.3f} |")
print()

scores = "IoU | Dice | boundary IoU | average precision of objects | trained weights | training"
print(f"| 48 training slices, first 32 test slices | {scores} |")
print("|---" * 7 + "|")
for regime, unit in FEW.items():
    cells = [
        said(unit["iou"]["values"]),
        f"{unit['dice']['mean']:.3f}",
        f"{unit['boundary_iou']['mean']:.3f}",
        f"{unit['instances']['ap50']['mean']:.3f}",
        *costs(unit),
    ]
    print(f"| {NAMES[regime]} | {' | '.join(cells)} |")
