"""Draw results/answer.png and print the README's first table.

python studies/hippocampus/analyse.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

NAMES = {
    "linear": "linear head, frozen",
    "pyramid": "pyramid head, frozen",
    "lora": "pyramid head, LoRA",
    "bitfit": "pyramid head, BitFit",
}


UNITS = json.loads((Path(__file__).parent / "results/summary.json").read_text())["units"]


def both(scores: dict) -> np.ndarray:
    """The mean of Dice and Jaccard of each seed, as arXiv 2312.02366 has it."""
    return np.mean([scores[metric]["values"] for metric in ("dice", "iou")], axis=0)


def interval(scores: dict, metric: str) -> str:
    """A metric with its interval."""
    low, high = scores[metric]["ci95"]
    return f"{scores[metric]['mean']:.3f} ({low:.3f} to {high:.3f})"


print(
    "| 24 labelled volumes | seeds | mean of Dice and Jaccard | Dice | Jaccard | anterior, Dice |"
    " posterior, Dice | trained parameters | seconds |"
)
print("|---" * 9 + "|")
for unit in UNITS:
    parts = [f"{own['dice']['mean']:.3f}" for own in unit["classes"].values()]
    cells = [
        str(len(both(unit))),
        f"{both(unit).mean():.3f}",
        interval(unit, "dice"),
        interval(unit, "iou"),
        *parts,
    ]
    cells.append(f"{unit['trainable_params']:,}")
    print(f"| {NAMES[unit['regime']]} | {' | '.join(cells)} | {unit['seconds']:.0f} |")

figure, axes = plt.subplots(figsize=(7, 2.4))
for row, unit in enumerate(UNITS):
    for name, colour, shift in (("anterior", "#0072b2", -0.12), ("posterior", "#e69f00", 0.12)):
        dice = unit["classes"][name]["dice"]
        ends = [[dice["mean"] - dice["ci95"][0]], [dice["ci95"][1] - dice["mean"]]]
        label = None if row else name
        axes.errorbar(dice["mean"], row + shift, xerr=ends, fmt="o", color=colour, label=label)
axes.set_yticks(range(len(UNITS)), [NAMES[unit["regime"]] for unit in UNITS])
axes.invert_yaxis()
axes.set_xlabel("Dice of 30 test volumes, 95 % interval over volumes")
axes.grid(alpha=0.3)
axes.legend(frameon=False, fontsize=9)
figure.tight_layout()
figure.savefig(Path(__file__).parent / "results/answer.png", dpi=110)
